"""The way of the weights: from the policy's trainer to every rollout engine."""

from __future__ import annotations

from rayrlhf.cluster import Group

__all__ = ["SYNC", "transfer_weights"]

SYNC = (("policy", "publish_weights"), ("rollout", "receive_weights"), ("policy", "release_weights"))
"""The calls of a transfer, as timings add them up."""


def transfer_weights(policy: Group, rollout: Group, version: int, verify: bool) -> dict[str, float]:
    """Give the policy's weights to all rollout engines.

    Args:
        version: of these weights; larger than the engines' present one.
        verify: compare every engine's weights with the policy's by checksum.

    Returns:
        ``sync/bytes``, ``sync/buckets``.

    Raises:
        RunFailed: where a weight differs; it names the tensors.
    """
    manifest = policy.broadcast("publish_weights", version=version, checksums=verify)[0]
    try:
        rollout.broadcast("receive_weights", manifest=manifest, verify=verify)
    finally:
        policy.broadcast("release_weights", manifest=manifest)
    return {"sync/bytes": float(manifest.nbytes), "sync/buckets": float(len(manifest.buckets))}
