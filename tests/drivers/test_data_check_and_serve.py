"""``rayrlhf data check`` and ``rayrlhf serve-reward``, as the command line calls them."""

from __future__ import annotations

import io
import json
import re
import threading

import pytest
import torch
from rich.console import Console

from rayrlhf.actors.reward_http import RemoteReward
from rayrlhf.drivers.data_check import check_data
from rayrlhf.drivers.serve import scorer
from rayrlhf.errors import InputRefused
from rayrlhf.serving import RewardServer
from tests.drivers.offline_runs import OfflineWorld
from tests.support.tiny import save_reward_model, save_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> OfflineWorld:
    folder = tmp_path_factory.mktemp("check")
    save_tiny_model(folder / "model")
    return OfflineWorld(folder)


def checked(what, **how) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = check_data(what, console=console, **how)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_clean_configuration_and_a_broken_file(world: OfflineWorld, tmp_path) -> None:
    assert checked(world.config_file("clean", "dpo", {}))[0] == 0
    rows = [json.loads(line) for line in (world.folder / "pairs.jsonl").read_text().splitlines()]
    rows[4]["rejected"] = rows[4]["chosen"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown = checked(broken, model=str(world.folder / "model"))
    assert code == 2 and "broken.jsonl:5" in shown.replace("\n", "")
    code, _ = checked(broken, fix_to=tmp_path / "clean.jsonl")
    kept = (tmp_path / "clean.jsonl").read_text().splitlines()
    assert code == 0 and len(kept) == 63 and json.dumps(rows[4]) not in kept


@pytest.fixture(scope="module")
def judge(world: OfflineWorld):
    """A reward model that has learnt from the pairs."""
    return world.train("judge", "reward_model", {"training": {"epochs": 4}}).folder / "model"


@pytest.mark.parametrize("conversations", [False, True])
def test_a_reward_model_tells_planted_swaps(world: OfflineWorld, judge, tmp_path, conversations: bool) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [json.loads(line) for line in (world.folder / "pairs.jsonl").read_text().splitlines()]
    for line in (7, 30, 50):
        row = rows[line - 1]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    data, turns = (
        tmp_path / "pairs.jsonl",
        [{"role": "user", "content": "w60"}, {"role": "assistant", "content": "w59"}],
    )
    if conversations:
        asked = [[*turns, {"role": "user", "content": row["prompt"]}] for row in rows]
        data.write_text("".join(json.dumps({**r, "prompt": p}) + "\n" for r, p in zip(rows, asked, strict=True)))
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    before = "w60 w59 " if conversations else ""

    def score(text: str) -> float:
        with torch.no_grad():
            return float(model(**tokenizer(f"{text} <eos>", return_tensors="pt")).logits[0, 0])

    gaps = [score(before + r["prompt"] + r["rejected"]) - score(before + r["prompt"] + r["chosen"]) for r in rows]
    typical = sorted(abs(gap) for gap in gaps)[31:33]
    expected = [line for line, gap in enumerate(gaps, start=1) if gap > 0 and gap >= sum(typical) / 2 / 2]
    assert set(expected) <= {7, 30, 50} and len(expected) >= 2, sorted(gaps)[-5:]
    code, shown = checked(data, reward_model=str(judge))
    assert code == 0
    found = [int(number) for number in re.findall(r"pairs\.jsonl:(\d+).{0,20}swapped", " ".join(shown.split()))]
    assert found == expected, shown
    assert "the reward model gives" in shown


def test_options_that_would_be_ignored_are_refused(world: OfflineWorld, judge) -> None:
    with pytest.raises(InputRefused, match="--reward-model: it is asked about pairs.*examples"):
        check_data(world.folder / "sft.jsonl", reward_model=str(judge))
    with pytest.raises(InputRefused, match="--reward-model: .* has 2 labels; a reward model has exactly 1"):
        check_data(world.folder / "pairs.jsonl", reward_model=str(world.folder / "model"))
    with pytest.raises(InputRefused, match="--model"):
        check_data(world.config_file("named", "sft", {}), model="x")
    with pytest.raises(InputRefused, match="is a data file"):
        check_data(world.folder / "sft.jsonl", ["seed=1"])


def test_a_served_model_scores_as_transformers_does(world: OfflineWorld) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = save_reward_model(world.folder / "scorer", world.folder / "model")
    prompts, responses = ["w1 w2", "w3"], [" w4 w5 w6", " w7"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [[4, 5, 7, 8, 9, 2], [6, 10, 2]]  # words behind three special tokens, then EOS
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]
    server = RewardServer(scorer(str(folder)), name="tiny")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert RemoteReward(server.url, timeout_s=30).score(prompts, responses) == pytest.approx(expected, abs=1e-5)
    finally:
        server.close()
        thread.join(timeout=30)
