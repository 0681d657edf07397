"""``rayrlhf pipeline``: stages that feed each other, each in a process of its own; a stopped one goes on."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console

from rayrlhf.config import dump_config
from rayrlhf.config.pipeline import Pipeline, Stage
from rayrlhf.drivers.pipeline_plan import Action, decide
from rayrlhf.drivers.pipeline_process import StageProcess, end_all
from rayrlhf.drivers.pipeline_results import REPORTABLE, gate_failures, stage_result, winners
from rayrlhf.drivers.pipeline_state import PipelineState, Record, config_fingerprint, locked, output_fingerprint
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.evaluation.report import write_report
from rayrlhf.monitoring.pipeline_table import StageRow, render_pipeline, stage_ended, stage_heading

__all__ = ["run_pipeline"]

POLL_S = 0.1


def run_pipeline(pipeline: Pipeline, *, redo: Sequence[str] = (), console: Console | None = None) -> None:
    """Run what isn't done yet, then show what came of it and write ``RUN/report.html``.

    Args:
        pipeline: as `rayrlhf.config.pipeline.load_pipeline` gives it.
        redo: stages that are done again, with all that need them; what they had made is moved to ``RUN/replaced``.

    Raises:
        InputRefused: before anything was started: another pipeline is at work in the folder, or a stage that has run
            has another configuration now.
        RunFailed: where a stage failed, a gate stopped what needs it, or it was interrupted.
    """
    folder = Path(pipeline.config.run_dir)
    with locked(folder):
        state = PipelineState(folder)
        actions = decide(pipeline, state, redo)
        run = _Run(pipeline, state, actions, console or Console())
        with _terminated_as_interrupted():
            run.all()


class _Run:
    """One call of the command."""

    def __init__(self, pipeline: Pipeline, state: PipelineState, actions: Mapping[str, Action], console: Console):
        self.pipeline, self.state, self.actions, self.console = pipeline, state, actions, console
        self.folder = Path(pipeline.config.run_dir)
        self.began = time.monotonic()
        self.running: dict[str, StageProcess] = {}
        self.stamps: dict[str, int | None] = {}
        self.waiting = [stage for stage in pipeline.stages if actions[stage.name] != Action.KEEP]
        self.interrupted = False

    def all(self) -> None:
        """Every stage in its turn, and the end."""
        self._prepare()
        try:
            self._stages()
        except KeyboardInterrupt:
            self._interrupt()
        except BaseException:
            end_all(list(self.running.values()))
            raise
        rows = self._rows()
        render_pipeline(self.console, rows, self._notes(), time.monotonic() - self.began)
        if not self.interrupted:
            self._report()
        self._judge()

    # -- stages -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Move away what is made anew, and set the records of all that begins to waiting.

        A stage that goes on keeps its record until it is started: this call may end before.
        """
        for stage in self.waiting:
            if self.actions[stage.name] == Action.ANEW:
                self._replace(stage)
            if self.actions[stage.name] != Action.RESUME:
                self.state.stages[stage.name] = Record()
        self.state.write()

    def _replace(self, stage: Stage) -> None:
        """Move what a stage has made to ``replaced/NAME-K``, its configuration too."""
        if not stage.folder.exists():
            return
        home = self.folder / "replaced"
        home.mkdir(exist_ok=True)
        number = next(k for k in range(1, 10**6) if not (home / f"{stage.name}-{k}").exists())
        target = home / f"{stage.name}-{number}"
        shutil.move(stage.folder, target)
        self.console.print(f"{stage.name} begins anew; what it had made is in {target}", highlight=False)

    def _stages(self) -> None:
        while self.waiting or self.running:
            for stage in list(self.waiting):
                blocked = self._blocked(stage)
                if blocked:
                    self.waiting.remove(stage)
                    self._skip(stage, blocked)
                elif len(self.running) < self.pipeline.config.parallel_stages and self._ready(stage):
                    self.waiting.remove(stage)
                    self._start(stage)
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            for name in ended:
                stage_ended(self.console, self._row(self._settle(name)))
            if self.running and not ended:
                time.sleep(POLL_S)

    def _passed(self, name: str) -> bool:
        status = self.state.stages[name].status
        return status == "done" or status == "gate" and self.pipeline.config.gates == "note"

    def _ready(self, stage: Stage) -> bool:
        return all(self._passed(name) for name in stage.needs)

    def _blocked(self, stage: Stage) -> list[str]:
        over = ("failed", "skipped", "gate")
        still = {other.name for other in self.waiting}  # what its record says is of an earlier call
        needs = [name for name in stage.needs if name not in still and not self._passed(name)]
        return [name for name in needs if self.state.stages[name].status in over]

    def _skip(self, stage: Stage, blocked: Sequence[str]) -> None:
        why = [f"{name} {_WHY[self.state.stages[name].status]}" for name in blocked]
        record = self.state.stages[stage.name]
        record.status, record.words = "skipped", ", ".join(why)
        self.state.write()
        self.console.print(f"{stage.name}: skipped, as {record.words}", highlight=False)

    def _start(self, stage: Stage) -> None:
        record, resume = self.state.stages[stage.name], self.actions[stage.name] == Action.RESUME
        file = self.folder / f"{stage.name}.yaml"
        dump_config(stage.config, file)
        names = [one.name for one in self.pipeline.stages]
        what = stage.config.algorithm + (", going on from its last checkpoint" if resume else "")
        stage_heading(self.console, names.index(stage.name) + 1, len(names), stage.name, what)
        record.status, record.exit_code, record.words = "running", None, ""
        record.started = datetime.now().astimezone().isoformat(timespec="seconds")
        record.config = config_fingerprint(stage.config)
        record.inputs = {name: self.state.stages[name].output or "" for name in stage.needs}
        self.state.write()
        label = stage.name if self.pipeline.config.parallel_stages > 1 else None
        width = self.console.width - len(stage.name) - 3
        self.stamps[stage.name] = _stamp(stage.folder / "gates.json")
        process = StageProcess(stage.config, file, resume=resume, label=label, width=width)
        self.running[stage.name] = process
        record.pid = process.pid
        self.state.write()

    def _settle(self, name: str) -> Stage:
        """Judge a stage that has ended by its exit code and by what it has written."""
        stage = next(stage for stage in self.pipeline.stages if stage.name == name)
        process, record = self.running[name], self.state.stages[name]
        code, seconds = process.poll(), process.seconds()
        stamp = _stamp(stage.folder / "gates.json")
        status, words, output = "failed", "", None
        if code == 0:
            status = "done"
        elif code == 1 and stamp is not None and stamp != self.stamps[name] and gate_failures(stage.folder):
            status = "gate"
        else:
            words = process.last_words() or f"no words; exit code {code}"
        if status != "failed":
            output = output_fingerprint(stage.product)
            if output is None:
                status, words = "failed", f"it ended without {stage.product}"
        # Only now: whoever interrupts the reading of a large model leaves a stage that is yet to be judged.
        record.status, record.words, record.output = status, words, output
        record.exit_code, record.pid = code, None
        record.seconds += seconds
        del self.running[name]
        self.state.write()
        return stage

    def _interrupt(self) -> None:
        self.interrupted = True
        ended = {name for name, process in self.running.items() if process.poll() is not None}
        names = ", ".join(name for name in self.running if name not in ended) or "none"
        try:
            self.console.print(f"Interrupted; ending the stages under way ({names}).", highlight=False)
        finally:  # a terminal that was closed takes no more words
            end_all(list(self.running.values()))
            for name, process in list(self.running.items()):
                if name in ended or process.poll() == 0:
                    self._settle(name)
                    continue
                record = self.state.stages[name]
                record.status, record.exit_code, record.pid = "interrupted", process.poll(), None
                record.seconds += process.seconds()
            self.state.write()

    # -- the end ------------------------------------------------------------------------------------------------

    def _row(self, stage: Stage) -> StageRow:
        record = self.state.stages[stage.name]
        if record.status in ("done", "gate"):
            result = stage_result(stage)
        else:
            result = record.words.partition("\n")[0]
        seconds = record.seconds if record.started is not None else None
        # One that still counts as running was cut off in an earlier call, and its turn hasn't come in this one.
        status = "interrupted" if record.status == "running" else record.status
        return StageRow(stage.name, stage.config.algorithm, status, seconds, result)

    def _rows(self) -> list[StageRow]:
        return [self._row(stage) for stage in self.pipeline.stages]

    def _notes(self) -> list[str]:
        """What is said below the table: gates that were not passed, and who won."""
        notes = []
        for stage in self.pipeline.stages:
            status = self.state.stages[stage.name].status
            if status == "gate":
                went_on = self.pipeline.config.gates == "note"
                done = "its model was used all the same (gates: note)" if went_on else "what needs it was not run"
                notes.append(f"{stage.name}: the quality gate isn't passed; {done}")
            if status == "done" and stage.config.algorithm == "evaluation":
                notes += [f"{stage.name}: {line}" for line in winners(stage.folder)]
        return notes

    def _report(self) -> None:
        folders = [stage.folder for stage in self.pipeline.stages]
        folders = [folder for folder in folders if any((folder / name).is_file() for name in REPORTABLE)]
        if not folders:
            return
        try:
            report = write_report(folders, self.folder / "report.html")
        except InputRefused as refused:
            raise RunFailed(f"the report could not be made: {'; '.join(refused.problems)}") from refused
        self.console.print(f"The report: {report}", highlight=False)

    def _judge(self) -> None:
        """End with an error where not everything is done."""
        if self.interrupted:
            raise RunFailed("it was interrupted; the same command goes on where it stopped")
        records = {stage.name: self.state.stages[stage.name] for stage in self.pipeline.stages}
        failed = {name: record for name, record in records.items() if record.status == "failed"}
        if failed:
            told = [f"stage {name} (exit code {r.exit_code}):\n{r.words}" for name, r in failed.items()]
            skipped = sum(record.status == "skipped" for record in records.values())
            more = f"\n{skipped} more could not be run for it." if skipped else ""
            raise RunFailed("\n".join(told) + more + "\nThe same command goes on where it stopped.")
        gates = [name for name, record in records.items() if record.status == "gate"]
        if gates and self.pipeline.config.gates == "stop":
            raise RunFailed(
                f"the quality gate of {', '.join(gates)} isn't passed, and gates is stop. With gates=note it goes on with "
                "the model all the same; with another configuration and --redo NAME the stage is done again"
            )


_WHY = {"failed": "failed", "skipped": "was skipped", "gate": "didn't pass its quality gate"}


def _stamp(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM and a closed terminal are what Ctrl-C is: stages are ended in order, and the state stays whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # One that is ignored (SIGHUP under nohup) stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
