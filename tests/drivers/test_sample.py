"""``rayrlhf sample``: responses, scored and ranked, as pairs or examples."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.drivers.sample import sample_responses
from rayrlhf.errors import InputRefused
from tests.drivers.runs import TinyWorld, small_numbers


def rows_of(world: TinyWorld, name: str, form: str, **how):
    config = load_config(world.config_file("for-sampling"), [])
    out = world.folder / f"{name}.jsonl"
    settings = {"responses": 4, "prompts": 12, "least_gap": 0.0, **how}
    counts = sample_responses(config, out, form=form, console=Console(file=io.StringIO()), **settings)
    return counts, [json.loads(line) for line in out.read_text().splitlines()]


def test_pairs_are_the_best_over_the_worst_of_all_responses(world: TinyWorld) -> None:
    _, everything = rows_of(world, "all", "all")
    counts, pairs = rows_of(world, "pairs", "pairs")
    assert len(everything) == 48 and counts["prompts"] == 12 and counts["written"] + counts["ties"] == 12
    by_prompt: dict[str, list[dict]] = {}
    for row in everything:
        assert row["score"] == small_numbers([row["prompt"]], [row["response"]])[0]
        by_prompt.setdefault(row["prompt"], []).append(row)
    for pair in pairs:
        scores = {row["response"]: row["score"] for row in by_prompt[pair["prompt"]]}
        assert scores[pair["chosen"]] == max(scores.values()) and scores[pair["rejected"]] == min(scores.values())
        assert pair["margin"] == pytest.approx(max(scores.values()) - min(scores.values())) and pair["margin"] > 0
    assert not (world.folder / "for-sampling").exists(), "nothing is trained"


def test_best_of_n_and_the_least_gap(world: TinyWorld) -> None:
    _, best = rows_of(world, "best", "best")
    _, everything = rows_of(world, "all-again", "all")
    assert [row["score"] for row in best] == [max(r["score"] for r in everything[k : k + 4]) for k in range(0, 48, 4)]
    counts, pairs = rows_of(world, "wide", "pairs", least_gap=0.3)
    assert counts["ties"] > 0 and all(pair["margin"] >= 0.3 for pair in pairs)


def test_what_is_refused_is_told_together(world: TinyWorld) -> None:
    config = load_config(world.config_file("for-sampling"), [])
    with pytest.raises(InputRefused) as refused:
        sample_responses(config, world.folder / "x.csv", responses=1, prompts=None, form="pairs", least_gap=0.0)
    assert len(refused.value.problems) == 2
    (world.folder / "there.jsonl").write_text("")
    with pytest.raises(InputRefused, match="exists already"):
        sample_responses(config, world.folder / "there.jsonl", responses=2, prompts=1, form="all", least_gap=0.0)
