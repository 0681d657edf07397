"""The nearest legal key of an unknown one."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config import ROOTS
from rayrlhf.config.fields import all_fields, choices, element_of, field_at, nearest_keys
from rayrlhf.config.words import CHOICE_SYNONYMS, KEY_SYNONYMS


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("gamma", ["ppo.gamma"]),
        ("ppo.Gamma", ["ppo.gamma"]),
        ("ppo.klCoef", ["ppo.kl_coef"]),
        ("ppo.clip-range", ["ppo.clip_range"]),
        ("ppo.samples_per_prompt", ["rollout.samples_per_prompt"]),
        ("rollout.steps", ["ppo.steps"]),
        ("lr", ["policy.optimizer.lr", "critic.optimizer.lr"]),
        ("critic.lr", ["critic.optimizer.lr"]),
        ("policy.rank", ["policy.ranks", "policy.lora.rank"]),
        ("policy.optimiser", ["policy.optimizer"]),
        ("polciy", ["policy"]),
        ("rollout.max_tokens", ["rollout.max_response_tokens"]),
        ("max_new_tokens", ["rollout.max_response_tokens"]),
        ("ppo.mini_batch_size", ["ppo.minibatch_samples"]),
        ("policy.learning_rate", ["policy.optimizer.lr"]),
        ("learning_rate", ["policy.optimizer.lr", "critic.optimizer.lr"]),
        ("ppo.cliprange", ["ppo.clip_range"]),
        ("ppo.lambda", ["ppo.lam"]),
        ("ppo.init_kl_coef", ["ppo.kl_coef"]),
        ("output_dir", ["run_dir"]),
        ("actor", ["policy"]),
        ("tempreature", ["rollout.temperature"]),
        ("reward.sources.3.fucntion", ["reward.sources.3.function"]),
        ("rollout.gpu_memory_utilization", ["rollout.gpu_memory_fraction"]),
        ("policy.lora.r", ["policy.lora.rank"]),
        ("critic.lora_rank", ["critic.lora.rank"]),
        ("executor", ["cluster.executor"]),
        ("xyzzy", []),
    ],
)
def test_nearest_keys(unknown, meant):
    assert nearest_keys(tuple(unknown.split(".")), ROOTS["ppo"]) == meant


@pytest.mark.parametrize(
    ("algorithm", "unknown", "meant"),
    [
        ("dpo", "gamma", ["dpo.simpo_margin"]),
        ("dpo", "loss_type", ["dpo.loss"]),
        ("dpo", "beta", ["dpo.beta"]),
        ("dpo", "dpo.kl_coef", ["dpo.beta"]),
        ("dpo", "max_length", ["data.max_tokens"]),
        ("sft", "data.trian", ["data.train"]),
        ("sft", "data.train.2.wieght", ["data.train.2.weight"]),
        ("sft", "num_train_epochs", ["training.epochs"]),
        ("sft", "learning_rate", ["policy.optimizer.lr"]),
        ("sft", "dataset", ["data.train"]),
        ("sft", "training.patients", ["training.patience"]),
        ("reward_model", "normalise", ["reward_model.normalize"]),
        ("reward_model", "center_rewards_coefficient", ["reward_model.center_coef"]),
    ],
)
def test_nearest_keys_of_an_algorithm(algorithm, unknown, meant):
    assert nearest_keys(tuple(unknown.split(".")), ROOTS[algorithm]) == meant


def test_a_key_that_is_not_misspelt():
    """Another algorithm's key isn't taken for a neighbour that is written much like it."""
    assert nearest_keys(("ppo",), ROOTS["dpo"]) == ["dpo"]
    assert nearest_keys(("ppo",), ROOTS["dpo"], misspelt=False) == []


def elements(annotation: Any) -> list[Any]:
    """The choices of an annotation, and of the elements of its lists."""
    element = element_of(annotation)
    return choices(annotation) + (choices(element) if element is not None else [])


def test_suggestions_are_legal_keys():
    for word, keys in KEY_SYNONYMS.items():
        assert all(any(field_at(tuple(key.split(".")), root) for root in ROOTS.values()) for key in keys), word
        # the word itself is no legal key where one of its suggestions is
        for key in keys:
            assert not any((word,) in all_fields(r) and field_at(tuple(key.split(".")), r) for r in ROOTS.values()), (
                word
            )
    fields = [field for root in ROOTS.values() for field in all_fields(root).values()]
    legal = {str(choice) for field in fields for choice in elements(field.info.annotation)} | set(ROOTS)
    assert set(CHOICE_SYNONYMS.values()) <= legal
