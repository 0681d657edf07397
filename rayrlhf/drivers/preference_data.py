"""What a preference step is trained on: pairs (or labelled completions) with the reference's log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.algorithms import segment_sum
from rayrlhf.batch import Batch
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.data import labelled_batch, pair_batch
from rayrlhf.drivers.offline import OfflineRun, spread_units
from rayrlhf.errors import InputRefused

__all__ = ["PreferenceData"]

CHUNK = 256
"""Examples whose reference log-probabilities are asked for in one call."""


class PreferenceData:
    """Batches of a run's examples.

    Args:
        run: of a `PreferenceConfig`. Where ``dpo.reference`` is ``cached``, the reference's log-probabilities of all
            examples are computed now, or read from ``RUN/reference_logprobs.pt``.

    Raises:
        InputRefused: where that file belongs to another reference or other examples.
    """

    def __init__(self, run: OfflineRun):
        assert isinstance(run.config, PreferenceConfig)
        self.run, self.config = run, run.config
        self.paired = self.config.dpo.loss != "kto"
        self.needs_reference = self.config.dpo.loss not in ("simpo", "orpo")
        self.cache: dict[str, list[Tensor]] | None = None
        self.weights_verified = False
        """Whether the engines' weights were compared with the policy's since they started."""
        if self.needs_reference and self.config.dpo.reference == "cached":
            self.cache = self._cached()

    def batch(self, examples: Sequence[Any]) -> Batch:
        """Training examples with ``reference_logprobs``, where the loss needs them."""
        return self._with_reference(self._plain(examples), "train", examples)

    def validation(self) -> Batch:
        """All held-out examples, likewise."""
        examples = self.run.data.validation
        return self._with_reference(self._plain(examples), "validation", examples)

    def parts(self, batch: Batch) -> list[Tensor]:
        """Which samples each rank takes: the two of a pair together, of the mismatched ones an even share."""
        ranks = self.run.policy.shards
        if self.paired:
            return spread_units(batch.lengths, 2, ranks)
        real = len(batch) // 2
        halves = spread_units(batch.lengths[:real], 1, ranks), spread_units(batch.lengths[real:], 1, ranks)
        return [torch.cat([own, other + real]) for own, other in zip(*halves, strict=True)]

    def curriculum(self) -> list[int] | None:
        """The first epoch's order where a curriculum is asked for: the largest reward gap, the easiest pair, first.

        The gap is the data's margin; of a pair without one, the difference of its responses' mean log-probabilities a
        token under the reference.
        """
        if not self.config.dpo.curriculum:
            return None
        batch = self.batch(self.run.data.train)
        counts = segment_sum(batch["response_mask"].double(), batch.offsets)
        gap = (segment_sum(batch["reference_logprobs"].double(), batch.offsets) / counts).view(-1, 2)
        margins = [pair.margin for pair in self.run.data.train]
        gaps = [float(g[0] - g[1]) if m is None else m for g, m in zip(gap, margins, strict=True)]
        return sorted(range(len(gaps)), key=lambda i: (-gaps[i], i))

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Column [T] of the frozen reference, at temperature 1."""
        if self.run.reference is not None:
            self.run.turns.take({"reference": "weights"})
            return self.run.reference.call("token_logprobs", batch, temperature=1.0)["reference_logprobs"]
        self.run.turns.take({"policy": "weights"})
        return self.run.policy.call("token_logprobs", batch, adapters=False, temperature=1.0)["reference_logprobs"]

    # -- inside -------------------------------------------------------------------------------------------------

    def _plain(self, examples: Sequence[Any]) -> Batch:
        return pair_batch(examples) if self.paired else labelled_batch(examples)

    def _with_reference(self, batch: Batch, split: str, examples: Sequence[Any]) -> Batch:
        if not self.needs_reference:
            return batch
        if self.cache is None:
            self.run.progress.phase("reference")
            column = self.reference_logprobs(batch)
        else:
            column = torch.cat([self.cache[split][example.id] for example in examples])
        return batch.merge(Batch(batch.offsets, {"reference_logprobs": column}))

    def _cached(self) -> dict[str, list[Tensor]]:
        file, fingerprint = self.run.folder / "reference_logprobs.pt", self._fingerprint()
        if file.exists():
            stored = torch.load(file, weights_only=True)
            changed = [what for what, value in fingerprint.items() if stored["fingerprint"].get(what) != value]
            if changed:
                raise InputRefused(
                    f"{file} holds the log-probabilities of another {' and other '.join(changed)}; remove it to have them "
                    "computed again, or restore what they were computed with"
                )
            return stored["logprobs"]
        self.run.progress.phase("reference")
        data = self.run.data
        logprobs = {"train": self._all(data.train), "validation": self._all(data.validation)}
        partial = file.with_suffix(".partial")
        torch.save({"fingerprint": fingerprint, "logprobs": logprobs}, partial)
        partial.replace(file)
        return logprobs

    def _all(self, examples: Sequence[Any]) -> list[Tensor]:
        """For each example, the column's part over its samples."""
        found: list[Tensor] = []
        each = 2 if self.paired else 1
        for start in range(0, len(examples), CHUNK):
            batch = self._plain(examples[start : start + CHUNK])
            column, offsets = self.reference_logprobs(batch), batch.offsets.tolist()
            found += [
                column[offsets[i] : offsets[i + each]].clone()
                for i in range(0, each * len(examples[start : start + CHUNK]), each)
            ]
        return found

    def _fingerprint(self) -> dict[str, str]:
        prepared = self.run.prepared
        path = prepared.reference_path or prepared.model_path
        dtype = self.config.policy.dtype if self.config.reference is None else self.config.reference.dtype
        return {"reference model": f"{model_fingerprint(path)} {dtype}", "examples": self.run.data.fingerprint}


def model_fingerprint(path: str) -> str:
    """Of a model folder's configuration and weights (each file's size and, in full, its bytes); of a hub model, its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as handle:
            while block := handle.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:24]
