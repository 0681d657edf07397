"""A reward by URL in a PPO run, over real sockets: the same run as with the function itself, and what happens when it fails."""

from __future__ import annotations

import json

import pytest
import torch

from rayrlhf.actors.reward import NamedSource, RewardScorer
from rayrlhf.batch import Batch
from rayrlhf.config.schema import ScorerProcesses, ScoreSource
from rayrlhf.drivers.serve import scorer
from rayrlhf.errors import RunFailed
from rayrlhf.models.world import World
from rayrlhf.serving import RewardServer
from tests.drivers.offline_runs import OfflineWorld
from tests.drivers.runs import TinyWorld, small_numbers
from tests.serving.misbehaving import Misbehaving, Reply
from tests.support.tiny import WORDS, save_tiny_model

BY_URL = "reward.sources=[{url: '%s', name: far, timeout_s: 60, retries: 1}]"
KEYS = ["cause", "prompt", "response", "step"]
STEPS = ("ppo.steps=2", "checkpoint.every_steps=0")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def local(world: TinyWorld):
    return world.train("by-function", *STEPS)


def test_a_reward_by_url_trains_as_its_function_does(world: TinyWorld, local, monkeypatch):
    monkeypatch.setenv("THE_TOKEN", "s3cret")
    with RewardServer(small_numbers, name="small", token="s3cret") as server:
        found = world.train("by-url", *STEPS, BY_URL % server.url, "reward.sources.0.token_env=THE_TOKEN")
    assert found.numbers == local.numbers and found.same_weights(local)
    assert not (found.folder / "unscored.jsonl").exists()
    assert not any("s3cret" in file.read_text() for file in found.folder.glob("*.*") if file.suffix != ".html")


class Failing:
    """Scores as `small_numbers` does, and fails after ``first`` requests; a request without responses doesn't count."""

    def __init__(self, first: int | None = None):
        self.first, self.count, self.failed = first, 0, []

    def __call__(self, payload, headers) -> Reply:
        if not payload["responses"]:
            return Reply({"scores": []})
        self.count += 1
        if self.first is not None and self.count > self.first:
            self.failed.append(payload)
            return Reply({"error": "out of order"}, 500)
        return Reply({"scores": small_numbers(**payload)})


def test_a_service_that_fails_for_good_ends_the_run_and_keeps_what_it_did_not_score(world: TinyWorld, local):
    # An evaluation has 2 chunks of 4 samples, a step 4: the 8th request is the second of step 2, and the 9th its retry.
    service = Failing(first=7)
    with Misbehaving(service) as server:
        with pytest.raises(RunFailed) as caught:
            world.train("fails", *STEPS, BY_URL % server.url)
        assert len(service.failed) == 2 and service.failed[0] == service.failed[1]
        message = str(caught.value)
        assert f"reward service {server.url}/score: samples 1-4 of 4 got no scores in 2 attempts: HTTP 500" in message
        folder = world.folder / "fails"
        rows = [json.loads(line) for line in (folder / "unscored.jsonl").read_text().splitlines()]
        assert [(row["prompt"], row["response"]) for row in rows] == list(
            zip(service.failed[0]["prompts"], service.failed[0]["responses"], strict=True)
        )
        assert all(row["step"] == 2 and "HTTP 500" in row["cause"] and sorted(row) == KEYS for row in rows)
        # The whole step before it is kept; with the service back the run goes on from there to the same end.
        assert [file.name for file in (folder / "checkpoints").iterdir()] == ["step-1"]
        service.first = None
        resumed = world.train("fails", *STEPS, BY_URL % server.url, resume=True)
    assert resumed.same_weights(local) and [row["step"] for row in resumed.metrics] == [1, 2]
    assert (folder / "unscored.jsonl").read_text() == ""


def test_samples_that_were_still_waiting_are_kept_too(world: TinyWorld):
    """With Ray the calls wait in a queue behind the one that fails."""
    with Misbehaving(Failing(first=0)) as server, pytest.raises(RunFailed, match="reward rank 0 failed in score"):
        world.train(
            "fails-on-ray", *STEPS, BY_URL % server.url, "cluster.executor=ray", "evaluation.prompts=0", "critic=null",
            "ppo.advantage_estimator=rloo", "reference=null", "ppo.kl_coef=0.0", "ppo.kl_controller=fixed", "ppo.target_kl=null",
        )  # fmt: skip
    rows = [json.loads(line) for line in (world.folder / "fails-on-ray/unscored.jsonl").read_text().splitlines()]
    assert 4 <= len(rows) <= 16 and len({row["response"] for row in rows}) > 1
    assert "HTTP 500" in rows[0]["cause"] and {row["step"] for row in rows} == {1}


def test_a_trained_reward_model_scores_alike_in_process_and_by_url(tmp_path):
    save_tiny_model(tmp_path / "model")
    sections = {"training": {"epochs": 1, "validate_every_steps": 0}}
    folder = OfflineWorld(tmp_path).train("judge", "reward_model", sections).folder / "model"
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    asked = [(row["prompt"], row[side]) for row in rows[:8] for side in ("chosen", "rejected")]
    ids = [[[WORDS.index(word) for word in text.split()] for text in pair] for pair in asked]
    batch = Batch.from_samples(
        {"tokens": [torch.tensor([*prompt, *response, WORDS.index("<eos>")]) for prompt, response in ids]},
        {"prompt_length": torch.tensor([len(p) for p, _ in ids]), "prompt_text": [prompt for prompt, _ in asked]},
    )
    with RewardServer(scorer(str(folder)), name="judge") as server:
        sources = [NamedSource("near", ScoreSource(model=str(folder))), NamedSource("far", ScoreSource(url=server.url))]
        world = World(0, 1, "127.0.0.1", 1, "cpu", 1)
        found = RewardScorer(world, ScorerProcesses(), str(folder), sources).score(batch)
    torch.testing.assert_close(found["score/far"], found["score/near"], rtol=0, atol=1e-5)
    assert float(found["score/near"].std()) > 0.1
