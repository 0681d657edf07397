"""Overrides: what they reach, how their values are read, and what is said of malformed ones."""

from __future__ import annotations

import pytest


def test_values_are_yaml(load):
    config = load(
        "ppo.kl_coef=1e-2",
        "rollout.stop=[END, 'x y']",
        "data.shuffle=false",
        "ppo.dual_clip=3",
        "ppo.clip_range_value=null",
    )
    assert config.ppo.kl_coef == 0.01 and config.rollout.stop == ["END", "x y"] and config.data.shuffle is False
    assert config.ppo.dual_clip == 3 and config.ppo.clip_range_value is None


def test_sections_that_the_file_lacks_are_made(load):
    config = load("policy.lora.rank=4", "policy.optimizer.lr=1e-5", "policy.lora.target_modules=[q_proj]")
    assert config.policy.lora.rank == 4 and config.policy.lora.target_modules == ["q_proj"]
    assert config.policy.optimizer.lr == 1e-5


def test_null_and_back(load):
    assert load("critic=null", "ppo.advantage_estimator=grpo").critic is None
    assert load("critic=null", "critic.ranks=2").critic.ranks == 2
    assert load("reference=null", "reference={}").reference is not None


def test_a_whole_section_is_replaced(load):
    assert load("rollout.max_num_seqs=7", "rollout={samples_per_prompt: 2}").rollout.max_num_seqs == 256


def test_elements_of_lists(load):
    config = load("reward.sources.0.weight=2", "reward.sources.0.name=mine")
    source = config.reward.sources[0]
    assert (source.function, source.weight, source.name) == ("my_rewards:score", 2.0, "mine")
    assert load("rollout.stop=[a, b]", "rollout.stop.1=c").rollout.stop == ["a", "c"]


def test_the_later_one_counts(load):
    assert load("ppo.steps=3", "ppo.steps=4").ppo.steps == 4


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Answer: briefly", "Answer: briefly"),
        ("Use #1 only", "Use #1 only"),
        ("@home", "@home"),
        ("1e-5", "1e-5"),
        ("true", "true"),
        ("a=b", "a=b"),
        ("{x}", "{x}"),
        ("'quoted: yes'", "quoted: yes"),
        ('"two\\nlines"', "two\nlines"),
        ("null", None),
    ],
)
def test_texts_are_taken_as_they_are_written(load, written, meant):
    assert load(f"data.system_prompt={written}").data.system_prompt == meant


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.kl_coef", "'ppo.kl_coef' isn't an override; write key=value, as in ppo.kl_coef=0.1"),
        ("ppo.kl_coef:0.1", "'ppo.kl_coef:0.1' isn't an override"),
        ("=0.1", "'' isn't a dotted key"),
        ("--ppo.kl_coef=0.1", "'--ppo.kl_coef' isn't a dotted key"),
        ("+ppo.kl_coef=0.1", "without spaces, dashes or signs"),
        ("ppo..kl_coef=0.1", "joined by single dots"),
        ("ppo.kl coef=0.1", "isn't a dotted key"),
        ("ppo.kl_coef=", "'ppo.kl_coef=' has no value; write ppo.kl_coef=null for nothing"),
        ("ppo.kl_coef=[1", "ppo.kl_coef: found '[1'; this isn't YAML"),
        ("ppo.kl_coef=@x", "a text that begins with %, @ or ` needs quotes"),
        ("ppo.kl_coef.x=1", "ppo.kl_coef: found a section"),
        ("ppo.steps.x=1", "ppo.steps has no keys: it is 10 (c.yaml:14)"),
        ("reward.sources.1.weight=2", "reward.sources is a list of 1; '1' isn't one of its indices (0)"),
        ("reward.sources.weight=2", "reward.sources is a list of 1; 'weight' isn't one of its indices (0)"),
        ("rollout.stop=[]", None),
        ("ppo.gama=1", "ppo.gama: there is no such key; did you mean ppo.gamma?"),
        ("gamma=1", "gamma: there is no such key; did you mean ppo.gamma?"),
        ("reward.sources.0.wieght=1", "did you mean reward.sources.0.weight?"),
        ("ppo.steps=1.5", "ppo.steps: found 1.5; legal: a whole number of at least 1"),
        ("ppo.clip_range={a: 1, a: 2}", "the key stands twice"),
        ("run_dir=\udcff", "run_dir: the value isn't UTF-8"),
    ],
)
def test_malformed_ones_are_explained(load, refused, override, words):
    if words is None:
        load(override)
        return
    problems = refused(override)
    assert problems[0].startswith("command line: ") and words in problems[0]


def test_malformed_ones_are_told_together(refused):
    assert len(refused("a", "b", "ppo.steps=x", "ppo.kl_coef=")) == 4
