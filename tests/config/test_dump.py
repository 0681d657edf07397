"""The resolved configuration, written down and read again; and the reference of all keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rayrlhf.config import Config, dump_config, load_config, to_yaml
from rayrlhf.config.fields import all_fields
from rayrlhf.config.reference import render
from rayrlhf.errors import RunFailed

ROOT = Path(__file__).parents[2]
BASE = yaml.safe_load((Path(__file__).parent / "base.yaml").read_text())

texts = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1)
tricky = st.sampled_from(
    [
        "no",
        "~",
        "null",
        "1e-5",
        "1:30",
        "- a",
        "a: b",
        "#x",
        "'",
        '"',
        "\\",
        "\u2028",
        "\x85",
        "{{x}}",
        "=",
        "0x1F",
        "12",
        " ",
    ]
)
positive = st.floats(min_value=1e-12, max_value=1e12)


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    system_prompt=st.none() | texts | tricky,
    stop=st.lists(texts | tricky),
    lr=positive,
    weight=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(0, 2**31 - 1),
    clip=st.none() | positive,
    whiten=st.booleans(),
)
def test_round_trip(tmp_path_factory, system_prompt, stop, lr, weight, seed, clip, whiten):
    tree = json.loads(json.dumps(BASE))
    tree["seed"] = seed
    tree["data"]["system_prompt"] = system_prompt
    tree["rollout"]["stop"] = stop
    tree["policy"]["optimizer"] = {"lr": lr}
    tree["policy"]["lora"] = {"target_modules": ["a", "b"]} if whiten else None
    tree["reward"]["sources"] = [{"function": "a:b", "weight": weight}, {"model": "x/y", "name": "no"}]
    tree["ppo"] |= {"clip_range_value": clip, "whiten_advantages": whiten}
    config = Config.model_validate(tree)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump_config(config, path)
    assert load_config(path) == config
    # a reader of YAML 1.1 that knows nothing of ours sees the same values
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == json.loads(config.model_dump_json())


def test_without_optional_sections(load, tmp_path):
    config = load("critic=null", "reference=null", "ppo.kl_coef=0", "ppo.advantage_estimator=rloo")
    dump_config(config, tmp_path / "d.yaml")
    assert load_config(tmp_path / "d.yaml") == config


def test_each_key_has_its_doc_above_it(load):
    lines = to_yaml(load("policy.lora={}", "critic.lora={}")).splitlines()
    for field in all_fields().values():
        assert field.doc, f"{field.key} has no doc"
    assert max(map(len, lines)) <= 120
    where = next(i for i, line in enumerate(lines) if line.strip().startswith("target_kl:"))
    assert lines[where - 1].strip() == "# KL to the reference that the adaptive controller aims at, in nats a sequence."
    keys = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(keys) == len(all_fields())


def test_a_file_that_cannot_be_written(load, tmp_path):
    with pytest.raises(RunFailed, match="can't write the configuration"):
        dump_config(load(), tmp_path / "none" / "config.yaml")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunFailed):
        dump_config(load(), tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "taken"]


def test_the_reference_is_up_to_date():
    """Write it again with ``python -m rayrlhf.config.reference > docs/configuration.md``."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == render()


def test_the_reference_has_every_key_with_its_meaning():
    page = render()
    for field in all_fields().values():
        rows = [line for line in page.splitlines() if line.startswith(f"| `{field.key}` |")]
        assert len(rows) == 1
        assert len(rows[0].replace("\\|", "").strip("| ").split(" | ")) == 4
