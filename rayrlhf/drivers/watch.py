"""Health while a run is under way: each warning once, on the terminal and in health.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayrlhf.config.health import HealthConfig
from rayrlhf.errors import RunFailed
from rayrlhf.monitoring import HealthWarning, Progress, check_health, stopping
from rayrlhf.monitoring.jsonl import JsonlFile

__all__ = ["HealthWatch"]


class HealthWatch:
    """Looks at the metrics after each step.

    Args:
        folder: the run's.
        past: rows of metrics of the steps before a resume.
        resume_step: on resume, the first step that is made.
    """

    def __init__(self, folder: Path, config: HealthConfig, past: Sequence[Mapping[str, Any]], resume_step: int | None):
        self._config = config
        self._rows: list[Mapping[str, Any]] = list(past)
        self._file = JsonlFile(folder / "health.jsonl", resume_step=resume_step)
        self._told: set[tuple[str, int, str]] = (
            {self._key(w) for w in check_health(self._rows, config)} if past else set()
        )

    def look(self, step: int, metrics: Mapping[str, Any], progress: Progress) -> None:
        """Take a step's metrics in; what is new or has become worse is written down and shown.

        Raises:
            RunFailed: where the configuration ends a run for it (``health.stop_at``, ``health.stop_on``).
        """
        self._rows.append({**metrics, "step": step})
        warnings = check_health(self._rows, self._config)
        for warning in warnings:
            if self._key(warning) not in self._told:
                self._told.add(self._key(warning))
                self._file.write(asdict(warning))
                progress.note(warning.line(), warning=True)
        ending = stopping(warnings, self._config)
        if ending:
            raise RunFailed(f"health ends the run after step {step}: {ending[0].line()}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @staticmethod
    def _key(warning: HealthWarning) -> tuple[str, int, str]:
        return warning.rule, warning.since, warning.severity
