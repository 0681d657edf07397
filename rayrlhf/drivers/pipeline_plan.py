"""What is to be done with each stage of a pipeline that may have run before: kept, gone on with, or made anew."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from rayrlhf.checkpoint import CheckpointStore
from rayrlhf.config import load_config
from rayrlhf.config.base import RunConfig
from rayrlhf.config.pipeline import Pipeline, Stage
from rayrlhf.config.pipeline_stages import nearest
from rayrlhf.drivers.pipeline_process import is_running
from rayrlhf.drivers.pipeline_state import FREE, PipelineState, Record, config_fingerprint, flat, output_fingerprint
from rayrlhf.errors import InputRefused

__all__ = ["Action", "decide"]


class Action(Enum):
    """What is done with a stage."""

    KEEP = "keep"
    """It is done."""
    RESUME = "resume"
    """It goes on from its last whole checkpoint."""
    ANEW = "anew"
    """What there is of it is moved away, and it begins from the beginning."""
    BEGIN = "begin"
    """There is nothing of it yet."""


def decide(pipeline: Pipeline, state: PipelineState, redo: Sequence[str]) -> dict[str, Action]:
    """The action for each stage.

    Raises:
        InputRefused: with every stage whose configuration or input isn't what it has run with, whose output has changed,
            that is still running, or whose folder holds what this pipeline didn't make.
    """
    problems: list[str] = []
    again = _again(pipeline, redo, problems)
    actions: dict[str, Action] = {}
    for stage in pipeline.stages:
        record = state.stages.get(stage.name, Record())
        file = Path(pipeline.config.run_dir) / f"{stage.name}.yaml"
        actions[stage.name] = Action.ANEW if stage.name in again else _action(stage, record)
        if actions[stage.name] != Action.KEEP and is_running(file):
            process = f"process {record.pid}" if record.pid is not None else f"the process that was given {file}"
            problems.append(f"stages.{stage.name}: it is still running, as {process}; end that first")
        if actions[stage.name] == Action.BEGIN:
            if stage.folder.exists() and any(stage.folder.iterdir()):
                text = f"stages.{stage.name}: {stage.folder} holds something that this pipeline didn't make; "
                problems.append(text + "move it away, or choose another run_dir")
        elif actions[stage.name] != Action.ANEW:
            found = [*_changed(stage, record, file), *_other_data(stage, record, state)]
            problems += [
                f"stages.{stage.name}: {text}; --redo {stage.name} does it and what needs it again" for text in found
            ]
    if problems:
        raise InputRefused(problems)
    return actions


def _again(pipeline: Pipeline, redo: Sequence[str], problems: list[str]) -> set[str]:
    """The stages to redo, and all that need them."""
    names = [stage.name for stage in pipeline.stages]
    for name in redo:
        if name not in names:
            problems.append(f"--redo: there is no stage {name!r}; {nearest(name, names)}")
    again = set(redo)
    for stage in pipeline.stages:  # each comes after those that it needs
        if again & set(stage.needs):
            again.add(stage.name)
    return again


def _action(stage: Stage, record: Record) -> Action:
    if record.started is None:
        return Action.BEGIN
    if record.status in ("done", "gate"):
        return Action.KEEP
    if isinstance(stage.config, RunConfig):
        checkpoint, _ = CheckpointStore(stage.folder / "checkpoints", stage.config.checkpoint.keep).latest()
        if checkpoint is not None:
            return Action.RESUME
    return Action.ANEW


def _changed(stage: Stage, record: Record, file: Path) -> list[str]:
    """What is another value now than when the stage ran, by key."""
    if record.config == config_fingerprint(stage.config):
        return []
    try:
        stored = load_config(file)
    except InputRefused as refused:
        return [f"its configuration has changed, and {file} can't be read to say how ({refused.problems[0]})"]
    before, now = (flat(c.model_dump(mode="json", exclude=set(FREE))) for c in (stored, stage.config))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key} is {now.get(key)!r}, but it ran with {before.get(key)!r}" for key in keys] or [
        f"its configuration has changed since it ran ({file} was changed too)"
    ]


def _other_data(stage: Stage, record: Record, state: PipelineState) -> list[str]:
    """Whether its output, and what it took in, are still what they were."""
    found = []
    if record.status in ("done", "gate"):
        now = output_fingerprint(stage.product)
        if now is None:
            found.append(f"{stage.product} isn't there any more")
        elif now != record.output:
            found.append(f"{stage.product} isn't what the stage made: it was changed since")
    for name, fingerprint in record.inputs.items():
        source = state.stages.get(name)
        if source is not None and source.output is not None and source.output != fingerprint:
            found.append(f"it took another output of {name} than there is now")
    return found
