"""The roles of an evaluation: what stays for all models, what each model has of its own, and one model's answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rayrlhf.algorithms import segment_sum
from rayrlhf.batch import Batch
from rayrlhf.cluster import Group, Pending, RoleSpec
from rayrlhf.config.derive import generated_lengths
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.data import Prompt
from rayrlhf.drivers.dispatch import responses
from rayrlhf.drivers.evaluate_preflight import PreparedEvaluation, PreparedModel
from rayrlhf.drivers.evaluation import EVALUATION
from rayrlhf.drivers.experience import prompt_batch
from rayrlhf.drivers.roles import Generator, Wanted, specs_of
from rayrlhf.drivers.turns import Level, Turns
from rayrlhf.evaluation.answers import Answers, Scores

__all__ = ["answer", "model_specs", "shared_specs"]

SCORES, REFERENCE, MODEL, ROLLOUT = "scores", "reference", "model", "rollout"


@dataclass(frozen=True)
class FrozenModel:
    """What `ReferenceModel` reads of a run's configuration: how a model is run that nothing trains."""

    reference: ModelConfig
    rollout: SamplerConfig


def shared_specs(prepared: PreparedEvaluation) -> list[RoleSpec]:
    """What stays up while the models change: the reference, and the scorers where all models share a tokenizer."""
    # A model may be the reference itself, or have no KL.
    every = max((_specs(prepared, model) for model in prepared.models), key=len)
    return [spec for spec in every if spec.name in _shared(prepared)]


def model_specs(prepared: PreparedEvaluation, model: PreparedModel) -> list[RoleSpec]:
    """What starts anew for a model: its engine, itself unless it is the reference, and scorers that read its tokens."""
    return [spec for spec in _specs(prepared, model) if spec.name not in _shared(prepared)]


def _shared(prepared: PreparedEvaluation) -> set[str]:
    first = prepared.models[0].tokenizer.get_vocab()
    same = all(model.tokenizer.get_vocab() == first for model in prepared.models[1:])
    return {REFERENCE, SCORES} if same else {REFERENCE}


def _specs(prepared: PreparedEvaluation, model: PreparedModel) -> list[RoleSpec]:
    """All roles that are up while a model answers."""
    config, measure = prepared.config, prepared.config.measure
    frozen = FrozenModel(measure, config.rollout)
    roles: list[Wanted] = []
    if prepared.sources:
        arguments = {
            "config": config.scores,
            "tokenizer_path": model.tokenizer_path,
            "sources": prepared.sources,
            "mark_failures": True,
        }
        roles.append((SCORES, "rayrlhf.actors.reward:RewardScorer", config.scores.ranks, arguments))
    models = {REFERENCE: prepared.reference_path} if any(m.no_kl is None for m in prepared.models) else {}
    if model.no_kl is not None or os.path.realpath(model.path) != os.path.realpath(prepared.reference_path):
        models[MODEL] = model.path
    for name, path in models.items():
        arguments = {"config": frozen, "model_path": path}
        roles.append((name, "rayrlhf.actors.reference:ReferenceModel", measure.ranks, arguments))
    longest = max(generated_lengths(config).values())
    paths = model.path, model.tokenizer_path
    generator = Generator(config.rollout, *paths, longest, measure.dtype, measure.trust_remote_code)
    return specs_of(roles, config, generator)


# -- what they do -------------------------------------------------------------------------------------------------------


def answer(prepared: PreparedEvaluation, model: PreparedModel, groups: Mapping[str, Group], turns: Turns) -> Answers:
    """Let a model answer every prompt once, score the responses, and measure them with the model and the reference.

    A sample's seed depends on the run's seed and the prompt's place, so that it is the same for every model. Log-probabilities
    are those of the distribution at the rollout temperature, as the responses are sampled from it; those of the known
    continuations are at temperature 1.
    """
    batch = _measured(prepared, model, groups, turns)
    own = MODEL if MODEL in groups else REFERENCE
    turns.take({own: "weights"})
    known_nll, known_tokens = _known(groups[own], model.prompts)
    texts = [
        model.tokenizer.decode(batch["tokens"][start + prompt : end].tolist(), skip_special_tokens=True)
        for (start, end), prompt in zip(batch.spans(), batch["prompt_length"].tolist(), strict=True)
    ]
    return Answers(
        name=model.name,
        path=model.path,
        responses=texts,
        tokens=(batch.lengths - batch["prompt_length"]).tolist(),
        truncated=[reason == "length" for reason in batch["finish_reason"]],
        scores={named.name: _scores(batch, named.name) for named in prepared.sources},
        kl=batch["kl"].tolist() if model.no_kl is None else None,
        no_kl=model.no_kl,
        known_nll=known_nll,
        known_tokens=known_tokens,
    )


def _measured(prepared: PreparedEvaluation, model: PreparedModel, groups: Mapping[str, Group], turns: Turns) -> Batch:
    """The responses, in the order of the prompts, with their scores and ``kl``. Who shares GPUs with the engines measures
    when these sleep, all of it at once; others do it chunk by chunk."""
    asked = {SCORES: "score"} if SCORES in groups else {}
    if model.no_kl is None:
        asked |= {role: "token_logprobs" for role in (REFERENCE, MODEL) if role in groups}
    at_once = {role: method for role, method in asked.items() if turns.together(role, ROLLOUT)}
    later = {role: method for role, method in asked.items() if role not in at_once}

    def start(samples: Batch, roles: Mapping[str, str]) -> tuple[Batch, dict[str, Pending]]:
        return samples, {role: groups[role].submit(method, samples) for role, method in roles.items()}

    config = prepared.config
    prompts = prompt_batch(model.prompts, 1, (config.seed, EVALUATION))
    first: dict[str, Level] = dict.fromkeys(at_once, "weights")
    turns.take(first | {ROLLOUT: "all"})
    running = [start(c, at_once) for c in responses(groups[ROLLOUT], prompts, config.rollout, config.cluster)]
    batch = Batch.concat([_with_measures(chunk, calls) for chunk, calls in running])
    batch = batch.select(torch.argsort(batch["position"]))
    if later:
        turns.take(dict.fromkeys(later, "weights"))
        batch = _with_measures(*start(batch, later))
    if model.no_kl is not None:
        return batch
    # Where the model is the reference, one forward stands for both.
    own = batch[f"{MODEL}_logprobs"] if MODEL in groups else batch[f"{REFERENCE}_logprobs"]
    return batch.with_columns(sample={"kl": _log_ratio(batch, own, batch[f"{REFERENCE}_logprobs"])})


def _with_measures(samples: Batch, calls: Mapping[str, Pending]) -> Batch:
    """With the columns of the scores, and ``ROLE_logprobs`` of each model."""
    for role, call in calls.items():
        found = call.result()
        if role != SCORES:
            found = Batch(samples.offsets, {f"{role}_logprobs": found["reference_logprobs"]})
        samples = samples.merge(found)
    return samples


def _log_ratio(samples: Batch, own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """k1 of each response: the sum of log p_model - log p_reference over its tokens, in nats; float64 [S]."""
    return segment_sum((own.double() - reference.double()) * samples["response_mask"], samples.offsets)


def _scores(batch: Batch, source: str) -> Scores:
    values = batch["score" if source == "reward" else source].double().tolist()
    # Only services can fail for single samples; whatever else fails ends the run.
    causes = batch[f"{source}/failure"] if f"{source}/failure" in batch else [None] * len(batch)
    return Scores(values, list(causes))


def _known(model: Group, prompts: list[Prompt]) -> tuple[list[float], list[int]]:
    """Negative log-probability of each prompt's known continuation, in nats, and its tokens; 0 of both where it has none."""
    nll, count = [0.0] * len(prompts), [0] * len(prompts)
    places = [i for i, prompt in enumerate(prompts) if prompt.completion_tokens is not None]
    places = [i for i in places if len(prompts[i].completion_tokens)]  # type: ignore[arg-type]
    if not places:
        return nll, count
    pairs = [(prompts[i].tokens, prompts[i].completion_tokens) for i in places]
    tokens = [torch.cat([prompt, known]) for prompt, known in pairs]  # type: ignore[list-item]
    masks = [torch.arange(len(t)) >= len(prompt) for t, (prompt, _) in zip(tokens, pairs, strict=True)]
    batch = Batch.from_samples({"tokens": tokens, "response_mask": masks})
    logprobs = model.call("token_logprobs", batch, temperature=1.0)["reference_logprobs"].double()
    sums = segment_sum(-logprobs * batch["response_mask"], batch.offsets).tolist()
    for place, value, mask in zip(places, sums, masks, strict=True):
        nll[place], count[place] = value, int(mask.sum())
    return nll, count
