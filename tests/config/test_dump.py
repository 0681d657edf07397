"""The resolved configuration, written down and read again; and the reference of all keys."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rayrlhf.config import ROOTS, ComparedModel, Config, dump_config, load_config, to_yaml
from rayrlhf.config.base import RunConfig
from rayrlhf.config.fields import all_fields
from rayrlhf.config.reference import render
from rayrlhf.config.roots import JOBS
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


MADE = {
    "ppo": ["policy.lora={}", "critic.lora={}", "reward.gold={function: 'a:b'}"],
    "sampling": [],
    "critique": [],
    "evaluation": [
        *["scores.safety={function: 'a:b'}", "scores.helpfulness={function: 'a:b'}"],
        "judge={url: 'http://host/v1', model: m}",
    ],
    **{
        name: ["policy.lora={}", "data.train=[{path: a}]", "data.validation=[{path: b}]"]
        for name in ("sft", "reward_model", "dpo")
    },
}
"""Sections that are null, or a text, by default."""


@pytest.mark.parametrize("algorithm", ROOTS)
def test_each_key_has_its_doc_above_it(load, bases, algorithm):
    fields = all_fields(ROOTS[algorithm])
    lines = to_yaml(load("cluster.nodes=[{}]", *MADE[algorithm], text=bases[algorithm])).splitlines()
    for field in fields.values():
        assert field.doc, f"{field.key} has no doc"
    assert max(map(len, lines)) <= 120
    where = next(i for i, line in enumerate(lines) if line.strip().startswith("call_timeout_s:"))
    assert lines[where - 1].strip() == "# Deadline, in seconds, of each call of a role."
    keys = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    second_model = len(ComparedModel.model_fields) if algorithm == "evaluation" else 0
    assert len(keys) == len(fields) + second_model
    top = [line.partition(":")[0] for line in keys if line[0].isalpha()]
    assert top[:4] == ["algorithm", "run_dir", "seed", "models" if algorithm == "evaluation" else "policy"]
    assert top[-1] == "cluster" if ROOTS[algorithm] in JOBS else top[-4:] == list(RunConfig.model_fields)[-4:]


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
    for algorithm, root in ROOTS.items():
        for field in all_fields(root).values():
            rows = [line for line in page.splitlines() if line.startswith(f"| `{field.key}` |")]
            assert all(len(row.replace("\\|", "").strip("| ").split(" | ")) == 4 for row in rows)
            marks = [re.match(r"\*([a-z_, ]+):\* ", row.replace("\\|", "").split(" | ")[3]) for row in rows]
            own = [row for row, m in zip(rows, marks, strict=True) if m is None or algorithm in m[1].split(", ")]
            assert len(own) == 1, (algorithm, field.key)
            assert field.doc.replace("``", "`").replace("|", "\\|") in own[0] or field.key == "algorithm"
