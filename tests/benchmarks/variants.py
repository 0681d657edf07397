"""Tokens a second of the benchmark's model by type, padding mask, logits and micro-batch, to choose settings from."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2ForCausalLM
from workload import VOCABULARY, Workload, model_config


def tokens_per_second(model: Any, tokens: torch.Tensor, rows: int, backward: bool, autocast: bool, **how: Any) -> float:
    """All of ``tokens`` in micro-batches of ``rows`` samples."""
    half = tokens.shape[1] // 2
    start = time.perf_counter()
    for ids in tokens.split(rows):
        extra: dict[str, Any] = {}
        if how.get("mask"):  # every other sample has eight tokens of padding
            extra["attention_mask"] = torch.ones_like(ids)
            extra["attention_mask"][::2, -8:] = 0
        if how.get("response_logits"):
            extra["logits_to_keep"] = torch.arange(half - 1, 2 * half - 1)
        with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False, **extra).logits
        wanted = logits if how.get("response_logits") else logits[:, half - 1 : -1]
        with torch.set_grad_enabled(backward):
            logprobs = torch.log_softmax(wanted.float(), -1).gather(-1, ids[:, half:, None])
            if backward:
                logprobs.mean().backward()
                model.zero_grad(set_to_none=True)
    return tokens.numel() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = model_config(Workload(folder=""))
    full = Qwen2ForCausalLM(config)
    half = Qwen2ForCausalLM(config).bfloat16()
    tokens = torch.randint(3, VOCABULARY, (64, 128))
    types = {"float32": (full, False), "bfloat16 autocast": (full, True), "bfloat16 weights": (half, False)}
    ways: list[tuple[int, dict[str, Any]]] = [(rows, {}) for rows in (8, 16, 32, 64)]
    ways += [(16, {"mask": True}), (16, {"response_logits": True})]
    table = Table("type", "samples", "variant", "forward", "forward + backward")
    for name, (model, autocast) in types.items():
        for rows, how in ways:
            speeds = []
            for backward in (False, True):
                tokens_per_second(model, tokens[:rows], rows, backward, autocast, **how)
                settings = (rows, backward, autocast)
                runs = [tokens_per_second(model, tokens, *settings, **how) for _ in range(options.repetitions)]
                speeds.append(f"{median(runs):,.0f} (best {max(runs):,.0f})")
            table.add_row(name, str(rows), ", ".join(how), *speeds)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
