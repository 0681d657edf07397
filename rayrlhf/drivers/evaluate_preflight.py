"""Everything that can be known to be wrong before models are compared: models, tokenizers, scores, judge, prompts, folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayrlhf.actors.reward import NamedSource
from rayrlhf.config.jobs import ComparedModel, JudgeConfig, ModelEvaluationConfig
from rayrlhf.config.rules_evaluation import model_names
from rayrlhf.data import Prompt
from rayrlhf.data.prompts import load_all_prompts
from rayrlhf.drivers.checks import Problems, check_length, check_lengths, check_packages, check_run_dir, vocabulary
from rayrlhf.drivers.preflight import check_signatures, check_sources, open_model
from rayrlhf.errors import InputRefused
from rayrlhf.evaluation.judge import DEFAULT_TEMPLATE, OpenAIJudge
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.loading import to_model_folder
from rayrlhf.models.tokenizer import load_tokenizer
from rayrlhf.planning.plan import check_plan

__all__ = ["PreparedEvaluation", "PreparedModel", "prepare_evaluation"]


@dataclass(frozen=True)
class PreparedModel:
    """One of the models, checked, with the prompts in its own tokens."""

    name: str
    path: str
    tokenizer_path: str
    tokenizer: Any
    prompts: list[Prompt]
    """The same for all models, in the same order; tokens and template are the model's."""
    no_kl: str | None
    """Why its KL to the reference can't be measured."""


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation's inputs, all checked."""

    config: ModelEvaluationConfig
    models: list[PreparedModel]
    reference_path: str
    sources: list[NamedSource]
    judge: OpenAIJudge | None
    notes: list[str]
    """What is to be said of the prompts."""


@dataclass(frozen=True)
class _Loaded:
    """A model's tokenizer and configuration, on the way."""

    path: str
    tokenizer_path: str
    tokenizer: Any
    config: Any


def prepare_evaluation(config: ModelEvaluationConfig) -> PreparedEvaluation:
    """Check everything that an evaluation takes in, and load its prompts.

    Raises:
        InputRefused: with every problem that was found.
    """
    problems = Problems()
    problems.check(check_run_dir, config, False)
    problems.found += check_plan(config)
    problems.check(check_packages, config, config.rollout)
    sources = _sources(config)
    scorers = [named.source for named in sources]
    check_sources(scorers, problems, trust_remote_code=config.scores.trust_remote_code)
    judge = None if config.judge is None else problems.check(_judge, config.judge)
    names = model_names(config.models)
    loaded = [_load(config, index, problems) for index in range(len(names))]
    reference = _reference(config, loaded, problems)
    prompts, notes = _prompts(config, names, loaded, problems)
    if prompts:
        check_signatures(scorers, prompts[0], problems)
    if problems.found:
        raise InputRefused(problems.found)
    assert reference is not None
    models = [
        PreparedModel(name, one.path, one.tokenizer_path, one.tokenizer, mine, _no_kl(one, reference))
        for name, one, mine in zip(names, loaded, prompts, strict=True)
        if one is not None
    ]
    return PreparedEvaluation(config, models, reference.path, sources, judge, notes)


# -- scores and judge ---------------------------------------------------------------------------------------------------


def _sources(config: ModelEvaluationConfig) -> list[NamedSource]:
    """What scores, if anything does. Only the reward stands in the column ``score``; the others have one under their names."""
    scores = config.scores
    given = (("reward", scores.reward, 1.0), ("safety", scores.safety, None), ("helpfulness", scores.helpfulness, None))
    return [NamedSource(name, source, weight) for name, source, weight in given if source is not None]


def _judge(config: JudgeConfig) -> OpenAIJudge:
    template = DEFAULT_TEMPLATE if config.prompt is None else _read("judge.prompt", config.prompt)
    try:
        return OpenAIJudge(
            config.url,
            config.model,
            config.token_env,
            template,
            timeout_s=config.timeout_s,
            retries=config.retries,
            max_tokens=config.max_tokens,
        )
    except InputRefused as refused:
        found = (problem.replace("prompt_template:", "prompt:", 1) for problem in refused.problems)
        raise InputRefused(f"judge.{problem}" for problem in found) from None


def _read(key: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{key}: {path!r} can't be read: {error}") from error


# -- models -------------------------------------------------------------------------------------------------------------


def _load(config: ModelEvaluationConfig, index: int, problems: Problems) -> _Loaded | None:
    """What must be known of a model before it starts; None where it has a problem."""
    model, key, trust = config.models[index], f"models.{index}", config.measure.trust_remote_code
    before = len(problems.found)
    template = model.chat_template
    if template is not None and problems.check(_read, f"{key}.chat_template", template) is None:
        template = None
    opened = open_model(
        model.path,
        problems,
        made=Path(config.run_dir) / "converted" / f"model_{index}",
        tokenizer=model.tokenizer,
        chat_template=template,
        trust_remote_code=trust,
        role=key,
    )
    if opened.path is not None and opened.model is not None:
        check_lengths(config, opened.path, opened.model, problems)
    if len(problems.found) > before or opened.path is None or opened.tokenizer_path is None:
        return None
    return _Loaded(opened.path, opened.tokenizer_path, opened.tokenizer, opened.model)


def _reference(config: ModelEvaluationConfig, loaded: list[_Loaded | None], problems: Problems) -> _Loaded | None:
    """The reference; where it is one of the models, with that one's tokenizer."""
    if config.reference is None:
        return loaded[0]
    for model, one in zip(config.models, loaded, strict=True):
        if os.path.realpath(model.path) == os.path.realpath(config.reference):
            return one
    before = len(problems.found)
    path = problems.check(to_model_folder, config.reference, Path(config.run_dir) / "converted" / "reference")
    if path is None:
        return None
    trust = config.measure.trust_remote_code
    tokenizer = problems.check(load_tokenizer, path, trust_remote_code=trust)
    found = problems.check(load_model_config, path, trust_remote_code=trust)
    if found is not None:
        check_lengths(config, path, found, problems)
    return _Loaded(path, path, tokenizer, found) if len(problems.found) == before else None


def _no_kl(model: _Loaded, reference: _Loaded) -> str | None:
    """Why the reference can't read a model's tokens."""
    mine, its = vocabulary(model.config), vocabulary(reference.config)
    if mine != its:
        return f"its vocabulary has {mine} tokens, that of the reference {its}"
    if model.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        return "its tokens are not those of the reference"
    return None


# -- prompts ------------------------------------------------------------------------------------------------------------


def _prompts(
    config: ModelEvaluationConfig, names: list[str], loaded: list[_Loaded | None], problems: Problems
) -> tuple[list[list[Prompt]], list[str]]:
    """Each model's prompts: those that are usable with every one of them, in the order of the file. And what to say of them."""
    made: dict[tuple[str, str | None], tuple[list[Prompt], list[str]]] = {}
    ways = [_way(model, one) for model, one in zip(config.models, loaded, strict=True)]
    for way, one in zip(ways, loaded, strict=True):
        if one is not None and way not in made:
            column = config.data.completion_column
            found = problems.check(load_all_prompts, config.data, one.tokenizer, completion_column=column)
            if found is None:
                return [], []
            made[way] = found
    if any(way not in made for way in ways):
        return [], []
    everywhere = set.intersection(*({prompt.where for prompt in prompts} for prompts, _ in made.values()))
    notes = list(dict.fromkeys(line for _, lines in made.values() for line in lines))
    if len(notes) > 1:
        notes = [f"{name}: {line}" for name, way in zip(names, ways, strict=True) for line in made[way][1]]
    if not everywhere:
        problems.found.append(f"data.prompts: {config.data.prompts} has no prompt that fits every model")
        return [], notes
    most = max(len(prompts) for prompts, _ in made.values())
    if len(everywhere) < most:
        notes.append(f"{most - len(everywhere)} prompts don't fit every model, and are left out for all")
    kept = {way: [p for p in prompts if p.where in everywhere] for way, (prompts, _) in made.items()}
    numbered = {way: [replace(p, id=place) for place, p in enumerate(prompts)] for way, prompts in kept.items()}
    for one, way in zip(loaded, ways, strict=True):
        if one is not None:
            _check_known(one, numbered[way], problems)
    return [numbered[way] for way in ways], notes


def _way(model: ComparedModel, one: _Loaded | None) -> tuple[str, str | None]:
    """What a model's prompts depend on."""
    return (model.path if one is None else one.tokenizer_path, model.chat_template)


def _check_known(model: _Loaded, prompts: list[Prompt], problems: Problems) -> None:
    """Whether the model reads each prompt with its known continuation."""
    known = [(len(p.tokens) + len(p.completion_tokens), p.where) for p in prompts if p.completion_tokens is not None]
    if known:
        longest, where = max(known)
        problems.check(check_length, f"{where}: prompt and completion together", longest, model.path, model.config)
