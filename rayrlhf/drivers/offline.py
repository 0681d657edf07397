"""A run on a fixed set of examples: batches in order, validation, the best state so far, early stopping."""

from __future__ import annotations

import json
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
from rayrlhf.cluster import Group
from rayrlhf.cluster.split import split_by_tokens
from rayrlhf.config import plan_rows
from rayrlhf.config.roots import OfflineConfig
from rayrlhf.data.check import check_file
from rayrlhf.data.sampler import epoch_order
from rayrlhf.drivers.base import BaseRun, Opening, opened, started
from rayrlhf.drivers.data_check import data_kind
from rayrlhf.drivers.evaluation import EvaluationLog
from rayrlhf.drivers.offline_preflight import PreparedExamples, prepare_examples
from rayrlhf.drivers.roles import offline_specs
from rayrlhf.drivers.transfer import SYNC
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring import render_plan

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

    def __init__(self, prepared: PreparedExamples, groups: Mapping[str, Group], opening: Opening):
        self.prepared, self.data = prepared, prepared.data
        self.policy = groups["policy"]
        self.reference, self.rollout = groups.get("reference"), groups.get("rollout")
        state = OfflineState(beta=prepared.config.dpo.beta if hasattr(prepared.config, "dpo") else 0.0)
        super().__init__(opening, groups, state, prepared.total_steps)
        self.validations = EvaluationLog(self.folder / "evaluations.jsonl", opening.resume_step)
        self.first_epoch: Sequence[int] | None = None
        """Order of the first epoch, where a curriculum gives one."""

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
        return self.policy.broadcast("update", batch=batch, schedule=[list(parts)], step=self.state.step + 1, **more)[0]

    def finish_step(self, metrics: Mapping[str, float], batch: Batch) -> None:
        """Count the step as done, with its metrics."""
        epoch = (self.state.step + 1) / self.prepared.steps_per_epoch
        self.count_step({**metrics, "epoch": epoch}, batch.num_tokens)

    def validation_due(self) -> bool:
        """Whether a validation follows the step that was just done."""
        every = self.config.training.validate_every_steps or self.prepared.steps_per_epoch
        step = self.state.step
        return bool(self.data.validation) and (step % every == 0 or step == self.total_steps)

    def record(self, result: Mapping[str, Any], value: float | None, line: str) -> None:
        """Write a validation down, keep the state if it is the best so far, and decide whether to go on.

        Args:
            result: what was measured, for evaluations.jsonl.
            value: the larger, the better; None: this state is out of the question as the best.
            line: what the terminal shows.
        """
        state, training = self.state, self.config.training
        self.validations.add(state.step, dict(result))
        self.progress.note(line)
        if value is not None and (state.best_value is None or value > state.best_value):
            state.best_value, state.best_step, state.worse_in_a_row = value, state.step, 0
            if training.keep_best:
                self.keep("best")
        else:
            state.worse_in_a_row += 1
        if training.patience is not None and state.worse_in_a_row >= training.patience:
            state.stopped = True
            best = "none was any good" if state.best_step is None else f"the best is that of step {state.best_step}"
            self.progress.note(f"stopping: {state.worse_in_a_row} validations without a better one; {best}")
        self.refresh_snapshot()

    def keep(self, name: str) -> None:
        """Keep the trainers' state in ``RUN/kept/NAME``, whole or not at all."""
        final, partial = self.folder / "kept" / name, self.folder / "kept" / f"partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self.write_roles(partial)
        except (OSError, RunFailed) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunFailed(f"the state of step {self.state.step} could not be kept in {final}: {error}") from error
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def go_back_to(self, name: str) -> None:
        """Let the trainers go on from a state that was kept."""
        self.read_roles(self.folder / "kept" / name)

    def restore_best(self) -> None:
        """Let the trainers have the best state, where that is asked for."""
        best = self.state.best_step
        if self.config.training.keep_best and best is not None and best != self.state.step:
            self.go_back_to("best")
            self.progress.note(f"the final model is that of step {best}, the best validation")

    def save_model(self, **more: Any) -> Path:
        """Write the model as the trainers have it, with its tokenizer, into ``RUN/model``.

        Args:
            more: what the trainer's ``save_model`` takes besides.
        """
        folder = self.folder / "model"
        try:
            self.policy.broadcast("save_model", folder=str(folder.absolute()), **more)
            self.prepared.tokenizer.save_pretrained(folder)
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
        InputRefused: before anything was started.
        RunFailed: where a role can't come up; its own message is in it.
    """
    prepared = prepare_examples(config, resume=resume)
    render_plan(plan_rows(config, len(prepared.data.train)), console or Console())
    with ExitStack() as stack:
        opening = stack.enter_context(
            opened(config, prepared.total_steps, prepared.data.report.lines(), resume=resume, console=console)
        )
        _check_content(prepared, opening)
        opening.progress.phase("start")
        run = OfflineRun(prepared, stack.enter_context(started(config, offline_specs(prepared))), opening)
        stack.push(lambda kind, *_: run.close(failed=kind is not None))
        if opening.checkpoint is not None:
            run.restore(opening.checkpoint)
        with run.kept():
            yield run
