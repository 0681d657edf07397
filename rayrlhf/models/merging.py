"""Whether a folder into which adapters were merged computes what the adapters did, on a few tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import RunFailed
from rayrlhf.models.layout import micro_batches
from rayrlhf.models.loading import load_reward_model, quiet_loading

__all__ = ["MERGE_CHECK", "Checked", "merged_logprobs", "merged_scores", "probe_batch", "write_checked"]

MERGE_CHECK = "merge_check.json"
"""File of a model's folder: ``{"compared", "dtype", "difference", "tolerance"}``."""
PROBES = (4, 32)
"""Sequences that a fixed seed draws, and tokens of each."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Largest difference. In float32 the largest of all, in nats or in scores. In bfloat16, where one rounding of a weight or a
state moves single log-probabilities by tenths of a nat (0.6 % of their size on average, in a model of 30 layers), the mean
one, as a share of the mean size: of a wrong merge only what is larger than that is seen."""
SCORE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""The same of scores, as a share of their root mean square, at least of 1. They are differences of large numbers."""


def probe_batch(vocabulary: int) -> Batch:
    """Random tokens; every token but a sample's first is a response token."""
    rows, length = PROBES
    generator = torch.Generator().manual_seed(0)
    tokens = list(torch.randint(vocabulary, (rows, length), generator=generator))
    batch = Batch.from_samples({"tokens": tokens, "response_mask": [torch.arange(length) > 0] * rows})
    return batch.with_columns(sample={"prompt_length": torch.ones(rows, dtype=torch.int64)})


class Checked:
    """What the merged model must compute.

    Args:
        compared: "log-probabilities" or "scores".
        expected: of the model with its adapters: float32 [N].
        read: from a folder, the merged model's.
        dtype: of the merged weights.
    """

    def __init__(self, compared: str, expected: Tensor, read: Callable[[Path], Tensor], dtype: torch.dtype):
        self.compared, self.expected, self.read, self.dtype = compared, expected.double(), read, dtype

    def check(self, folder: Path) -> None:
        """Compare, and write down what was found.

        Raises:
            RunFailed: where they differ by more than rounding explains.
        """
        off = (self.read(folder).double() - self.expected).abs()
        if self.compared == "scores":
            scale = max(1.0, float(self.expected.square().mean().sqrt()))
            legal = SCORE_TOLERANCE[self.dtype] * scale
        else:
            legal = TOLERANCE[self.dtype]
            if self.dtype != torch.float32:
                legal *= float(self.expected.abs().mean())
        difference = float(off.max() if self.dtype == torch.float32 else off.mean())
        name = str(self.dtype).removeprefix("torch.")
        if not difference <= legal:  # NaN too
            raise RunFailed(
                f"merging the adapters changes {self.compared} by {difference:.3g} in {name} (legal: {legal:.3g}); "
                "the model is not written, its checkpoint is whole"
            )
        found = {"compared": self.compared, "dtype": name, "difference": difference, "tolerance": legal}
        (folder / MERGE_CHECK).write_text(json.dumps(found) + "\n", encoding="utf-8")


def write_checked(folder: Path, write: Callable[[Path], None], checked: Checked) -> None:
    """Write a folder under another name, check it, and only then let it take its place.

    Raises:
        RunFailed: where the check fails; an earlier folder of this name stays.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        checked.check(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def merged_logprobs(kind: type[Any], folder: Path, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the probes' response tokens, on the CPU, by transformers alone: float32 [N]."""
    with quiet_loading():
        lm: Any = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    ids = probe_batch(lm.config.get_text_config().vocab_size)["tokens"].view(PROBES)
    found = []
    for row in ids:  # one after the other: the logits of all would be large
        logits = lm(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        found.append(torch.log_softmax(logits, -1).gather(-1, row[1:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def merged_scores(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Tensor:
    """Scores of the probes, on the CPU: float32 [S]."""
    settings = ModelConfig(attention="eager", packing=False, trust_remote_code=trust_remote_code)
    model = load_reward_model(str(folder), settings, dtype=dtype).eval()
    probes = probe_batch(model.backbone.config.get_text_config().vocab_size)
    scores = torch.zeros(len(probes))
    for micro in micro_batches(probes, PROBES[1], False, mask=None):
        scores[micro.samples] = model(micro)[1]
    return scores
