"""Rewards: functions and what they may return, reward models, their weighted sum."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.actors.reward import NamedSource, RewardFunction, RewardScorer
from rayrlhf.batch import Batch
from rayrlhf.config.schema import ScorerProcesses, ScoreSource
from rayrlhf.drivers.roles import reward_sources
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.tokenizer import load_tokenizer
from rayrlhf.serving import RewardServer
from tests.models.making import LENGTHS, PROMPTS, alone, config_of, ragged_tokens
from tests.serving.misbehaving import Misbehaving, Reply

FUNCTIONS = """
import math

def longest(prompts, responses):
    return [len(r.split()) + 100 * len(p) for p, r in zip(prompts, responses)]

def tensor(prompts, responses):
    import torch
    return torch.arange(len(responses))

def raises(prompts, responses):
    return [1 / 0 for _ in responses]

def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)

def nan_for_one(prompts, responses):
    return [math.nan if i == 2 else 1.0 for i in range(len(responses))]

def too_large(prompts, responses):
    return [1e300 for _ in responses]

def words(prompts, responses):
    return ["good" for _ in responses]

def none(prompts, responses):
    return None

def nones(prompts, responses):
    return [None for _ in responses]

def with_answer(prompts, responses, answer):
    return answer

def with_all(prompts, responses, **columns):
    assert sorted(columns) == ["answer", "other"], sorted(columns)
    return [a + o for a, o in zip(columns["answer"], columns["other"])]

NOT_A_FUNCTION = 3
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_under_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "rewards_under_test"


def samples(**extra: Any) -> Batch:
    """Eight samples with prompt texts "p", "pp", ...; the tokens 3 to 63 are the words w0 to w60."""
    tokens, masks = ragged_tokens()
    return Batch.from_samples(
        {"tokens": tokens, "response_mask": masks},
        {"prompt_length": torch.tensor(PROMPTS), "prompt_text": ["p" * (i + 1) for i in range(8)], **extra},
    )


def function(path: str, llama: Path) -> RewardFunction:
    return RewardFunction(path, "name", load_tokenizer(str(llama)))


def test_a_function_gets_texts(functions: str, llama: Path) -> None:
    """All of the response, masked parts included, without special tokens."""
    batch = samples()
    end = batch.offsets[1:] - 1
    tokens = batch["tokens"].clone()
    tokens[end[0]] = 2  # EOS, which isn't in the text
    found = function(f"{functions}:longest", llama).score(batch.with_columns({"tokens": tokens}))
    expected = [n - p + 100 * (i + 1) for i, (n, p) in enumerate(zip(LENGTHS, PROMPTS, strict=True))]
    expected[0] -= 1
    assert found.dtype == torch.float32 and found.tolist() == expected
    assert function(f"{functions}:tensor", llama).score(batch).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"raises raised ZeroDivisionError: division by zero \(.*rewards_under_test.py:\d+\)"),
        ("too_few", "too_few returned 7 numbers for 8 responses"),
        ("nan_for_one", "nan_for_one returned nan for the response '.*w"),
        ("too_large", "too_large returned 1e[+]300 for the response"),
        ("words", "words must return one number for each response, not list: could not convert .*'good'"),
        ("none", "none must return one number for each response, not NoneType"),
        ("nones", "nones must return one number for each response"),
        ("with_answer", "with_answer raised TypeError: .*'answer'"),
    ],
)
def test_what_a_function_must_not_do(functions: str, llama: Path, name: str, message: str) -> None:
    with pytest.raises(RunFailed, match=message) as caught:
        function(f"{functions}:{name}", llama).score(samples())
    assert f"{functions}:{name}" in str(caught.value)


def test_a_function_that_is_not_there(functions: str, llama: Path) -> None:
    with pytest.raises(InputRefused, match="importing nowhere_at_all fails: ModuleNotFoundError"):
        function("nowhere_at_all:f", llama)
    for name in ("longst", "NOT_A_FUNCTION"):
        with pytest.raises(InputRefused, match=f"no function '{name}'; it has: .*longest"):
            function(f"{functions}:{name}", llama)


def test_further_columns_go_by_the_signature(functions: str, llama: Path) -> None:
    rows = [{"answer": float(i), "other": 10 * i, "responses": "the data's own", "prompts": 0} for i in range(8)]
    batch = samples(row=rows)
    assert function(f"{functions}:with_answer", llama).score(batch).tolist() == [float(i) for i in range(8)]
    assert function(f"{functions}:with_all", llama).score(batch).tolist() == [11.0 * i for i in range(8)]
    assert len(function(f"{functions}:longest", llama).score(batch)) == 8


def classified(path: Path, sequences: list[Tensor]) -> list[float]:
    """By Hugging Face, one sequence at a time."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [float(model(input_ids=s[None]).logits[0, 0]) for s in sequences]


def scorer_role(llama: Path, tmp_path: Path, sources: list[dict[str, Any]], **reward: Any) -> RewardScorer:
    config = config_of(llama, tmp_path, reward={"sources": sources, **reward})
    return RewardScorer(alone(), config.reward, str(llama), reward_sources(config))


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_reward_model_reads_the_last_real_token(llama: Path, scorer: Path, tmp_path: Path, budget: int) -> None:
    role = scorer_role(llama, tmp_path, [{"model": str(scorer)}], tokens_per_micro_batch=budget)
    batch = samples()
    found = role.score(batch)
    assert found.keys() == ["score"]
    expected = torch.tensor(classified(scorer, ragged_tokens()[0]))
    torch.testing.assert_close(found["score"], expected, rtol=0, atol=1e-5)
    order = [5, 0, 7, 3]
    torch.testing.assert_close(role.score(batch.select(order))["score"], expected[order], rtol=0, atol=1e-5)
    assert len(role.score(batch.select([]))["score"]) == 0


def other_tokenizer(scorer: Path, folder: Path, template: str | None) -> Path:
    """The reward model with a vocabulary in another order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(scorer, folder)
    words = ["<none>", *(f"w{60 - i}" for i in range(61)), "Turn:", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    own.chat_template = template
    own.save_pretrained(folder)
    return folder


def own_ids(text: str) -> Tensor:
    names = {"Turn:": 62, "<end>": 63}
    return torch.tensor([names[w] if w in names else 1 + 60 - int(w[1:]) for w in text.split()])


TEMPLATE = (
    "{% for m in messages %}Turn: {{ m.content }}{{ ' <end>' if m.role == 'assistant' else '' }} {% endfor %}"
    "{% if add_generation_prompt %}Turn: {% endif %}"
)


@pytest.mark.parametrize("kind", ["plain", "template", "conversation"])
def test_another_tokenizer_reads_the_text_again(llama: Path, scorer: Path, tmp_path: Path, kind: str) -> None:
    """As in training: up to the end of the turn, and no token behind it."""
    folder = other_tokenizer(scorer, tmp_path / "other", None if kind == "plain" else TEMPLATE)
    role = scorer_role(llama, tmp_path, [{"model": str(folder)}])
    tokens, _ = ragged_tokens()
    tokens[2] = torch.cat([tokens[2][:-1], torch.tensor([2])])  # EOS
    tokens[4][PROMPTS[4] :] = 2  # nothing but EOS
    prompts = ["w7 w8 ", "w9 "] * 4
    batch = samples(prompt_text=prompts).with_columns({"tokens": torch.cat(tokens)})
    before = ""
    if kind == "conversation":
        turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
        asked = [[*turns, {"role": "user", "content": prompt}] for prompt in prompts]
        batch, before = batch.with_columns(sample={"messages": asked}), "Turn: w1 Turn: w2 w3 <end> "
    elif kind == "template":
        batch = batch.with_columns(sample={"messages": [None] * 8})
    texts = []
    for prompt, sample, length in zip(prompts, tokens, PROMPTS, strict=True):
        response = " ".join(f"w{int(t) - 3}" for t in sample[length:] if t != 2)
        texts.append(
            f"{prompt}{response} <end>" if kind == "plain" else f"{before}Turn: {prompt} Turn: {response} <end>"
        )
    expected = torch.tensor(classified(folder, [own_ids(t) for t in texts]))
    torch.testing.assert_close(role.score(batch)["score"], expected, rtol=0, atol=1e-5)


def test_a_template_that_refuses_a_conversation_is_named(llama: Path, scorer: Path, tmp_path: Path) -> None:
    folder = other_tokenizer(scorer, tmp_path / "other", "{{ raise_exception('no system messages') }}")
    role = scorer_role(llama, tmp_path, [{"model": str(folder)}])
    with pytest.raises(RunFailed, match="other: its chat template can't write .*no system messages"):
        role.score(samples())


def test_a_weighted_sum_of_several_sources(llama: Path, scorer: Path, tmp_path: Path, functions: str) -> None:
    sources = [
        {"model": str(scorer), "weight": 0.5, "name": "model"},
        {"function": f"{functions}:longest", "weight": -2.0},
    ]
    found = scorer_role(llama, tmp_path, sources).score(samples())
    assert sorted(found.keys()) == ["score", "score/longest", "score/model"]
    model = torch.tensor(classified(scorer, ragged_tokens()[0]))
    texts = torch.tensor([n - p + 100.0 * (i + 1) for i, (n, p) in enumerate(zip(LENGTHS, PROMPTS, strict=True))])
    torch.testing.assert_close(found["score/model"], model, rtol=0, atol=1e-5)
    assert torch.equal(found["score/longest"], texts)
    torch.testing.assert_close(found["score"], 0.5 * model - 2 * texts, rtol=0, atol=1e-4)


def test_a_score_that_is_not_finite(llama: Path, scorer: Path, tmp_path: Path) -> None:
    role = scorer_role(llama, tmp_path, [{"model": str(scorer)}])
    with torch.no_grad():
        role.sources[0][1].frozen.model.head.weight[0, 0] = math.nan  # type: ignore[attr-defined]
    with pytest.raises(RunFailed, match="gave a score that is not finite"):
        role.score(samples())


def test_a_gold_score_is_no_part_of_the_sum(llama: Path, scorer: Path, tmp_path: Path, functions: str) -> None:
    gold = {"function": f"{functions}:tensor"}
    found = scorer_role(llama, tmp_path, [{"function": f"{functions}:longest", "weight": 3.0}], gold=gold).score(
        samples()
    )
    assert sorted(found.keys()) == ["gold", "score"]
    assert found["gold"].tolist() == list(range(8))
    lengths = [n - p + 100 * (i + 1) for i, (n, p) in enumerate(zip(LENGTHS, PROMPTS, strict=True))]
    assert found["score"].tolist() == [3.0 * n for n in lengths]


def marking(llama: Path, *sources: NamedSource, mark_failures: bool = True) -> RewardScorer:
    return RewardScorer(alone(), ScorerProcesses(), str(llama), sources, mark_failures=mark_failures)


def test_two_sources_of_one_name_are_refused(llama: Path, functions: str) -> None:
    source = ScoreSource(function=f"{functions}:longest")
    with pytest.raises(InputRefused, match="gold: the name of several sources"):
        marking(llama, NamedSource("gold", source), NamedSource("gold", source, None))


@pytest.mark.parametrize("named_like_prompt", ["ppp", "nobody"])
def test_a_service_that_fails_for_some_samples(
    llama: Path, functions: str, monkeypatch: pytest.MonkeyPatch, named_like_prompt: str
) -> None:
    """Requests of two samples; the one with the prompt "ppp" (sample 2) is answered by an error."""
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.01)
    local = ScoreSource(function=f"{functions}:longest")

    def answer(payload: dict[str, Any], headers: dict[str, str]) -> Reply:
        if named_like_prompt in payload["prompts"]:
            return Reply({"error": "no"}, 500)
        return Reply({"scores": [float(len(p)) for p in payload["prompts"]]})

    with Misbehaving(answer) as server:
        far = ScoreSource(url=server.url, retries=1)
        sources = [NamedSource("far", far, 2.0), NamedSource("near", local), NamedSource("safety", far, None)]
        role = marking(llama, *sources)
        for source in (role.sources[0][1], role.sources[2][1]):
            source.remote.batch = 2  # type: ignore[attr-defined]
        found = role.score(samples())
        asked = len(server.requests)
        assert len(role.score(samples().select([]))["far/failure"]) == 0
    failing = {2, 3} if named_like_prompt == "ppp" else set()
    assert asked == 2 * (4 + bool(failing))
    assert sorted(found.keys()) == [
        "far/failure", "safety", "safety/failure", "score", "score/far", "score/near",
    ]  # fmt: skip
    near = found["score/near"].tolist()
    for i in range(8):
        if i in failing:
            assert all(math.isnan(found[name][i]) for name in ("score", "score/far", "safety")) and near[i] > 0
            for name in ("far/failure", "safety/failure"):
                assert f"reward service {server.url}/score: samples 3-4 of 8" in found[name][i]
                assert "in 2 attempts: HTTP 500" in found[name][i]
        else:
            assert found["score/far"][i] == found["safety"][i] == i + 1 and found["score"][i] == 2 * (i + 1) + near[i]
            assert found["far/failure"][i] is None and found["safety/failure"][i] is None


def test_what_fails_in_this_process_raises_though_failures_are_marked(llama: Path, functions: str) -> None:
    role = marking(llama, NamedSource("near", ScoreSource(function=f"{functions}:raises")))
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        role.score(samples())


def test_without_marks_a_service_that_fails_raises(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.01)
    with RewardServer(lambda p, r: [1 / 0], name="broken") as server:
        far = NamedSource("far", ScoreSource(url=server.url, retries=1))
        with pytest.raises(RunFailed, match="samples 1-8 of 8 got no scores in 2 attempts: HTTP 500.*ZeroDivision"):
            marking(llama, far, mark_failures=False).score(samples())
        assert all("ZeroDivision" in cause for cause in marking(llama, far).score(samples())["far/failure"])
