"""The nearest legal key of an unknown one."""

from __future__ import annotations

import pytest

from rayrlhf.config.fields import all_fields, choices, field_at, nearest_keys
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
    assert nearest_keys(tuple(unknown.split("."))) == meant


def test_suggestions_are_legal_keys():
    for word, keys in KEY_SYNONYMS.items():
        assert all(field_at(tuple(key.split("."))) for key in keys), word
        assert (word,) not in all_fields()
    legal = {str(choice) for field in all_fields().values() for choice in choices(field.info.annotation)}
    assert set(CHOICE_SYNONYMS.values()) <= legal
