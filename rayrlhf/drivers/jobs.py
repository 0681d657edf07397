"""What work with a finished model shares: its inputs, checked; samples in their order; files that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.text import Text

from rayrlhf.actors.reward import response_tokens
from rayrlhf.batch import Batch
from rayrlhf.cluster import Groups
from rayrlhf.config import dump_config
from rayrlhf.config.base import JobConfig
from rayrlhf.config.jobs import CritiqueConfig, SamplingConfig
from rayrlhf.data import Prompt, load_all_prompts
from rayrlhf.drivers.checks import Problems, check_lengths, check_packages, check_run_dir
from rayrlhf.drivers.dispatch import responses
from rayrlhf.drivers.experience import prompt_batch
from rayrlhf.drivers.preflight import check_signatures, check_sources, open_model
from rayrlhf.drivers.turns import Turns
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring import close_log, setup_log
from rayrlhf.monitoring.text import printable
from rayrlhf.planning.plan import check_plan

__all__ = ["PreparedJob", "Sampler", "WholeFile", "decoded", "prepare_job", "seeded", "warner", "whole_files"]

_UNFINISHED = "config.yaml.partial"
"""The configuration until all outputs have their names. Outputs beside it are those of work that was cut off."""


@dataclass(frozen=True)
class PreparedJob:
    """The inputs of sampling or critique, all checked."""

    config: SamplingConfig | CritiqueConfig
    model_path: str
    tokenizer_path: str
    tokenizer: Any
    prompts: list[Prompt]
    notes: list[str]
    """What is to be said of the prompts."""


def prepare_job(
    config: SamplingConfig | CritiqueConfig,
    problems: Problems,
    outputs: Sequence[str],
    check_prompts: Callable[[list[Prompt]], None] | None = None,
) -> PreparedJob:
    """Check everything that the work takes in, and load its prompts.

    Args:
        config: the resolved configuration.
        problems: what was found before; all is told together.
        outputs: names of the files that are written into ``config.run_dir``.
        check_prompts: refuses prompts that can't be used.

    Raises:
        InputRefused: with every problem that was found.
    """
    problems.check(check_run_dir, config, resume=False)
    problems.found += check_plan(config)
    problems.check(_check_outputs, config, outputs)
    problems.check(check_packages, config, config.rollout)
    sources = config.reward.sources if isinstance(config, SamplingConfig) else []
    if isinstance(config, SamplingConfig):
        check_sources(sources, problems, trust_remote_code=config.reward.trust_remote_code)
    policy = config.policy
    opened = open_model(
        policy.path,
        problems,
        made=Path(config.run_dir) / "base_model",
        tokenizer=policy.tokenizer,
        chat_template=policy.chat_template,
        trust_remote_code=policy.trust_remote_code,
    )
    if opened.model is not None and opened.path is not None:
        check_lengths(config, opened.path, opened.model, problems)
    loaded = None
    if opened.tokenizer is not None:
        loaded = problems.check(load_all_prompts, config.data, opened.tokenizer)
    if loaded is not None:
        check_signatures(sources, loaded[0], problems)
        if check_prompts is not None:
            problems.check(check_prompts, loaded[0])
    if problems.found:
        raise InputRefused(problems.found)
    assert opened.path is not None and opened.tokenizer_path is not None and loaded is not None
    return PreparedJob(config, opened.path, opened.tokenizer_path, opened.tokenizer, *loaded)


def _check_outputs(config: JobConfig, outputs: Sequence[str]) -> None:
    """Refuse files that are in the way, unless they are left of work that was cut off when it was all but done."""
    folder = Path(config.run_dir)
    if (folder / _UNFINISHED).exists():
        return
    there = [name for name in outputs if (folder / name).exists()]
    if there:
        raise InputRefused(f"run_dir: {folder} has {' and '.join(there)} already; choose another run_dir")


def warner(console: Console) -> Callable[[str], None]:
    """What shows a line on the terminal as a warning."""

    def warn(line: str) -> None:
        console.print(Text(printable(line, console), style="yellow"), soft_wrap=True)

    return warn


# -- samples ----------------------------------------------------------------------------------------------------


def seeded(prompts: Iterable[Prompt], samples_per_prompt: int, seed: Sequence[int]) -> Batch:
    """Prompts to be sampled, as `prompt_batch` has them; a sample's seed depends on ``seed``, its prompt's id and its index,
    and not on the prompts that it is generated with."""
    batch = Batch.concat([prompt_batch([prompt], samples_per_prompt, (*seed, prompt.id)) for prompt in prompts])
    return batch.with_columns(sample={"position": torch.arange(len(batch))})


class Sampler:
    """What answers prompts, and scores the responses where there is a reward.

    Args:
        config: of the work.
        groups: ``rollout`` and, for scores, ``reward``.
    """

    def __init__(self, config: SamplingConfig | CritiqueConfig, groups: Groups):
        self._config, self._rollout, self._reward = config, groups["rollout"], groups.get("reward")
        self._turns = Turns.of(groups, config.cluster)

    def __call__(self, prompts: Batch, **how: Any) -> Batch:
        """A response to each, in their order, with the columns of a rollout, and those of the reward.

        Args:
            prompts: as `seeded` makes them.
            how: further arguments of `RolloutEngine.generate`.
        """
        reward, config = self._reward, self._config
        at_once = reward if self._turns.together("reward", "rollout") else None
        self._turns.take({"rollout": "all"})
        running = [
            (chunk, None if at_once is None else at_once.submit("score", chunk))
            for chunk in responses(self._rollout, prompts, config.rollout, config.cluster, **how)
        ]
        batch = Batch.concat([chunk if call is None else chunk.merge(call.result()) for chunk, call in running])
        batch = batch.select(torch.argsort(batch["position"]))
        if reward is not None and at_once is None:
            self._turns.take({"reward": "weights"})
            batch = batch.merge(reward.call("score", batch))
        return batch


def decoded(batch: Batch, tokenizer: Any) -> list[str]:
    """The responses as texts, without special tokens."""
    return tokenizer.batch_decode([tokens.tolist() for tokens in response_tokens(batch)], skip_special_tokens=True)


# -- files ------------------------------------------------------------------------------------------------------


class WholeFile:
    """A file of the run's folder that has another name until all of it is there.

    Args:
        path: its name in the end.
        optional: it is only there where something was written into it.
    """

    def __init__(self, path: Path, optional: bool = False):
        self.path, self.partial, self.optional = path, path.with_name(f"{path.name}.partial"), optional
        self._file: IO[str] = open(self.partial, "w", encoding="utf-8")  # noqa: SIM115
        self._written = False

    def write(self, row: Mapping[str, Any], *, indent: int | None = None) -> None:
        """Write one JSON object, on a line of its own unless ``indent`` spreads it.

        Raises:
            RunFailed: where it can't be written.
        """
        try:
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, indent=indent) + "\n")
        except OSError as error:
            raise RunFailed(f"{self.path} could not be written: {error}") from error
        self._written = True

    def finish(self) -> None:
        """Give it its name. An optional one without content goes, and with it what is left under its name from before.

        Raises:
            RunFailed: where it can't be written.
        """
        try:
            self._file.close()
            if self.optional and not self._written:
                self.path.unlink(missing_ok=True)
            else:
                self.partial.replace(self.path)
        except OSError as error:
            raise RunFailed(f"{self.path} could not be written: {error}") from error

    def drop(self) -> None:
        """Leave nothing that isn't finished."""
        self._file.close()
        self.partial.unlink(missing_ok=True)


@contextmanager
def whole_files(config: JobConfig, names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[list[WholeFile]]:
    """Open files in the run's folder, and its log. They get their names when all has gone well, and ``config.yaml``, which
    makes the folder a run's, is the last to get its own; otherwise nothing but the log is left. Where the process was ended
    in between, ``config.yaml.partial`` says that the rest is no run's, and it is replaced the next time.

    Args:
        config: of the run.
        names: in the order in which they get their names.
        optional: further files, which are only there where something was written into them.

    Raises:
        RunFailed: where they can't be written.
    """
    folder = Path(config.run_dir)
    unfinished = folder / _UNFINISHED
    files: list[WholeFile] = []
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            setup_log(folder)
            if unfinished.exists():
                for name in names:
                    (folder / name).unlink(missing_ok=True)
            dump_config(config, unfinished)
            # One by one, so that those which could be opened are dropped where another can't.
            for name in [*names, *optional]:
                files.append(WholeFile(folder / name, name in optional))
        except OSError as error:
            raise RunFailed(f"{folder} can't be written: {error}") from error
        yield files
        _finish(files, unfinished)
    finally:
        for file in files:
            file.drop()
        unfinished.unlink(missing_ok=True)
        close_log()


def _finish(files: Sequence[WholeFile], unfinished: Path) -> None:
    """Give all files their names, or none."""
    finished: list[WholeFile] = []
    config = unfinished.with_suffix("")
    try:
        for file in files:
            file.finish()
            finished.append(file)
        unfinished.replace(config)
    except (OSError, RunFailed) as error:
        for file in finished:
            file.path.unlink(missing_ok=True)
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(f"{config} could not be written: {error}") from error
