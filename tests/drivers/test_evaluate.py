"""``rayrlhf evaluate``: tiny models side by side, counted again from what the evaluation wrote down."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median, stdev

import pytest
import torch

from rayrlhf.errors import InputRefused
from rayrlhf.evaluation import distinct_n, win_rate, write_report
from tests.conftest import ROOT
from tests.drivers.evaluations import PROMPTS, Models, Result, longer
from tests.drivers.runs import TinyWorld, small_numbers
from tests.support.tiny import WORDS


@pytest.fixture(scope="module")
def models(world: TinyWorld) -> Models:
    return Models(world)


@pytest.fixture(scope="module")
def compared(models: Models) -> Result:
    """Three models by two functions, inline."""
    return models.evaluate("compared")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_win_rates_are_those_counted_by_hand(compared: Result) -> None:
    sources = {"small_numbers (reward)": "reward", "helpfulness": "helpfulness"}
    assert len(compared.rates) == 6
    for rate in compared.rates:
        source = sources[rate["judge"]]
        both = [[told["scores"][source] for told in compared.told(rate[side])] for side in ("a", "b")]
        wins, losses = (sum(f(a, b) for a, b in zip(*both, strict=True)) for f in (float.__gt__, float.__lt__))
        assert (rate["wins"], rate["losses"], rate["ties"]) == (wins, losses, PROMPTS - wins - losses)
        assert rate["rate"] == pytest.approx((wins + rate["ties"] / 2) / PROMPTS) and rate["unjudged"] == 0
        again = win_rate(*both, seed=3)
        assert (rate["low"], rate["high"], rate["confidence"]) == (again.low, again.high, 0.95)
    assert compared.rate("other", "base", "helpfulness")["ties"] < PROMPTS


def test_scores_are_those_of_the_responses_that_were_written_down(compared: Result) -> None:
    for name, measured in compared.models.items():
        told = compared.told(name)
        texts = [one["response"] for one in told]
        assert [one["scores"]["reward"] for one in told] == pytest.approx(small_numbers([], texts))
        assert [one["scores"]["helpfulness"] for one in told] == longer([], texts)
        assert measured["score/mean"] == pytest.approx(fmean(small_numbers([], texts)))
        assert measured["score/stderr"] == pytest.approx(stdev(small_numbers([], texts)) / PROMPTS**0.5, rel=1e-5)
        assert measured["helpfulness/quantiles"]["0.5"] == pytest.approx(median(longer([], texts)))
        assert measured["distinct_1"] == pytest.approx(distinct_n(texts, 1))
        assert measured["distinct_2"] == pytest.approx(distinct_n(texts, 2))
        assert measured["response_length/mean"] == pytest.approx(fmean(one["tokens"] for one in told))
        cut = [one["finish_reason"] == "length" for one in told]
        assert measured["truncated_fraction"] == pytest.approx(fmean(cut)) and all(
            one["tokens"] == 8 for one, is_cut in zip(told, cut, strict=True) if is_cut
        )


def test_the_same_weights_say_the_same_and_have_no_kl(compared: Result) -> None:
    base, twin, other = (compared.told(name) for name in ("base", "twin", "other"))
    assert [one["response"] for one in base] == [one["response"] for one in twin]
    assert all(one["kl"] == 0 for one in base) and all(abs(one["kl"]) < 1e-5 for one in twin)
    assert abs(compared.models["twin"]["kl/mean"]) < 1e-5 and compared.models["other"]["kl/mean"] > 0.5
    assert [one["response"] for one in other] != [one["response"] for one in base]
    tie = compared.rate("twin", "base", "small_numbers (reward)")
    assert (tie["ties"], tie["rate"]) == (PROMPTS, 0.5)


def logprobs(folder: Path, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Of a response's tokens, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_kl_is_the_summed_log_ratio_of_transformers_own_numbers(models: Models, compared: Result) -> None:
    checked = 0
    for row in compared.rows:
        told = row["models"]["other"]
        response = [WORDS.index(word) for word in told["response"].split()]
        if len(response) != told["tokens"] or checked == 5:  # special tokens aren't in the text
            continue
        prompt = [WORDS.index(word) for word in row["prompt"].split()]
        own, its = (logprobs(models.folder / name / "model", prompt, response) for name in ("other", "base"))
        assert told["kl"] == pytest.approx(float((own - its).sum()), abs=1e-4)
        checked += 1
    assert checked == 5
    kl, tokens = ([one[key] for one in compared.told("other")] for key in ("kl", "tokens"))
    assert compared.models["other"]["kl/mean"] == pytest.approx(fmean(kl))
    assert compared.models["other"]["kl_per_token"] == pytest.approx(sum(kl) / sum(tokens))


def test_perplexity_is_that_of_transformers_own_loss(models: Models, compared: Result) -> None:
    from transformers import AutoModelForCausalLM

    given = [json.loads(line) for line in models.prompts.read_text().splitlines()][:PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(models.folder / "other" / "model", dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in given:
        prompt, known = ([WORDS.index(word) for word in row[key].split()] for key in ("prompt", "completion"))
        labels = torch.tensor([[-100] * len(prompt) + known])
        with torch.no_grad():
            total += float(model(torch.tensor([prompt + known]), labels=labels).loss) * len(known)
        count += len(known)
    measured = compared.models["other"]
    assert sum(one["known_tokens"] for one in compared.told("other")) == count
    assert measured["nll"] == pytest.approx(total / count, abs=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(models: Models, compared: Result) -> None:
    again = models.evaluate("again")
    for name in ("evaluation.json", "win_rates.json", "responses.jsonl"):
        assert (again.folder / name).read_bytes() == (compared.folder / name).read_bytes()
    # A model's responses don't depend on which others it is compared with, nor on how they are cut into chunks.
    alone = models.evaluate("alone", ("other",), rollout={"chunk_samples": 3})
    assert [one["response"] for one in alone.told("other")] == [one["response"] for one in compared.told("other")]
    assert alone.rates == [] and alone.models["other"]["kl/mean"] == 0
    different = models.evaluate("seed-4", ("other",), seed=4)
    assert [o["response"] for o in different.told("other")] != [o["response"] for o in compared.told("other")]


def test_a_model_with_other_tokens_has_no_kl_and_is_scored_by_its_own_words(models: Models) -> None:
    folder = models.folder / "foreign" / "model"
    shutil.copytree(models.folder / "other" / "model", folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    written["model"]["vocab"] = {w: (66 - i if i > 2 else i) for w, i in vocabulary.items()}  # w0 is 63, w60 is 3
    (folder / "tokenizer.json").write_text(json.dumps(written))
    found = models.evaluate("foreign-run", ("base", "foreign"))
    measured = found.models["foreign"]
    assert measured["kl/mean"] is None and "tokens are not those of the reference" in measured["kl/reason"]
    assert measured["perplexity"] > 1 and "kl" not in found.told("foreign")[0]
    for name in ("base", "foreign"):
        texts = [one["response"] for one in found.told(name)]
        assert [one["scores"]["reward"] for one in found.told(name)] == pytest.approx(small_numbers([], texts))
    assert found.models["base"]["kl/mean"] == 0 and "No KL of foreign" in found.printed


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_terminal_shows_models_rates_and_samples(compared: Result) -> None:
    printed = compared.printed
    measured = compared.models["other"]
    assert f"{measured['score/mean']:.3f} ± {measured['score/stderr']:.3f}" in printed
    assert "3 models on the same 24 prompts" in printed and "score: small_numbers" in printed
    rate = compared.rate("other", "base", "small_numbers (reward)")
    assert f"{rate['wins']}, {rate['ties']}, {rate['losses']}" in printed
    assert printed.count("sample ") == 3 and compared.rows[0]["models"]["twin"]["response"] in printed
    assert "report.html, evaluation.json, win_rates.json, responses.jsonl" in printed


def test_its_report_and_one_beside_a_run(compared: Result, tmp_path: Path) -> None:
    page = (compared.folder / "report.html").read_text()
    for text in (
        "Models side by side",
        "score: small_numbers",
        "other against base",
        '<th scope="col" class="number">twin',
    ):
        assert text in page
    assert "<svg" in page and compared.rows[0]["prompt"] in page
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "score/mean": 0.5}\n{"step": 2, "score/mean": 0.6}\n')
    both = write_report([run, compared.folder], tmp_path / "both.html").read_text()
    assert "Models side by side" in both and "Score and reward" in both and "compared: base" in both


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_told_together_and_nothing_is_written(models: Models, monkeypatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    template = models.folder / "judge.txt"
    template.write_text("{prompt} {first}")
    with pytest.raises(InputRefused) as refused:
        models.evaluate(
            "wrong",
            ("base", "nowhere"),
            scores={"reward": {"function": "tests.drivers.runs:no_such"}},
            judge={"url": "http://127.0.0.1:9", "model": "m", "token_env": "NO_SUCH_TOKEN", "prompt": str(template)},
            rollout={"max_response_tokens": 300},
            measure={"tokens_per_micro_batch": 4096},
        )
    told = "\n".join(refused.value.problems)
    for words in (
        "no function 'no_such'",
        "judge.prompt: lacks {second}",
        "judge.token_env: the environment variable NO_SUCH_TOKEN",
        "reads at most 256 tokens",
        "nowhere",
    ):
        assert words in told
    assert not (models.folder / "wrong").exists()


def test_a_function_wants_a_column_that_is_not_there(models: Models) -> None:
    with pytest.raises(InputRefused, match=r"wants call, which the data has no column for.*completion"):
        models.evaluate("column", scores={"reward": {"function": "tests.drivers.runs:_fails_at"}})


def test_a_folder_with_a_run_is_refused(models: Models, compared: Result) -> None:
    before = (compared.folder / "responses.jsonl").read_bytes()
    with pytest.raises(InputRefused, match="holds a run already; choose another run_dir"):
        models.evaluate("compared")
    assert (compared.folder / "responses.jsonl").read_bytes() == before


def test_prompts_that_do_not_fit_every_model_are_left_out_for_all(models: Models, compared: Result) -> None:
    folder = models.folder / "wordy" / "model"
    shutil.copytree(models.folder / "base" / "model", folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    written["pre_tokenizer"] = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(written))  # a token a character
    found = models.evaluate("wordy-run", ("base", "wordy"), data={"max_prompt_tokens": 12})
    kept = [row["prompt"] for row in found.rows]
    assert 0 < len(kept) < PROMPTS and all(len(prompt) <= 12 for prompt in kept)
    assert f"{PROMPTS - len(kept)} prompts don't fit every model" in found.printed


# -- on Ray ------------------------------------------------------------------------------------------------------------


def test_roles_as_ray_actors_give_what_roles_inline_give(models: Models, compared: Result) -> None:
    cluster = {"executor": "ray", "threads": 1, "start_timeout_s": 200, "call_timeout_s": 120}
    found = models.evaluate("on-ray", ("base", "other"), cluster=cluster)
    for name in ("base", "other"):
        assert [one["response"] for one in found.told(name)] == [one["response"] for one in compared.told(name)]
        assert found.models[name]["kl/mean"] == pytest.approx(compared.models[name]["kl/mean"], abs=1e-4)
    same = [rate for rate in compared.rates if (rate["a"], rate["b"]) == ("other", "base")]
    assert found.rates == same and "Win rates" in found.printed


# -- as a user starts it -----------------------------------------------------------------------------------------------


def test_the_command(models: Models, compared: Result) -> None:
    line = [sys.executable, "-m", "rayrlhf.cli", "evaluate", str(models.config_file("typed", ("other",)))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    told = Result(models.folder / "typed").told("other")
    assert [one["response"] for one in told] == [one["response"] for one in compared.told("other")]
    assert "24 prompts" in done.stdout and "win_rates.json, responses.jsonl" in done.stdout
