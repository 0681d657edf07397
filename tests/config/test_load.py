"""Ways to get a configuration wrong, and what the user is told; and ways that only look wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from rayrlhf.config import ROOTS, load_config
from rayrlhf.config.fields import all_fields, choices, kinds
from rayrlhf.errors import InputRefused

ROOT = Path(__file__).parents[2]
BASE = (Path(__file__).parent / "base.yaml").read_text()

# what is appended to or replaced in BASE -> the one problem, whole
WRONG = {
    "misspelt key": (
        BASE + "  kl_coeff: 0.1\n",
        "c.yaml:17: ppo.kl_coeff: there is no such key; did you mean ppo.kl_coef?",
    ),
    "key of another section": (
        BASE + "gamma: 0.9\n",
        "c.yaml:17: gamma: there is no such key; did you mean ppo.gamma?",
    ),
    "key of a neighbouring section": (
        BASE + "  temperature: 0.9\n",
        "c.yaml:17: ppo.temperature: there is no such key; did you mean rollout.temperature?",
    ),
    "misspelt section": (
        BASE.replace("policy:", "polcy:"),
        "c.yaml:2: polcy: there is no such key; did you mean policy?",
    ),
    "another trainer's word": (
        BASE.replace("  path: models/tiny", "  path: models/tiny\n  learning_rate: 1e-5"),
        "c.yaml:4: policy.learning_rate: there is no such key; did you mean policy.optimizer.lr?",
    ),
    "dashes": (
        BASE.replace("minibatch_samples", "minibatch-samples"),
        "c.yaml:16: ppo.minibatch-samples: there is no such key; did you mean ppo.minibatch_samples?",
    ),
    "nothing near": (
        BASE + "checkpoint:\n  xyzzy: 1\n",
        "c.yaml:18: checkpoint.xyzzy: there is no such key; legal in checkpoint: every_steps, keep",
    ),
    "dotted key in the file": (
        BASE + "cluster.device: cuda\n",
        "c.yaml:17: cluster.device: dotted keys are for the command line; write it nested, cluster: and below it"
        " device:",
    ),
    "key twice": (
        BASE + "  steps: 20\n",
        "c.yaml:17: ppo.steps: the key stands twice, first at c.yaml:14; remove one",
    ),
    "missing key": (
        BASE.replace("  steps: 10\n", ""),
        "c.yaml:13: ppo.steps: is missing; legal: a whole number of at least 1 (Rollout-and-update rounds of the whole"
        " run)",
    ),
    "missing section": (
        BASE.replace("policy:\n  path: models/tiny\n", ""),
        "c.yaml: policy: is missing; legal: a section with keys such as path, tokenizer, chat_template (The model that"
        " is"
        " trained)",
    ),
    "word for a number": (
        BASE.replace("10", "ten"),
        "c.yaml:14: ppo.steps: found the text 'ten'; legal: a whole number of at least 1",
    ),
    "fraction for a whole number": (
        BASE.replace("10", "10.5"),
        "c.yaml:14: ppo.steps: found 10.5; legal: a whole number of at least 1",
    ),
    "truth value for a number": (
        BASE.replace("10", "true"),
        "c.yaml:14: ppo.steps: found true; legal: a whole number of at least 1",
    ),
    "truth value for a real number": (
        BASE + "  kl_coef: false\n",
        "c.yaml:17: ppo.kl_coef: found false; legal: a number of at least 0",
    ),
    "out of range": (
        BASE + "  gamma: 1.5\n",
        "c.yaml:17: ppo.gamma: found 1.5; legal: a number from 0 to 1",
    ),
    "percent": (
        BASE + "  clip_range: 20%\n",
        "c.yaml:17: ppo.clip_range: found the text '20%'; legal: a number above 0 and below 1; write a share as a"
        " number,"
        " 0.2 for 20%",
    ),
    "decimal comma": (
        BASE + "  kl_coef: 0,05\n",
        "c.yaml:17: ppo.kl_coef: found the text '0,05'; legal: a number of at least 0; the decimal sign is a point, and"
        " thousands are not separated (or by _)",
    ),
    "unit": (
        BASE + "cluster:\n  call_timeout_s: 30min\n",
        "c.yaml:18: cluster.call_timeout_s: found the text '30min'; legal: a number above 0; write the number alone:"
        " the"
        " key has a fixed unit",
    ),
    "not a number": (
        BASE + "  kl_coef: .nan\n",
        "c.yaml:17: ppo.kl_coef: found .nan; legal: a number of at least 0",
    ),
    "infinite": (
        BASE + "  importance_sampling_cap: .inf\n",
        "c.yaml:17: ppo.importance_sampling_cap: found .inf; legal: a number of at least 1, or null",
    ),
    "unknown choice": (
        BASE + "  advantage_estimator: reinforce\n",
        "c.yaml:17: ppo.advantage_estimator: found the text 'reinforce'; legal: one of gae, rloo, grpo",
    ),
    "choice with another name": (
        BASE.replace("  path: models/tiny", "  path: models/tiny\n  dtype: bf16"),
        "c.yaml:4: policy.dtype: found the text 'bf16'; legal: one of float32, bfloat16; did you mean bfloat16?",
    ),
    "Python's None for a section": (
        BASE + "critic: None\n",
        "c.yaml:17: critic: found the text 'None'; legal: a section with keys such as path, num_layers, or null; YAML's"
        " word for nothing is null, without quotes",
    ),
    "Python's None for a text": (
        BASE.replace("prompts: prompts.jsonl", "prompts: prompts.jsonl\n  eval_prompts: None"),
        "c.yaml:9: data.eval_prompts: found the text 'None'; legal: a text that isn't empty, or null; YAML's word for"
        " nothing is null, without quotes",
    ),
    "truth value for a section": (
        BASE.replace("  path: models/tiny", "  path: models/tiny\n  lora: true"),
        "c.yaml:4: policy.lora: found true; legal: a section with keys such as rank, alpha, target_modules, or null;"
        " give its keys, indented below it, or policy.lora.KEY=VALUE on the command line",
    ),
    "section without content": (
        BASE + "reference:\n",
        "c.yaml:17: reference: found nothing (null); legal: a section with keys such as path, or null; are the lines"
        " below it not indented? Write {} for the defaults, null to do without it",
    ),
    "section for a list": (
        BASE.replace("    - function", "      function"),
        "c.yaml:5: reward.sources: found a section with the keys function; legal: a list of at least one of sections;"
        " put"
        " '- ' before the first key to make it a list of one",
    ),
    "text for a list": (
        BASE + "evaluation: {}\n".replace("evaluation: {}", "critic: {lora: {target_modules: q_proj}}"),
        "c.yaml:17: critic.lora.target_modules: found the text 'q_proj'; legal: a list of at least one of texts, or"
        " all-linear; write [q_proj]",
    ),
    "wrong element": (
        BASE.replace("rollout:", "rollout:\n  stop: [END, '']"),
        "c.yaml:11: rollout.stop.1: found the text ''; legal in rollout.stop: a list of texts",
    ),
    "empty list": (
        BASE.replace("sources:\n    - function: my_rewards:score", "sources: []"),
        "c.yaml:5: reward.sources: found the list []; legal: a list of at least one of sections",
    ),
    "three betas": (
        BASE.replace("  path: models/tiny", "  path: models/tiny\n  optimizer:\n    betas: [0.9, 0.95, 0.99]"),
        "c.yaml:5: policy.optimizer.betas: found the list [0.9, 0.95, 0.99]; legal: a list of 2: each a number of at"
        " least 0 and below 1",
    ),
    "variable in a path": (
        BASE.replace("runs/test", "${HOME}/runs"),
        "c.yaml:1: run_dir: found the text '${HOME}/runs'; variables are not filled in: write the path itself, or let"
        " the shell do it",
    ),
    "lone tilde": (
        BASE.replace("runs/test", "~"),
        "c.yaml:1: run_dir: found nothing (null); legal: a text that isn't empty; a lone ~ is null in YAML",
    ),
    "Python tag": (
        BASE + "  kl_coef: !!python/float 0.1\n",
        "c.yaml:17: ppo.kl_coef: the YAML tag 'tag:yaml.org,2002:python/float' isn't legal here; write the plain value",
    ),
    "key that is a list": (
        BASE + "? [a, b]\n: 1\n",
        "c.yaml:17: a key is a list or a mapping; keys are plain words (a text in {{...}} needs quotes)",
    ),
    "value that holds itself": (
        BASE + "critic: &a\n  lora: *a\n",
        "c.yaml:18: critic.lora: an alias (*name) refers to the value that it stands in",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_is_told_once_and_plainly(case, refused):
    text, expected = WRONG[case]
    assert refused(text=text) == [expected]


# text of the file -> the one problem: nothing else can be checked
UNREADABLE = {
    "empty": (b"", "c.yaml: the file is empty;"),
    "comments only": (b"# nothing\n", "c.yaml: the file is empty;"),
    "a list": (b"- a\n- b\n", "c.yaml:1: the file holds a list where 'key: value' lines are needed"),
    "a text": (b"\nhello\n", "c.yaml:2: the file holds the text 'hello' where"),
    "tab": (b"policy:\n\tpath: x\n", "c.yaml:2: a tab stands at column 1; YAML is indented with spaces only"),
    "not UTF-8": (b"a: 1\nb: \xff\n", "c.yaml:2: byte 0xff isn't UTF-8; save the file as UTF-8"),
    "UTF-16": ("run_dir: a\n".encode("utf-16"), "c.yaml: the file is UTF-16; save it as UTF-8"),
    "colon in a text": (
        b"a: 1\nb: You are: kind\n",
        "c.yaml:2: this isn't YAML, found 'b: You are: kind': a ':' stands",
    ),
    "indentation": (b"a:\n    b: 1\n  c: 2\n", "c.yaml:3: this isn't YAML, found 'c: 2': this line's indentation fits"),
    "missing colon": (b"a: 1\nb 2\nc: 3\n", "c.yaml:2: this isn't YAML, found 'b 2': a key needs a ':'"),
    "open bracket": (b"a: [1, 2\nb: 3\n", "c.yaml:1: this isn't YAML, found 'a: [1, 2': a bracket isn't closed"),
    "open quote": (
        b"b: 3\na: 'x\nb: 3\n",
        "c.yaml:2: this isn't YAML, found \"a: 'x\": a quote or bracket isn't closed",
    ),
    "at sign": (b"a: @b\n", "c.yaml:1: this isn't YAML, found 'a: @b': a text that begins with %, @ or ` needs quotes"),
    "alias of nothing": (b"a: *b\n", "c.yaml:1: this isn't YAML, found 'a: *b': *name refers to"),
    "backslash": (b'a: "C:\\data"\n', "c.yaml:1: this isn't YAML"),
    "control character": (b"a: 1\nb: \x01\n", "c.yaml:2: the character '\\x01' isn't legal in YAML"),
    "two documents": (b"a: 1\n---\nb: 1\n", "the file holds several documents"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_configuration(case, tmp_path):
    content, expected = UNREADABLE[case]
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(InputRefused) as caught:
        load_config(path)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value).replace(str(path), "c.yaml")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputRefused, match="there is no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputRefused, match="this is a folder"):
        load_config(tmp_path)


def test_all_problems_together_in_the_order_of_the_file(refused):
    text = BASE.replace("steps: 10", "steps: ten") + "  kl_coef: -1\n  gama: 2\nfoo: 1\n"
    problems = refused("rollout.temperature=0", "ppo.lamb", "rollout.max_response_tokens=9000", text=text)
    assert [problem.split(": ")[0:2] for problem in problems] == [
        ["c.yaml:14", "ppo.steps"],
        ["c.yaml:17", "ppo.kl_coef"],
        ["c.yaml:18", "ppo.gama"],
        ["c.yaml:18", "ppo.gamma"],  # its value is checked under the name that was meant
        ["c.yaml:19", "foo"],
        ["command line", "'ppo.lamb' isn't an override; write key=value, as in ppo.kl_coef=0.1"],
        ["command line", "rollout.temperature"],
        # rules on the other keys are applied too; each is named where one of its keys is given
        ["command line", "policy.tokens_per_micro_batch"],
        ["command line", "critic.tokens_per_micro_batch"],
        ["command line", "reference.tokens_per_micro_batch"],
    ]


def test_a_rule_about_an_illegal_key_says_nothing(refused):
    assert len(refused("ppo.minibatch_samples=0")) == 1
    assert len(refused("ppo.prompts_per_step=x", "ppo.minibatch_samples=7")) == 1
    problems = refused("reward.sources.0=hello", "ppo.minibatch_samples=7")
    assert [problem.split(": ")[1] for problem in problems] == ["reward.sources.0", "ppo.minibatch_samples"]


def test_a_misplaced_key_silences_rules_about_the_key_that_was_meant(refused):
    """samples_per_prompt stands in the wrong section, so its default 1 isn't what the user wants."""
    text = BASE.replace("  samples_per_prompt: 4\n", "") + "  samples_per_prompt: 4\n"
    assert refused("ppo.advantage_estimator=rloo", "critic=null", text=text) == [
        "c.yaml:16: ppo.samples_per_prompt: there is no such key; did you mean rollout.samples_per_prompt?"
    ]


@pytest.mark.parametrize("algorithm", ROOTS)
def test_every_key_refuses_what_pydantic_refuses_in_plain_words(refused, bases, algorithm):
    """One load for each odd value, given to all keys at once; pydantic alone says for each key whether it is legal."""
    text = bases[algorithm].replace("train: examples.jsonl", "train: [{path: a}]\n  validation: [{path: b}]")
    leaves = [field for field in all_fields(ROOTS[algorithm]).values() if field.section is None]
    odd = {"-3": -3, "0": 0, "7.5": 7.5, "1000000": 1000000, "xyz": "xyz", "[1, 2]": [1, 2], "{a: 1}": {"a": 1}}
    for written, value in odd.items():
        problems = refused("cluster.nodes=[{}]", *[f"{field.key}={written}" for field in leaves], text=text)
        told = {problem.split(": ")[1] for problem in problems}
        for field in leaves:
            key_told = any(name == field.key or name.startswith(field.key + ".") for name in told)
            only_text = kinds(field.info.annotation) <= {str, None} and not choices(field.info.annotation)
            if only_text or field.key == "rollout.stop":
                continue  # texts are taken as they are written
            annotation = field.info.rebuild_annotation()
            try:
                TypeAdapter(annotation, config={"allow_inf_nan": False}).validate_python(value)
            except ValidationError:
                assert key_told, f"{field.key}={written} wasn't refused"
        for problem in problems:
            assert not re.search(r"pydantic|type=|https?://\w|Input should|Field required|NoneType|<class", problem), (
                problem
            )
            assert "legal" in problem


def test_what_looks_wrong_and_works(load):
    text = BASE.replace(
        "  path: models/tiny", "  path: models/tiny\n  optimizer: {lr: 1e-5, eps: '1e-7', betas: [0, .99]}"
    )
    text = text.replace("  max_prompt_tokens: 64", "  max_prompt_tokens: 6_4\n  shuffle: no\n  prompt_column: 2023")
    config = load(
        "cluster.call_timeout_s=1e3", "evaluation.prompts=010", "seed=0x1F", text="\ufeff" + text + "  kl_coef: 2e-2\n"
    )
    assert config.policy.optimizer.lr == 1e-5 and config.policy.optimizer.eps == 1e-7
    assert config.policy.optimizer.betas == (0.0, 0.99)
    assert config.data.max_prompt_tokens == 64 and config.data.shuffle is False and config.data.prompt_column == "2023"
    assert (
        config.ppo.kl_coef == 0.02
        and config.cluster.call_timeout_s == 1000
        and config.evaluation.prompts == 10
        and config.seed == 31
    )


def test_yaml_keeps_texts_that_look_like_other_things(load):
    text = BASE.replace("runs/test", "2024-01-01").replace("prompts: prompts.jsonl", "prompts: a/b\n  subset: no")
    config = load(text=text)
    assert config.run_dir == "2024-01-01" and config.data.subset == "no"


def test_anchors_and_merge_keys(load):
    text = BASE.replace("  path: models/tiny", "  path: models/tiny\n  optimizer: &o {lr: 2e-5, warmup_steps: 2}")
    config = load(text=text + "critic:\n  optimizer:\n    <<: *o\n    lr: 3e-5\n")
    assert config.critic.optimizer.lr == 3e-5 and config.critic.optimizer.warmup_steps == 2


def test_home_folder(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load("run_dir=~/runs").run_dir == "/home/someone/runs"


def test_importing_and_loading_stay_light(tmp_path):
    """Neither torch nor Ray nor vLLM (nor numpy) is imported, not even by loading a configuration."""
    (tmp_path / "c.yaml").write_text(BASE)
    code = (
        "import sys, rayrlhf.config as c; assert 'pydantic' not in sys.modules; import rayrlhf.planning.rows as r;"
        " r.plan_rows(c.load_config(sys.argv[1]));"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'numpy', 'datasets', 'deepspeed'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.yaml")], check=True, env=env, cwd=tmp_path, timeout=60
    )
