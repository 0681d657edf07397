"""``rayrlhf sample``: responses, scored and ranked, as pairs or examples."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rayrlhf.config import SamplingConfig, load_config
from rayrlhf.drivers.jobs import whole_files
from rayrlhf.drivers.sample import sample_responses
from rayrlhf.errors import InputRefused, RunFailed
from tests.conftest import ROOT
from tests.drivers.runs import TinyWorld, small_numbers
from tests.serving.misbehaving import Misbehaving, Reply

BASE = """
algorithm: sampling
seed: 3
policy: {dtype: float32}
reward: {sources: [{function: "tests.drivers.runs:small_numbers"}]}
data: {max_prompt_tokens: 8, limit: 12}
rollout: {engine: transformers, max_response_tokens: 8, samples_per_prompt: 4, chunk_samples: 4}
cluster: {executor: inline, threads: 1, start_timeout_s: 200, call_timeout_s: 120}
"""


class Sampled:
    """What a run left, and said."""

    def __init__(self, folder: Path, counts: dict, printed: str):
        self.folder, self.counts, self.printed = folder, counts, printed
        self.rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def configured(world: TinyWorld, name: str, *overrides: str, **sections: dict) -> SamplingConfig:
    values = yaml.safe_load(BASE)
    values["run_dir"] = str(world.folder / name)
    values["policy"]["path"] = str(world.folder / "model")
    values["data"]["prompts"] = str(world.folder / "prompts.jsonl")
    for section, changed in sections.items():
        values[section] = {**values.get(section, {}), **changed}
    file = world.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_config(file, list(overrides))  # type: ignore[return-value]


def sample(world: TinyWorld, name: str, *overrides: str, **sections: dict) -> Sampled:
    console = Console(file=io.StringIO(), width=160)
    config = configured(world, name, *overrides, **sections)
    counts = sample_responses(config, console)
    return Sampled(Path(config.run_dir), counts, console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def everything(world: TinyWorld) -> Sampled:
    """All responses to twelve prompts, with their scores."""
    return sample(world, "all", "sampling.form=all")


def by_prompt(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).append(row)
    return found


def test_pairs_are_the_best_over_the_worst_of_all_responses(world: TinyWorld, everything: Sampled) -> None:
    done = sample(world, "pairs")
    assert len(everything.rows) == 48 and done.counts["prompts"] == 12
    assert done.counts["written"] + done.counts["ties"] == 12 and done.counts["written"] == len(done.rows) > 6
    responses = by_prompt(everything.rows)
    assert len(responses) == 12
    for rows in responses.values():
        assert len(rows) == 4 and [row["score"] for row in rows] == sorted((r["score"] for r in rows), reverse=True)
        assert [row["score"] for row in rows] == small_numbers([], [row["response"] for row in rows])
    for pair in done.rows:
        scores = {r["response"]: r["score"] for r in responses[json.dumps(pair["prompt"])] if r["response"].strip()}
        assert scores[pair["chosen"]] == max(scores.values()) and scores[pair["rejected"]] == min(scores.values())
        assert pair["margin"] == pytest.approx(max(scores.values()) - min(scores.values())) and pair["margin"] > 0
    texts = [[r["score"] for r in rows if r["response"].strip()] for rows in responses.values()]
    assert sum(len(scores) > 1 and len(set(scores)) == 1 for scores in texts) == done.counts["ties"]
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "config.yaml",
        "data.jsonl",
        "log.txt",
        "summary.json",
    ]
    assert json.loads((done.folder / "summary.json").read_text()) == done.counts
    scores = [row["score"] for row in everything.rows]
    assert done.counts["score/mean"] == pytest.approx(sum(scores) / 48) == everything.counts["score/mean"]
    assert done.counts["score/best"] == pytest.approx(
        sum(max(r["score"] for r in rs) for rs in responses.values()) / 12
    )
    assert load_config(done.folder / "config.yaml") == configured(world, "pairs")


def test_several_pairs_of_a_prompt_share_no_response(world: TinyWorld, everything: Sampled) -> None:
    pairs = sample(world, "two-pairs", "sampling.pairs_per_prompt=2").rows
    expected = []
    for prompt in dict.fromkeys(row["prompt"] for row in everything.rows):
        of_it = sorted(
            (r for r in everything.rows if r["prompt"] == prompt and r["response"].strip()), key=lambda r: -r["score"]
        )
        scores = [row["score"] for row in of_it]
        expected += [(prompt, a, b) for a, b in zip(scores[:2], scores[::-1], strict=False) if a > b]
    texts = {(row["prompt"], row["response"]): row["score"] for row in everything.rows}
    found = [(p["prompt"], texts[p["prompt"], p["chosen"]], texts[p["prompt"], p["rejected"]]) for p in pairs]
    assert found == expected
    assert len(pairs) > len({pair["prompt"] for pair in pairs})


def test_best_of_n_and_the_least_gap(world: TinyWorld, everything: Sampled) -> None:
    best = sample(world, "best", "sampling.form=best")
    responses = by_prompt(everything.rows)
    assert [row["score"] for row in best.rows] == [rows[0]["score"] for rows in responses.values()]
    assert all(set(row) == {"prompt", "completion", "score"} for row in best.rows)
    wide = sample(world, "wide", "sampling.least_gap=0.3")
    assert wide.counts["ties"] > 0 and all(pair["margin"] >= 0.3 for pair in wide.rows)
    assert f"left out: {wide.counts['ties']} as" in wide.printed and "wide/data.jsonl" in wide.printed


def test_a_sample_does_not_depend_on_those_beside_it(world: TinyWorld, everything: Sampled) -> None:
    few = sample(world, "few-at-once", "sampling.form=all", "sampling.prompts_at_once=5", "rollout.chunk_samples=3")
    assert few.rows == everything.rows
    other = sample(world, "other-seed", "sampling.form=all", "seed=4", "data.limit=3")
    assert [row["response"] for row in other.rows] != [row["response"] for row in everything.rows[:12]]


# -- responses that can't be used -------------------------------------------------------------------------------


def test_a_response_without_text_stands_in_no_pair(world: TinyWorld) -> None:
    """The engine ends every response at w0 to w4, and those are special tokens here: many are empty once decoded."""
    everything = sample(world, "blank-all", "sampling.form=all", rollout=BLANK, policy=blank_model(world))
    blank = [row for row in everything.rows if not row["response"].strip()]
    assert 4 <= len(blank) == everything.counts["empty"] < 48
    assert f"Without any text: {len(blank)} of 48 responses" in everything.printed
    done = sample(world, "blank-pairs", rollout=BLANK, policy=blank_model(world))
    assert done.counts["empty"] == len(blank) and done.rows
    for row in done.rows:
        assert row["chosen"].strip() and row["rejected"].strip()
    assert done.counts["written"] + done.counts["ties"] + done.counts["too_few"] == 12
    usable = [sum(bool(row["response"].strip()) for row in rows) for rows in by_prompt(everything.rows).values()]
    assert done.counts["too_few"] == sum(count < 2 for count in usable) > 0
    best = sample(world, "blank-best", "sampling.form=best", rollout=BLANK, policy=blank_model(world))
    assert best.counts["too_few"] == sum(count < 1 for count in usable) and len(best.rows) == sum(map(bool, usable))


BLANK = {"max_response_tokens": 1}


def blank_model(world: TinyWorld) -> dict:
    """The tiny model, with a tokenizer that doesn't write a third of its words."""
    folder = world.folder / "blank-model"
    if not folder.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(world.folder / "model").save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
        tokenizer.add_special_tokens({"additional_special_tokens": [f"w{i}" for i in range(0, 60, 2)]})
        tokenizer.save_pretrained(folder)
    return {"path": str(folder)}


def picky(*, always: bool = False) -> Misbehaving:
    """A service that turns away, by what stands in them, about half of the requests that have responses in them."""

    def answer(payload: dict, headers: dict) -> Reply:
        words = " ".join(payload["responses"]).split()
        if words and (always or sum(int(word[1:]) for word in words) % 2):
            return Reply({"error": "busy"}, status=503)
        return Reply({"scores": [float(len(response)) for response in payload["responses"]]})

    return Misbehaving(answer)


def test_a_service_that_fails_for_some_leaves_them_marked(world: TinyWorld) -> None:
    with picky() as server:
        source = {"url": server.url, "retries": 0, "timeout_s": 20}
        service = {"sources": [{"function": "tests.drivers.runs:small_numbers"}, {**source, "name": "remote"}]}
        everything = sample(world, "some-all", "sampling.form=all", reward=service)
        pairs = sample(world, "some-pairs", reward=service)
    unscored = [row for row in everything.rows if row["score"] is None]
    assert 0 < len(unscored) == everything.counts["unscored"] == pairs.counts["unscored"] < 48
    assert all("503" in row["failure"] for row in unscored)
    assert all("failure" not in row for row in everything.rows if row["score"] is not None)
    for rows in by_prompt(everything.rows).values():  # those without a score come last
        marks = [row["score"] is None for row in rows]
        assert marks == sorted(marks)
    texts = {row["response"] for row in unscored}
    assert pairs.rows and not texts & {text for row in pairs.rows for text in (row["chosen"], row["rejected"])}
    assert pairs.printed.count("HTTP 503") == 1 and f"{len(unscored)} of 48 responses" in pairs.printed
    for made in (everything, pairs):
        kept = [json.loads(line) for line in (made.folder / "unscored.jsonl").read_text().splitlines()]
        assert sorted((k["prompt"], k["response"], k["failure"]) for k in kept) == sorted(
            (row["prompt"], row["response"], row["failure"]) for row in unscored
        )
        assert "unscored.jsonl" in made.printed
    assert "503" in pairs.counts["failure"] and not math.isnan(pairs.counts["score/mean"])


def test_a_service_that_fails_for_all_ends_it(world: TinyWorld) -> None:
    with picky(always=True) as server, pytest.raises(RunFailed, match="none of the first 48 responses.*503"):
        sample(world, "none", reward={"sources": [{"url": server.url, "retries": 0}]})
    assert {path.name for path in (world.folder / "none").iterdir()} == {"log.txt", "unscored.jsonl"}
    kept = [json.loads(line) for line in (world.folder / "none" / "unscored.jsonl").read_text().splitlines()]
    assert len(kept) == 48 and all(set(row) == {"prompt", "response", "failure"} and row["failure"] for row in kept)
    again = sample(world, "none", "data.limit=1")  # nothing stands in the way of another attempt
    assert {path.name for path in again.folder.iterdir()} == {"log.txt", "summary.json", "data.jsonl", "config.yaml"}


ENDED = """
import os, sys
from pathlib import Path
from rayrlhf.config import load_config
from rayrlhf.drivers.jobs import whole_files
from rayrlhf.drivers.sample import sample_responses
replace = Path.replace
def cut(self, target):
    if str(target).endswith(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return replace(self, target)
Path.replace = cut
sample_responses(load_config(sys.argv[1], ["data.limit=2"]))
"""


@pytest.mark.parametrize("before", ["summary.json", "data.jsonl", "/config.yaml"])
def test_a_process_that_is_killed_leaves_nothing_in_the_way(world: TinyWorld, before: str, monkeypatch) -> None:
    """Ended just before a file gets its name; then started again."""
    name = f"killed-{before.strip('/')}"
    configured(world, name)
    line = [sys.executable, "-c", ENDED, str(world.folder / f"{name}.yaml"), before]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    folder = world.folder / name
    left = {path.name for path in folder.iterdir()}
    assert "config.yaml.partial" in left and "config.yaml" not in left
    assert ("data.jsonl" in left) == (before == "/config.yaml")
    # An attempt that fails leaves nothing of the one before either,
    monkeypatch.setattr("rayrlhf.drivers.sample.Sampler", lambda *_: (_ for _ in ()).throw(RunFailed("lost")))
    with pytest.raises(RunFailed, match="lost"):
        sample(world, name, "data.limit=2")
    assert {path.name for path in folder.iterdir()} == {"log.txt"}
    monkeypatch.undo()
    assert sample(world, name, "data.limit=2").counts["prompts"] == 2
    assert {path.name for path in folder.iterdir()} == {"log.txt", "summary.json", "data.jsonl", "config.yaml"}


def test_a_file_that_can_not_get_its_name_takes_the_others_along(world: TinyWorld) -> None:
    (world.folder / "no-room" / "config.yaml").mkdir(parents=True)
    config = configured(world, "no-room")
    with pytest.raises(RunFailed, match="config.yaml could not be written"), whole_files(config, ["a", "b"]) as (a, _):
        a.write({})
    assert {path.name for path in (world.folder / "no-room").iterdir()} == {"config.yaml", "log.txt"}


# -- refusals, and the command ----------------------------------------------------------------------------------


def test_what_is_refused_is_told_together(world: TinyWorld) -> None:
    (world.folder / "taken").mkdir()
    (world.folder / "taken" / "data.jsonl").write_text("")
    config = configured(
        world,
        "taken",
        "policy.tokenizer=no/such",
        "reward.sources=[{function: 'tests.drivers.runs:nothing'}, {url: 'http://127.0.0.1:9', name: far}]",
        "rollout.max_response_tokens=250",
    )
    with pytest.raises(InputRefused) as refused:
        sample_responses(config, Console(file=io.StringIO()))
    words = [
        "data.jsonl already",
        "has no function 'nothing'",
        "127.0.0.1:9",
        "no tokenizer can be",
        "reads at most 256",
    ]
    assert len(refused.value.problems) == len(words)
    for word, problem in zip(words, refused.value.problems, strict=True):
        assert word in problem
    missing = configured(world, "no-column", "reward.sources.0.function=tests.drivers.test_sample:wants_a_column")
    with pytest.raises(InputRefused, match="wants answer"):
        sample_responses(missing, Console(file=io.StringIO()))
    assert not (world.folder / "no-column").exists()


def wants_a_column(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    return [float(a in r) for a, r in zip(answer, responses, strict=True)]


def test_the_command(world: TinyWorld) -> None:
    configured(world, "typed")
    file = str(world.folder / "typed.yaml")
    first = command("sample", file, "data.limit=2", "sampling.form=best")
    assert first.returncode == 0, first.stderr
    assert "2 examples from 2 prompts" in " ".join(first.stdout.split())
    again = command("sample", file, "data.limit=2")
    assert again.returncode == 2 and "holds a run already" in again.stderr and "--resume" not in again.stderr
    wrong = command("sample", "configs/ppo_local.yaml")
    assert wrong.returncode == 2 and "algorithm: found ppo" in wrong.stderr and "sampling" in wrong.stderr


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rayrlhf.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, cwd=ROOT)
