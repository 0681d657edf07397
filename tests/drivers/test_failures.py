"""What goes wrong is one clear message with the right exit code, and what was trained is kept."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rayrlhf.errors import InputRefused, RunFailed
from tests.drivers.runs import TinyWorld
from tests.support.tiny import save_reward_model, save_tiny_model

RAISES = "reward.sources.0.function=tests.drivers.runs:raises"


def refused(world: TinyWorld, name: str, *overrides: str) -> list[str]:
    """The problems for which a run is refused; nothing may have been written."""
    with pytest.raises(InputRefused) as caught:
        world.train(name, *overrides)
    assert not any((world.folder / name / file).exists() for file in ("config.yaml", "metrics.jsonl"))
    return caught.value.problems


def test_a_reward_that_raises_ends_the_run_and_the_last_step_is_kept(world: TinyWorld):
    # Evaluation: 2 calls, each step: 4. The 13th is in step 3; the last checkpoint by plan was that of step 2 (of every 2).
    failed = world.command("raises", RAISES, "checkpoint.every_steps=0", env={"DIES_AT_CALL": "13"})
    assert failed.returncode == 1
    assert "reward rank 0 failed in score" in failed.stderr and "KeyError: 'no such word'" in failed.stderr
    assert "tests.drivers.runs:raises" in failed.stderr and "Traceback" not in failed.stderr
    manifest = json.loads((world.folder / "raises/checkpoints/step-2/manifest.json").read_text())
    assert manifest["step"] == 2
    resumed = world.train("raises", RAISES, "checkpoint.every_steps=0", resume=True)
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4]
    whole = world.train("raises-not", RAISES)
    assert resumed.same_weights(whole)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("[0.5]", "returned 1 numbers for 4 responses"),
        ("[float('nan')] * len(responses)", "returned nan for the response"),
        ("['a'] * len(responses)", "must return one number for each response"),
        ("None", "must return one number for each response"),
    ],
)
def test_a_reward_that_returns_nonsense_is_named(world: TinyWorld, tmp_path, monkeypatch, returned: str, said: str):
    module = f"nonsense_{abs(hash(returned))}"
    (tmp_path / f"{module}.py").write_text(f"def score(prompts, responses):\n    return {returned}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunFailed) as caught:
        world.train(module, f"reward.sources.0.function={module}:score")
    assert said in str(caught.value) and f"{module}:score" in str(caught.value)


def test_a_full_disk_at_the_checkpoint_keeps_what_was_there(world: TinyWorld):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    failed = world.command("full-disk", preexec_fn=small_files)
    assert failed.returncode == 1, failed.stderr
    assert "the checkpoint of step 2 could not be written" in failed.stderr and "--resume" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list((world.folder / "full-disk/checkpoints").iterdir()) == []


def test_everything_wrong_is_listed_together(world: TinyWorld):
    problems = refused(
        world,
        "much-wrong",
        "policy.path=/nowhere/model",
        "reward.sources.0.function=json:no_such",
        "monitoring.wandb_project=x",
    )
    text = "\n".join(problems)
    assert len(problems) >= 2
    assert "/nowhere/model" in text and "json has no function 'no_such'" in text


def test_a_reward_function_that_cannot_be_imported(world: TinyWorld):
    assert "No module named 'no_such_module'" in refused(world, "x1", "reward.sources.0.function=no_such_module:f")[0]


def test_a_folder_without_config(world: TinyWorld, tmp_path):
    assert any("has no config.json" in p for p in refused(world, "x2", f"policy.path={tmp_path}"))


def _model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def _edit(file: Path, **changes) -> None:
    stored = json.loads(file.read_text())
    for key, value in changes.items():
        stored.pop(key, None) if value is None else stored.update({key: value})
    file.write_text(json.dumps(stored))


def test_a_tokenizer_without_eos(world: TinyWorld, tmp_path):
    model = _model(tmp_path)
    _edit(model / "config.json", eos_token_id=None)
    _edit(model / "generation_config.json", eos_token_id=None)
    _edit(model / "tokenizer_config.json", eos_token=None)
    assert any("no EOS token" in p for p in refused(world, "x3", f"policy.path={model}"))


def test_a_vocabulary_that_does_not_fit(world: TinyWorld, tmp_path):
    from transformers import AutoTokenizer

    model = _model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"new{i}" for i in range(10)])
    tokenizer.save_pretrained(model)
    problems = refused(world, "x4", f"policy.path={model}")
    assert any("vocabulary of 64 tokens" in p and "ids up to 73" in p for p in problems)


def test_a_chat_without_a_template(world: TinyWorld):
    assert any("chat_template" in p for p in refused(world, "x5", "data.chat_template=always"))


def test_malformed_lines_are_listed_with_their_numbers(world: TinyWorld, tmp_path):
    good = (world.folder / "prompts.jsonl").read_text().splitlines()
    good[3] = '{"prompt": "w1'
    good[10] = '{"prompt": 7}'
    (tmp_path / "bad.jsonl").write_text("\n".join(good))
    text = "\n".join(refused(world, "x6", f"data.prompts={tmp_path / 'bad.jsonl'}"))
    assert "bad.jsonl" in text and "4" in text and "11" in text


def test_more_tokens_than_the_model_reads(world: TinyWorld):
    problems = refused(
        world,
        "x7",
        "rollout.max_response_tokens=300",
        "policy.tokens_per_micro_batch=512",
        "critic.tokens_per_micro_batch=512",
    )
    assert any("reads at most 256 tokens" in p for p in problems)


def test_a_model_without_some_weights(world: TinyWorld, tmp_path):
    model = _model(tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (problem,) = refused(world, "x8", f"policy.path={model}")
    assert problem.startswith("policy: ") and "no weights for model.layers.1.mlp.up_proj" in problem


def test_a_causal_model_as_reward_model_is_refused(world: TinyWorld, tmp_path):
    assert any("labels" in p for p in refused(world, "x9", f'reward.sources=[{{"model": "{_model(tmp_path)}"}}]'))
    rewarding = save_reward_model(tmp_path / "reward", _model(tmp_path / "again"))
    done = world.train("x9", f'reward.sources=[{{"model": "{rewarding}"}}]', "ppo.steps=1")
    assert done.metrics[0]["score/std"] > 0


def test_a_disk_path_that_is_a_file(world: TinyWorld, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputRefused, match="no folder that can be written"):
        world.train("x10", f"run_dir={tmp_path / 'file' / 'run'}")


def test_vllm_is_refused_where_it_is_not_installed(world: TinyWorld, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    assert any("rollout.engine=transformers" in p for p in refused(world, "x11", "rollout.engine=vllm"))
    shutil.rmtree(world.folder / "x11", ignore_errors=True)


def test_a_start_that_is_refused_leaves_no_run_behind(world: TinyWorld, monkeypatch: pytest.MonkeyPatch):
    """Once there are enough GPUs the same command works."""

    def too_small(*_: object, **__: object) -> None:
        raise InputRefused("the cluster has 2 GPUs, the run needs 4")

    with monkeypatch.context() as patched:
        patched.setattr("rayrlhf.drivers.base.start_groups", too_small)
        assert refused(world, "x12", "ppo.steps=1") == ["the cluster has 2 GPUs, the run needs 4"]
    assert world.train("x12", "ppo.steps=1").metrics[0]["step"] == 1
