"""A run on a fixed set of examples: batches in order, validation, the best state so far, early stopping."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.checkpoint import check_written
from rayrlhf.cluster import Groups
from rayrlhf.cluster.split import split_by_tokens
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.roots import OfflineConfig
from rayrlhf.data.check import check_file
from rayrlhf.data.sampler import epoch_order
from rayrlhf.drivers.base import BaseRun, Opening, opened, started
from rayrlhf.drivers.data_check import data_kind
from rayrlhf.drivers.evaluation import EvaluationLog
from rayrlhf.drivers.offline_preflight import PreparedExamples, prepare_examples
from rayrlhf.drivers.roles import offline_specs
from rayrlhf.drivers.shared_folder import check_shared_folder
from rayrlhf.drivers.transfer import SYNC, connect_weights
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring import render_plan
from rayrlhf.monitoring.plan import render_notes
from rayrlhf.planning.plan import memory_notes
from rayrlhf.planning.rows import plan_rows

__all__ = ["OfflineRun", "OfflineState", "launch_offline", "spread_units"]


@dataclass
class OfflineState:
    """The driver's state between two steps. The place in the data follows from the step."""

    step: int = 0
    """Optimizer steps that are done."""
    beta: float = 0.0
    """Present beta of a preference loss."""
    lr_scale: float = 1.0
    """Present factor of the learning rate."""
    weight_version: int = 0
    """Version of the weights that the rollout engines have."""
    best_value: float | None = None
    """Value of the best validation so far."""
    best_step: int | None = None
    """Step after which it was made."""
    worse_in_a_row: int = 0
    """Validations since then."""
    good_step: int | None = None
    """Step of the last validated state within the KL bound."""
    actions: int = 0
    """Actions that the guard has taken."""
    stopped: bool = False
    """Whether it was decided to end early."""

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


def kept_steps(stored: Mapping[str, Any]) -> set[int]:
    """The steps whose states a driver's stored state names."""
    return {stored[name] for name in ("best_step", "good_step") if stored[name] is not None}


def spread_units(lengths: Tensor, unit: int, ranks: int) -> list[Tensor]:
    """Which samples of a batch each rank takes, where each ``unit`` neighbours stay together.

    Args:
        lengths: int64 [S], tokens of each sample; S is a multiple of ``unit``.

    Returns:
        For each rank, the samples: int64 [n].
    """
    whole = lengths.view(-1, unit).sum(1).tolist()
    first = [torch.tensor(part, dtype=torch.int64) * unit for part in split_by_tokens(whole, ranks)]
    return [(part[:, None] + torch.arange(unit)).flatten() for part in first]


class OfflineRun(BaseRun):
    """What the loops of supervised fine-tuning, reward models and preferences work with.

    Attributes:
        policy: the group that is trained.
        reference, rollout: groups, where the algorithm has them.
        data: training and validation examples.
    """

    timings = {
        "update": [("policy", "update")],
        "validation": [("policy", "token_logprobs"), ("policy", "scores")],
        "reference": [("reference", "token_logprobs")],
        "rollout": [("rollout", "generate")],
        "sync": SYNC,
    }
    trained = ("policy",)
    config: OfflineConfig
    state: OfflineState

    def __init__(self, prepared: PreparedExamples, groups: Groups, opening: Opening):
        self.prepared, self.data = prepared, prepared.data
        self.policy = groups["policy"]
        self.reference, self.rollout = groups.get("reference"), groups.get("rollout")
        state = OfflineState(beta=prepared.config.dpo.beta if hasattr(prepared.config, "dpo") else 0.0)
        super().__init__(opening, groups, state, prepared.total_steps)
        self.validations = EvaluationLog(self.folder / "evaluations.jsonl", opening.resume_step)
        self.first_epoch: Sequence[int] | None = None
        """Order of the first epoch, where a curriculum gives one."""
        self._went_back_to: int | None = None
        """Step whose state the trainers have, where it isn't that of the last step."""
        self._kept: set[int] = set()
        self._in_checkpoint: set[int] = set()

    # -- the loop's verbs ---------------------------------------------------------------------------------------

    def next_examples(self) -> list[Any]:
        """The training examples of the next step: each once an epoch, in an order that seed and epoch give."""
        epoch, place = divmod(self.state.step, self.prepared.steps_per_epoch)
        if epoch == 0 and self.first_epoch is not None:
            order = self.first_epoch
        else:
            order = epoch_order(len(self.data.train), self.config.seed, self.config.data.shuffle, epoch)
        size = self.config.training.batch_examples
        return [self.data.train[i] for i in order[place * size : (place + 1) * size]]

    def update(self, batch: Batch, parts: Sequence[Tensor], **more: Any) -> dict[str, float]:
        """One optimizer step.

        Args:
            parts: for each rank, the samples that it takes.
            more: what the trainer's ``update`` takes besides.

        Returns:
            The trainer's metrics.
        """
        self.progress.phase("update")
        self.trainers_change()
        self._went_back_to = None
        self.turns.take({"policy": "all"})
        return self.policy.broadcast("update", batch=batch, schedule=[list(parts)], step=self.state.step + 1, **more)[0]

    def finish_step(self, metrics: Mapping[str, float], batch: Batch) -> None:
        """Count the step as done, with its metrics."""
        epoch = (self.state.step + 1) / self.prepared.steps_per_epoch
        self.count_step({**metrics, "epoch": epoch}, batch.num_tokens)

    def validation_due(self) -> bool:
        """Whether a validation follows the last step that was done, and hasn't been made: before the first step it does,
        and on resume where it was the validation that was interrupted."""
        every = self.config.training.validate_every_steps or self.prepared.steps_per_epoch
        step, made = self.state.step, self.validations.results
        due = step % every == 0 or step == self.total_steps
        return bool(self.data.validation) and due and not (made and made[-1]["step"] == step)

    def record(self, result: Mapping[str, Any], value: float | None, line: str) -> None:
        """Write a validation down, keep the state if it is the best so far, and decide whether to go on.

        Args:
            result: what was measured, for evaluations.jsonl.
            value: the larger, the better; None, or not finite: this state is out of the question as the best.
            line: what the terminal shows.
        """
        state, training = self.state, self.config.training
        self.progress.note(line)
        if value is not None and math.isfinite(value) and (state.best_value is None or value > state.best_value):
            state.best_value, state.best_step, state.worse_in_a_row = value, state.step, 0
            if training.keep_best:
                self.keep()
        else:
            state.worse_in_a_row += 1
        if training.patience is not None and state.worse_in_a_row >= training.patience:
            state.stopped = True
            best = "none was any good" if state.best_step is None else f"the best is that of step {state.best_step}"
            self.progress.note(f"stopping: {state.worse_in_a_row} validations without a better one; {best}")
        # Once it is written it counts as made: nothing that belongs to it may fail afterwards.
        self.validations.add(state.step, dict(result))
        self.refresh_snapshot()
        self._drop_unwanted()

    def keep(self) -> None:
        """Keep the trainers' state of this step in ``RUN/kept/step-N``, whole or not at all, until no ``best_step`` or
        ``good_step`` names it, neither that of now nor that of the last checkpoint, from which the run may have to go on."""
        step = self.state.step
        if step in self._kept:  # as the best and as the last good one it is written once
            return
        final, partial = self.folder / "kept" / f"step-{step}", self.folder / "kept" / f"partial-step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            check_written(partial, self.write_roles(partial))
        except (OSError, RunFailed) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunFailed(f"the state of step {step} could not be kept in {final}: {error}") from error
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._kept.add(step)

    def _drop_unwanted(self) -> None:
        wanted = {self.state.best_step, self.state.good_step, *self._in_checkpoint}
        for folder in (self.folder / "kept").glob("step-*"):
            if folder.name not in {f"step-{step}" for step in wanted}:
                shutil.rmtree(folder)

    def go_back_to(self, step: int) -> None:
        """Let the trainers go on from the state of a step that was kept."""
        self.read_roles(self.folder / "kept" / f"step-{step}")
        self._went_back_to = step

    def restore_best(self) -> None:
        """Let the trainers have the best state, where that is asked for."""
        best = self.state.best_step
        if self.config.training.keep_best and best is not None and best != self.state.step:
            self.go_back_to(best)
            which = "0, with which training began" if best == 0 else str(best)
            self.progress.note(f"the final model is that of step {which}, the best validation")

    def save_model(self, **more: Any) -> Path:
        """Write the model as the trainers have it, with its tokenizer, into ``RUN/model``, and into ``RUN/model_step.json``
        as ``kept_step`` of which step it is.

        Args:
            more: what the trainer's ``save_model`` takes besides.
        """
        folder = self.write_model(self.prepared.tokenizer, **more)
        try:
            step = self.state.step if self._went_back_to is None else self._went_back_to
            (self.folder / "model_step.json").write_text(json.dumps({"kept_step": step}) + "\n")
        except OSError as error:
            raise RunFailed(f"the model could not be written into {folder}: {error}") from error
        return folder

    # -- state --------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """As of every run, until it is decided to end early."""
        if self.state.stopped:
            return
        for step in super().steps():
            yield step
            if self.state.stopped:
                self.save_checkpoint()
                return

    def save_checkpoint(self) -> None:
        """As of every run; what the checkpoint before wanted kept may go."""
        super().save_checkpoint()
        self._in_checkpoint = kept_steps(self._snapshot)
        self._drop_unwanted()

    def refresh_snapshot(self) -> None:
        """The driver's state has changed after the step: checkpoints from now on hold it."""
        self._snapshot = self.driver_state()

    def driver_state(self) -> dict[str, Any]:
        """The state, and of which data it is."""
        return {**self.state.to_dict(), "data": self.data.fingerprint}

    def restore_driver(self, stored: dict[str, Any]) -> None:
        """Go on from what `driver_state` gave.

        Raises:
            InputRefused: where the data are others.
        """
        stored = dict(stored)
        if stored.pop("data") != self.data.fingerprint:
            raise InputRefused("data.train: the examples are not those of the checkpoint; --resume needs the same data")
        self.state = OfflineState(**stored)
        self._in_checkpoint = kept_steps(stored)

    def close(self, failed: bool) -> None:
        """Close the files."""
        self.validations.close()
        super().close(failed)


def _check_content(prepared: PreparedExamples, opening: Opening) -> None:
    """What looks wrong with the data without being illegal is shown, and written to ``data_check.json``."""
    report = check_file(prepared.config.data, prepared.tokenizer, kind=data_kind(prepared.config))
    for line in report.lines():
        if line.startswith("warning"):
            opening.progress.note(line.removeprefix("warning: "), warning=True)
    (Path(prepared.config.run_dir) / "data_check.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")


@contextmanager
def launch_offline(
    config: OfflineConfig, *, resume: bool = False, console: Console | None = None
) -> Iterator[OfflineRun]:
    """Check everything, show the plan, and start all roles.

    Raises:
        InputRefused: before anything was started; or where a role refuses what it was given, or the trained role's machines don't
            share the run's folder. No run is left behind then.
        RunFailed: where a role can't come up; its own message is in it.
    """
    prepared = prepare_examples(config, resume=resume)
    render_plan(plan_rows(config, len(prepared.data.train)), console or Console())
    render_notes(memory_notes(config), console or Console())
    with ExitStack() as stack:
        opening = stack.enter_context(
            opened(config, prepared.total_steps, prepared.data.report.lines(), resume=resume, console=console)
        )
        _check_content(prepared, opening)
        opening.progress.phase("start")
        groups = stack.enter_context(started(config, offline_specs(prepared), opening.warn))
        check_shared_folder(Path(config.run_dir), groups, OfflineRun.trained)
        run = OfflineRun(prepared, groups, opening)
        stack.push(lambda kind, *_: run.close(failed=kind is not None))
        if opening.checkpoint is not None:
            run.restore(opening.checkpoint)
        if run.rollout is not None:
            assert isinstance(config, PreferenceConfig), "only preference training samples"
            connect_weights(run.policy, run.rollout, config, run.groups.placement)
        with run.kept():
            yield run
