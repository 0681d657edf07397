"""Weights over NCCL and CUDA IPC, each transfer compared by checksum.

``ipc``: policy and engine share a GPU. ``nccl``: each has its own, so that two are needed. With one GPU only ``ipc`` is run,
and the result says so.
"""

from __future__ import annotations

import argparse
from typing import Any

from gpu_common import arguments, ppo, write_result

import rayrlhf


def transfers(args: argparse.Namespace, transport: str, placement: str, gpus: int, bucket_mib: float) -> dict[str, Any]:
    """Several transfers of one run; each is verified, and a difference ends the script with the names of the tensors."""
    changes = {
        "critic": None,
        "reference": None,
        "ppo.advantage_estimator": "rloo",
        "ppo.kl_coef": 0.0,
        "rollout.weight_transport": transport,
        "rollout.weight_bucket_mib": bucket_mib,
        "cluster.placement": placement,
        "cluster.nodes": [{"gpus": gpus}],
    }
    found = []
    with rayrlhf.launch(ppo(args, f"transfer-{transport}", changes)) as run:
        # The engine's weights have to come from here: before each transfer the policy takes a step.
        for _ in range(args.repeats):
            batch = run.collect(run.next_prompts())
            run.update(batch.with_columns({"advantages": batch["response_mask"].float()}))
            found.append(run.publish_weights(verify=True))
    return {"bucket_mib": bucket_mib, "verified": len(found), "transfers": found}


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__, "1.5b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--transports", nargs="+", default=["ipc", "nccl"])
    args = parser.parse_args()
    result: dict[str, Any] = {}
    for transport in args.transports:
        needed, placement = (2, "disaggregated") if transport == "nccl" else (1, "colocated")
        if args.gpus < needed:
            result[transport] = f"not run: needs {needed} GPUs, --gpus is {args.gpus}"
            continue
        one_rank = argparse.Namespace(**{**vars(args), "gpus": 1})
        result[transport] = [
            transfers(one_rank, transport, placement, needed, bucket_mib) for bucket_mib in (1024.0, 64.0)
        ]
    write_result(args, "transfer", result)


if __name__ == "__main__":
    main()
