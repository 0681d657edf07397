"""samples.jsonl: some responses of each step, to be read."""

from __future__ import annotations

from pathlib import Path

from rayrlhf.monitoring.jsonl import JsonlFile
from rayrlhf.monitoring.metrics import json_number

__all__ = ["SampleWriter"]


class SampleWriter:
    """Writes one line a sample into ``run_dir/samples.jsonl``; resume as in `JsonlFile`."""

    def __init__(self, run_dir: Path | str, *, resume_step: int | None = None):
        self._file = JsonlFile(Path(run_dir) / "samples.jsonl", resume_step=resume_step)

    def write(
        self,
        step: int,
        *,
        prompt: str,
        response: str,
        score: float | None,
        kl: float | None,
        response_tokens: int,
        finish_reason: str,
        weight_version: int,
    ) -> None:
        """``kl``: to the reference, in nats over the response; None without one. Non-finite numbers become null."""
        self._file.write(
            {
                "step": step,
                "prompt": prompt,
                "response": response,
                "score": json_number("score", score),
                "kl": json_number("kl", kl),
                "response_tokens": int(response_tokens),
                "finish_reason": finish_reason,
                "weight_version": int(weight_version),
            }
        )

    def close(self) -> None:
        """May be called more than once."""
        self._file.close()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
