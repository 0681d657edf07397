"""metrics.jsonl, TensorBoard and Weights & Biases, from one call a step."""

from __future__ import annotations

import importlib.util
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring.jsonl import JsonlFile

__all__ = ["MetricWriter", "check_tensorboard", "check_wandb", "json_number", "plain_number"]

Number = int | float | None
_RESERVED = ("step", "non_finite")


def plain_number(name: str, value: Any) -> Number:
    """A Python number of ``value``: int, float, bool, or anything of one element with ``item()`` (tensors, NumPy).

    Raises TypeError, with the metric's name, for everything else.
    """
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if value is None or isinstance(value, (int, float)):
        return int(value) if isinstance(value, bool) else value
    raise TypeError(f"metric {name!r} must be one number, is {type(value).__name__}: {str(value)[:80]}")


def json_number(name: str, value: Any) -> Number:
    """As `plain_number`, with nine significant digits (exact for float32); None for NaN and infinities: not in JSON."""
    number = plain_number(name, value)
    if isinstance(number, float):
        # + 0.0 makes -0.0 plain zero
        return float(f"{number:.9g}") + 0.0 if math.isfinite(number) else None
    return number


def check_tensorboard(wanted: bool) -> None:
    """Raises `InputRefused` where TensorBoard is asked for and isn't installed. Imports nothing."""
    if wanted and not _installed("tensorboard"):
        raise InputRefused(
            "monitoring.tensorboard is true, but the package tensorboard isn't installed: "
            "`pip install tensorboard`, or set monitoring.tensorboard=false"
        )


def check_wandb(project: str | None) -> None:
    """Raises `InputRefused` where a Weights & Biases project is named and wandb isn't installed. Imports nothing."""
    if project is not None and not _installed("wandb"):
        raise InputRefused(
            f"monitoring.wandb_project is {project!r}, but the package wandb isn't installed: "
            "`pip install wandb`, or set monitoring.wandb_project=null"
        )


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # W&B leaves folders named "wandb" behind; on the import path such a folder looks like a package without origin.
    return spec is not None and spec.origin is not None


class MetricWriter:
    """Writes the metrics of a run: ``run_dir/metrics.jsonl`` always, TensorBoard and W&B where asked.

    A resumed run names the first step that it makes, ``resume_step``. Lines of that step and later ones are removed
    from metrics.jsonl, TensorBoard hides its own, and W&B goes on in the same W&B run (where the repeated steps stay
    visible twice: W&B's history only grows).
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        tensorboard: bool,
        wandb_project: str | None,
        config_dict: Mapping[str, Any],
        resume_step: int | None = None,
    ):
        check_tensorboard(tensorboard)
        check_wandb(wandb_project)
        run_dir = Path(run_dir)
        self._file = JsonlFile(run_dir / "metrics.jsonl", resume_step=resume_step)
        self._tensorboard = _open_tensorboard(run_dir, config_dict, resume_step) if tensorboard else None
        self._wandb = _open_wandb(run_dir, wandb_project, config_dict) if wandb_project is not None else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line: ``step``, then ``metrics`` sorted by name.

        A value that isn't finite becomes null, and ``non_finite`` says what it was: ``{"kl": "nan"}``. None is null.
        Raises TypeError for a value that is no number, `RunFailed` where a file can't be written.
        """
        for name in _RESERVED:
            if name in metrics:
                raise ValueError(f"{name!r} is no name for a metric: every line has a field of that name")
        numbers = {name: plain_number(name, metrics[name]) for name in sorted(metrics)}
        row: dict[str, Any] = {"step": int(step)} | {name: json_number(name, x) for name, x in numbers.items()}
        strange = {name: str(x) for name, x in numbers.items() if isinstance(x, float) and not math.isfinite(x)}
        if strange:
            row["non_finite"] = strange
        self._file.write(row)
        known = {name: number for name, number in numbers.items() if number is not None}
        if self._tensorboard is not None:
            try:
                for name, number in known.items():
                    self._tensorboard.add_scalar(name, number, global_step=step)
                self._tensorboard.flush()
            except OSError as error:
                raise RunFailed(f"{self._tensorboard.log_dir}: can't be written: {error.strerror or error}") from error
        if self._wandb is not None:
            self._wandb.log({"step": int(step), **known})

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes everything; ``failed`` marks the W&B run. May be called more than once."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if failed else 0)
            self._wandb = None

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.close(failed=exception_type is not None)


def _open_tensorboard(run_dir: Path, config_dict: Mapping[str, Any], resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes a second, so only where it is used

    writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=resume_step)
    if resume_step is None:
        text = json.dumps(config_dict, indent=2, default=str)
        writer.add_text("config", "\n".join("    " + line for line in text.splitlines()), global_step=0)
    writer.flush()
    return writer


def _open_wandb(run_dir: Path, project: str | None, config_dict: Mapping[str, Any]) -> Any:
    import wandb

    # The id is kept in the run's folder, so that a resumed run goes on in the same W&B run.
    id_file = run_dir / "wandb" / "run_id"
    if not id_file.exists():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    try:
        run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config_dict),
        )
        # W&B drops what is logged for an earlier step than its last; with an axis of our own a resumed run may go back.
        run.define_metric("*", step_metric="step")
    except Exception as error:
        raise RunFailed(
            f"Weights & Biases (monitoring.wandb_project={project!r}) didn't start: {type(error).__name__}: {error}. "
            "`wandb login`, WANDB_MODE=offline, or monitoring.wandb_project=null"
        ) from error
    return run
