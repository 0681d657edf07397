"""What every run has: a folder, metrics, checkpoints, and a count of steps that is only ever of whole ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rich.console import Console

from rayrlhf.checkpoint import Checkpoint, CheckpointStore, NotWhole, Written, check_written
from rayrlhf.cluster import Groups, RoleSpec, start_groups
from rayrlhf.config import dump_config
from rayrlhf.config.base import JobConfig, RunConfig
from rayrlhf.drivers.shared_folder import written
from rayrlhf.drivers.turns import Turns
from rayrlhf.drivers.watch import HealthWatch
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.evaluation.report import write_report
from rayrlhf.monitoring import MetricWriter, Progress, close_log, read_rows, setup_log
from rayrlhf.planning.claims import claims_of

__all__ = ["BaseRun", "DriverState", "Opening", "opened", "started"]

logger = logging.getLogger(__name__)


class DriverState(Protocol):
    """What the driver itself has to remember from step to step."""

    step: int
    """Steps that are done."""

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""


class BaseRun:
    """A run between its steps; the loops of all algorithms work with a subclass.

    Attributes:
        config: the resolved configuration.
        groups: the groups of roles, by name.
        turns: who is on the GPUs that roles share; before a role is called it is given what it needs.
        state: what a checkpoint keeps of the driver.
        progress: what the terminal shows.
        folder: the run's folder.
        report: ``report.html`` in it, once the run has ended and it was written.
    """

    timings: ClassVar[Mapping[str, Sequence[tuple[str, str]]]]
    """Which work of which roles each timing adds up."""
    trained: ClassVar[Sequence[str]]
    """Roles that a checkpoint holds."""

    config: RunConfig
    state: DriverState

    def __init__(self, opening: Opening, groups: Groups, state: DriverState, total_steps: int):
        config, resume_step = opening.config, opening.resume_step
        self.config, self.groups, self.state, self.progress = config, groups, state, opening.progress
        self.turns = Turns.of(groups, config.cluster)
        self.folder = Path(config.run_dir)
        self.report: Path | None = None
        self.total_steps = total_steps
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", config.checkpoint.keep)
        self._trainers_hold_whole_step = True
        self._saved_step = -1
        self._step_started = time.monotonic()
        self.metrics = MetricWriter(
            self.folder,
            tensorboard=config.monitoring.tensorboard,
            wandb_project=config.monitoring.wandb_project,
            config_dict=config.model_dump(mode="json"),
            resume_step=resume_step,
        )
        self.health = HealthWatch(self.folder, config.health, opening.past, resume_step)
        self._snapshot = self.driver_state()

    # -- what an algorithm's run says of itself -----------------------------------------------------------------

    def driver_state(self) -> dict[str, Any]:
        """All that a checkpoint keeps of the driver, for JSON."""
        raise TypeError("a run says what its driver remembers")

    def restore_driver(self, stored: dict[str, Any]) -> None:
        """Go on from what `driver_state` gave."""
        raise TypeError("a run says how its driver goes on")

    def after_step(self, step: int) -> None:
        """What is due after a step besides a checkpoint."""

    # -- steps --------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, counted from 1; after each, what is due then."""
        while self.state.step < self.total_steps:
            self._step_started = time.monotonic()
            self._busy()
            self.turns.take_seconds()
            step = self.state.step + 1
            yield step
            if self.state.step != step:
                raise RunFailed(f"the loop didn't finish step {step}: call run.finish_step(metrics) in each round")
            self.after_step(step)
            every = self.config.checkpoint.every_steps
            if step == self.total_steps or (every and step % every == 0):
                self.save_checkpoint()

    def count_step(self, metrics: Mapping[str, float], tokens: int | None) -> None:
        """Count a step as done: write its metrics and show it.

        Args:
            metrics: of the step; the timings are added.
            tokens: tokens of its samples.

        Raises:
            RunFailed: where the configuration ends the run for the state of its health; the step counts all the same.
        """
        step = self.state.step + 1
        total = time.monotonic() - self._step_started
        row = {**metrics, **self._timings(), "timing/total_s": total}
        if tokens is not None:
            row["tokens_per_s"] = tokens / total
        self.metrics.log(step, row)
        self.progress.step(step, row)
        self.state.step = step
        self._trainers_hold_whole_step = True
        self._snapshot = self.driver_state()
        self.health.look(step, row, self.progress)

    # -- state on disk ------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Save all that the run needs to go on from here.

        Raises:
            RunFailed: where it can't be written; earlier checkpoints stay.
        """
        step = self.state.step
        self.progress.phase("checkpoint")
        try:
            saved = self.checkpoints.save(step, self._snapshot, self.write_roles)
        except (OSError, RunFailed) as error:
            cure = "see to that" if isinstance(error, NotWhole) else "make room"
            raise RunFailed(
                f"the checkpoint of step {step} could not be written: {error}. "
                f"Earlier checkpoints are untouched; {cure}, then go on with --resume"
            ) from error
        self._saved_step = step
        self.progress.note(f"checkpoint of step {step} saved in {saved.folder}")

    def write_roles(self, folder: Path) -> list[Written]:
        """Let every trained role write its state below ``folder``.

        Returns:
            What their ranks wrote, each on its own machine: see `check_written`.
        """
        answers = self._on_trained("save", folder)
        return [file for name, found in answers.items() for file in written(self.groups[name], found, f"{name}/")]

    def read_roles(self, folder: Path) -> None:
        """Let every trained role go on from what it wrote below ``folder``."""
        self._on_trained("load", folder)

    def _on_trained(self, method: str, folder: Path) -> dict[str, list[Any]]:
        """The answers of each trained role's ranks."""
        where = folder.absolute()
        trained = {name: self.groups[name] for name in self.trained if name in self.groups}
        self.turns.take(dict.fromkeys(trained, "all"))
        calls = {name: group.broadcast_async(method, folder=str(where / name)) for name, group in trained.items()}
        return {name: call.result() for name, call in calls.items()}

    def write_model(self, tokenizer: Any, **more: Any) -> Path:
        """Write the policy as a Hugging Face folder, with its tokenizer, into ``RUN/model``.

        Args:
            more: what the trainer's ``save_model`` takes besides.

        Raises:
            RunFailed: where it can't be written, or another folder than this machine's was written.
        """
        folder, policy = self.folder / "model", self.groups["policy"]
        self.turns.take({"policy": "weights"})
        answers = policy.broadcast("save_model", folder=str(folder.absolute()), **more)
        try:
            check_written(folder, written(policy, answers[:1]))
            tokenizer.save_pretrained(folder)
        except (OSError, NotWhole) as error:
            raise RunFailed(f"the model could not be written into {folder}: {error}") from error
        return folder

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.read_roles(checkpoint.folder)
        self.restore_driver(checkpoint.state)
        self._saved_step = self.state.step
        self._snapshot = self.driver_state()
        self.progress.note(f"going on after step {self.state.step}, from {checkpoint.folder}")

    def trainers_change(self) -> None:
        """From here to the end of the step the trainers hold no whole step that could be saved."""
        self._trainers_hold_whole_step = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around the loop: after a failure outside an update the trainers hold a whole step, which is saved."""
        try:
            yield
        except BaseException as error:
            logger.error("the run ends with %s: %s", type(error).__name__, error)
            if self._trainers_hold_whole_step and self.state.step not in (0, self._saved_step):
                try:
                    self.turns.clear_for(self.trained)
                    self.save_checkpoint()
                except RunFailed as why:
                    lost = f"what was trained since the last checkpoint could not be saved: {why}"
                    self.progress.note(lost, warning=True)
            raise

    def close(self, failed: bool) -> None:
        """Close the files, and write ``report.html`` from them, however the run ended."""
        self.metrics.close(failed=failed)
        self.health.close()
        try:
            self.report = write_report([self.folder], self.folder / "report.html")
        except Exception as error:  # the run is what it is, with a report or without
            self.progress.note(f"no report.html: {type(error).__name__}: {error}", warning=True)
        else:
            self.progress.note(f"report: {self.report}")

    # -- inside -------------------------------------------------------------------------------------------------

    def _timings(self) -> dict[str, float]:
        """Seconds that roles were at work, with Ray some of them at the same time; and ``turns``, how long they waited until
        others had left the GPUs that they share."""
        busy = self._busy()
        shown = {}
        for name, work in self.timings.items():
            spent = [busy[role].get(method, 0.0) for role, method in work if role in busy]
            if spent:
                shown[f"timing/{name}_s"] = sum(spent)
        if self.turns.any:
            shown["timing/turns_s"] = self.turns.take_seconds()
        return shown

    def _busy(self) -> dict[str, dict[str, float]]:
        """Seconds at work since this was last asked, by role and method."""
        return {name: group.take_busy() for name, group in self.groups.items()}


class Opening:
    """A run's folder, opened: its configuration on disk, its log, its display, and where it goes on.

    Attributes:
        checkpoint: from which a resumed run goes on; None: from the beginning.
        resume_step: on resume, the first step that is made; lines of files which belong to later ones are removed.
        past: rows of metrics of the steps before it.
    """

    def __init__(self, config: RunConfig, resume: bool):
        self.config = config
        self.checkpoint: Checkpoint | None = None
        self.passed_over: list[str] = []
        if resume:
            store = CheckpointStore(Path(config.run_dir) / "checkpoints", config.checkpoint.keep)
            self.checkpoint, self.passed_over = store.latest()
        # Without a checkpoint, a resumed run begins again: what it had written belongs to steps that are done anew.
        self.resume_step = (0 if self.checkpoint is None else self.checkpoint.step + 1) if resume else None
        self.past = [
            row for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if row["step"] < (self.resume_step or 0)
        ]
        self.progress: Progress

    def warn(self, line: str) -> None:
        """Show a warning."""
        self.progress.note(line, warning=True)


@contextmanager
def opened(
    config: RunConfig, total_steps: int, notes: Sequence[str], *, resume: bool, console: Console | None
) -> Iterator[Opening]:
    """Make (or go on in) a run's folder, and show progress until the end.

    Args:
        notes: what is to be said first, such as what was found in the data.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(config, folder / "config.yaml")
    setup_log(folder)
    opening = Opening(config, resume)
    with ExitStack() as stack:
        stack.callback(close_log)
        opening.progress = stack.enter_context(
            Progress(
                config.monitoring.progress,
                total_steps,
                run_dir=folder,
                console=console,
                history=opening.past,
                debugging=config.cluster.executor == "inline",
            )
        )
        for line in (*notes, *opening.passed_over):
            opening.progress.note(line)
        try:
            yield opening
        except InputRefused:
            if not resume and not read_rows(folder / "metrics.jsonl"):
                # No run has begun: once the cause is mended, the same command shall work.
                (folder / "config.yaml").unlink(missing_ok=True)
                (folder / "metrics.jsonl").unlink(missing_ok=True)
            raise


@contextmanager
def started(
    config: JobConfig, specs: Sequence[RoleSpec], warn: Callable[[str], object], beside: Groups | None = None
) -> Iterator[Groups]:
    """All roles, on Ray or in this process, until the end.

    Args:
        warn: shows a line on the terminal: that machines or GPUs are waited for, and which.
        beside: groups of this configuration that are up already. They hold the GPUs of all roles that it names.

    Raises:
        InputRefused: where the roles can't be placed; what is refused while they are up is told as such.
    """
    with ExitStack() as stack:
        if config.cluster.executor == "ray":
            from rayrlhf.cluster.session import ray_session

            stack.enter_context(ray_session(config.cluster))
        groups = start_groups(
            specs,
            executor=config.cluster.executor,
            settings=config.cluster,
            claims=claims_of(config),
            beside=beside,
            tell=warn,
        )
        stack.enter_context(groups)
        try:
            yield groups
        except InputRefused as refused:
            refused.started = True
            raise
