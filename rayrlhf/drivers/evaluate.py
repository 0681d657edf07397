"""``rayrlhf evaluate``: models side by side on the same prompts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rayrlhf.cluster import Groups
from rayrlhf.config import dump_config, source_name
from rayrlhf.config.base import ClusterConfig
from rayrlhf.config.jobs import ModelEvaluationConfig
from rayrlhf.data import Prompt
from rayrlhf.drivers.base import started
from rayrlhf.drivers.evaluate_preflight import PreparedEvaluation, prepare_evaluation
from rayrlhf.drivers.evaluate_roles import answer, model_specs, shared_specs
from rayrlhf.drivers.turns import Turns
from rayrlhf.errors import RunFailed
from rayrlhf.evaluation.answers import (
    Answers,
    Judged,
    Scores,
    compare_by_scores,
    judge_pairs,
    measures_of,
    most_frequent,
)
from rayrlhf.evaluation.report import write_report
from rayrlhf.monitoring import close_log, render_plan, setup_log
from rayrlhf.monitoring.evaluation_table import encodable, model_line, render_evaluation
from rayrlhf.monitoring.text import finite
from rayrlhf.planning.rows import plan_rows

__all__ = ["evaluate_models"]

log = logging.getLogger(__name__)


def evaluate_models(config: ModelEvaluationConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Let each model answer the prompts, measure it, compare each with each, and show and write down what came of it.

    In the run's folder: ``evaluation.json``, ``win_rates.json``, ``responses.jsonl`` (the formats are told in
    `rayrlhf.evaluation.report`), ``report.html``, ``config.yaml``, ``log.txt``. The first three and the configuration are
    written at the end, all or none: a run that broke off can be started again in its folder.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        InputRefused: before anything was started.
        RunFailed: a role failed; or all responses of a model went without a score of some kind, or no comparison got a
            verdict of the judge (what was measured without these is in the run's folder then).
    """
    console = console or Console()
    prepared = prepare_evaluation(config)
    render_plan(plan_rows(config), console)
    folder = Path(config.run_dir)
    with _logged(folder):
        for note in prepared.notes:
            _say(console, note)
        models = _all_answers(prepared, console)
        judged = _ask_judge(prepared, models, console)
        evaluation = _summary(prepared, models)
        rates = _win_rates(prepared, models, judged)
        _write(folder, prepared, evaluation, rates, list(_response_rows(prepared, models, judged)))
        write_report([folder], folder / "report.html")
    samples = list(_shown_samples(prepared, models))
    render_evaluation(evaluation, rates, samples, folder, console)
    _refuse_silence(models, judged, folder)
    return evaluation


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    try:
        setup_log(folder)
    except OSError as error:
        raise RunFailed(f"{folder} can't be written: {error}") from error
    try:
        yield
    except RunFailed as failed:
        log.error("%s", failed)
        raise
    finally:
        close_log()


def _say(console: Console, line: str, *, warning: bool = False) -> None:
    log.log(logging.WARNING if warning else logging.INFO, "%s", line)
    console.print(Text(encodable(line, console), style="yellow" if warning else ""), soft_wrap=True)


# -- the work -----------------------------------------------------------------------------------------------------------


def _all_answers(prepared: PreparedEvaluation, console: Console) -> list[Answers]:
    """Each model's answers, one model after the other; reference and scorers stay up all the while."""
    config, answers = prepared.config, []
    warn = partial(_say, console, warning=True)
    with started(config, shared_specs(prepared), warn) as shared:
        _leave_gpus(shared, config.cluster)
        for number, model in enumerate(prepared.models, start=1):
            where = f"model {number} of {len(prepared.models)}, {model.name}"
            _say(console, f"{where}: answers {len(model.prompts)} prompts")
            begun = time.monotonic()
            with started(config, model_specs(prepared, model), warn, beside=shared) as own:
                groups = {**shared, **own}
                turns = Turns(groups, own.placement, config.cluster.offload_idle)
                found = answer(prepared, model, groups, turns)
                turns.send_away(shared)  # the next model's engine comes up where they are
            _tell_unscored(found, console)
            answers.append(found)
            _say(console, f"{where}: {model_line(measures_of(found))} ({time.monotonic() - begun:.0f} s)")
    return answers


def _leave_gpus(shared: Groups, cluster: ClusterConfig) -> None:
    """Let what stays up leave the GPUs on which the first model's engine comes up."""
    if shared.placement is None or not cluster.offload_idle:
        return
    for role, group in shared.items():
        if shared.placement.sharing(role):
            group.broadcast("set_residence", level="none")


def _tell_unscored(answers: Answers, console: Console) -> None:
    """Say how many responses have no score, and why."""
    for source, scores in answers.scores.items():
        if scores.unscored:
            many = f"{scores.unscored} of {len(scores.values)} responses have no {source} score"
            line = f"{answers.name}: {many}; they are kept and marked. Mostly: {_mostly(scores)}"
            _say(console, line, warning=True)


def _mostly(scores: Scores) -> str:
    """Why responses have no score, in most cases."""
    return most_frequent([cause for cause in scores.causes if cause is not None])


def _ask_judge(prepared: PreparedEvaluation, models: Sequence[Answers], console: Console) -> list[Judged]:
    if prepared.judge is None:
        return []
    prompts = [_conversation(prompt) for prompt in prepared.models[0].prompts]
    _say(console, f"the judge {prepared.judge.model} compares the responses to {len(prompts)} prompts in both orders")
    judged = judge_pairs(prepared.judge, prompts, models)
    for one in judged:
        for line in one.verdicts.lines():
            _say(console, f"{one.a} against {one.b}: {line}", warning=True)
    return judged


def _conversation(prompt: Prompt) -> str:
    """A prompt as the judge reads it: with all its turns, where there are several."""
    turns = prompt.messages or []
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if len(turns) > 1 else prompt.text


def _refuse_silence(models: Sequence[Answers], judged: Sequence[Judged], folder: Path) -> None:
    """End the run as failed where a source gave some model no score at all, or the judge no verdict."""
    silent = [
        f"no response of {model.name} got a score from scores.{source}, {scores.unscored} of {scores.unscored} failed: "
        f"{_mostly(scores)}"
        for model in models
        for source, scores in model.scores.items()
        if not scores.known
    ]
    causes = [failure.cause for one in judged for failure in one.verdicts.failures]
    if judged and len(causes) == sum(2 * len(one.verdicts.first) for one in judged):
        silent.append(f"the judge gave no verdict on any of {len(causes)} comparisons: {most_frequent(causes)}")
    if silent:
        raise RunFailed(f"{'; '.join(silent)}. What was measured without it is in {folder}")


# -- what is written ----------------------------------------------------------------------------------------------------


def _labels(prepared: PreparedEvaluation) -> dict[str, str]:
    """How each source of scores is called as a judge of win rates."""
    return {
        named.name: f"{source_name(named.source)} (reward)" if named.name == "reward" else named.name
        for named in prepared.sources
    }


def _summary(prepared: PreparedEvaluation, models: Sequence[Answers]) -> dict[str, Any]:
    config = prepared.config
    return {
        "prompts": len(prepared.models[0].prompts),
        "seed": config.seed,
        "temperature": config.rollout.temperature,
        "reference": _reference_name(prepared),
        "scores": _labels(prepared),
        "judge": None if config.judge is None else config.judge.model,
        "models": [{"name": model.name, "path": model.path, **measures_of(model)} for model in models],
    }


def _reference_name(prepared: PreparedEvaluation) -> str:
    same = [model.name for model in prepared.models if model.path == prepared.reference_path]
    return same[0] if same else prepared.reference_path


def _win_rates(
    prepared: PreparedEvaluation, models: Sequence[Answers], judged: Sequence[Judged]
) -> list[dict[str, Any]]:
    config = prepared.config
    rows = compare_by_scores(
        models, _labels(prepared), tie=config.scores.tie, seed=config.seed, confidence=config.confidence
    )
    label = "" if config.judge is None else f"{config.judge.model} (judge)"
    return rows + [one.row(label, seed=config.seed, confidence=config.confidence) for one in judged]


def _response_rows(
    prepared: PreparedEvaluation, models: Sequence[Answers], judged: Sequence[Judged]
) -> Iterator[dict[str, Any]]:
    """``responses.jsonl``: a line a prompt."""
    for i, prompt in enumerate(prepared.models[0].prompts):
        row: dict[str, Any] = {
            "where": prompt.where,
            "prompt": prompt.text if prompt.messages is None else prompt.messages,
            "models": {model.name: _told(model, i) for model in models},
        }
        yield row | ({"verdicts": [one.of_prompt(i) for one in judged]} if judged else {})


def _told(model: Answers, i: int) -> dict[str, Any]:
    """One response of a model, with all that is known of it."""
    causes = {source: scores.causes[i] for source, scores in model.scores.items() if scores.causes[i] is not None}
    told: dict[str, Any] = {
        "response": model.responses[i],
        "tokens": model.tokens[i],
        "finish_reason": "length" if model.truncated[i] else "stop",
        "scores": {source: scores.number(i) for source, scores in model.scores.items()},
    }
    if causes:
        told["failures"] = causes
    if model.kl is not None:
        told["kl"] = finite(model.kl[i])
    if model.known_tokens[i]:
        told |= {"known_nll": finite(model.known_nll[i]), "known_tokens": model.known_tokens[i]}
    return told


def _shown_samples(prepared: PreparedEvaluation, models: Sequence[Answers]) -> Iterator[dict[str, Any]]:
    """The first prompts with every model's response, for the terminal; not picked by their scores."""
    for i, prompt in enumerate(prepared.models[0].prompts[: prepared.config.samples_shown]):
        said = [(model.name, _reward_of(model, i), model.responses[i]) for model in models]
        yield {"prompt": prompt.text, "responses": said}


def _reward_of(model: Answers, i: int) -> float | None:
    return model.scores["reward"].number(i) if "reward" in model.scores else None


def _write(
    folder: Path,
    prepared: PreparedEvaluation,
    evaluation: dict[str, Any],
    rates: list[dict[str, Any]],
    responses: list[dict[str, Any]],
) -> None:
    """All files under other names first, then renamed; the configuration last, which makes the folder a run's."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in responses)
    texts = {
        "responses.jsonl": lines,
        "win_rates.json": json.dumps(rates, ensure_ascii=False, allow_nan=False, indent=1) + "\n",
        "evaluation.json": json.dumps(evaluation, ensure_ascii=False, allow_nan=False, indent=1) + "\n",
    }
    drafts = {name: folder / f"{name}.partial" for name in texts}
    try:
        for name, text in texts.items():
            drafts[name].write_text(text, encoding="utf-8", errors="backslashreplace")
        for name, draft in drafts.items():
            draft.replace(folder / name)
        dump_config(prepared.config, folder / "config.yaml")
    except OSError as error:
        raise RunFailed(f"the results can't be written to {folder}: {error}") from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
