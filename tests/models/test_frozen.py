"""Models that nothing trains, spread over the ranks: what each of them computes is what a whole one computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.errors import RunFailed
from tests.models.making import LENGTHS, alone, settings, training_batch
from tests.models.rank_cases import as_columns
from tests.models.ranks import Ranks
from tests.models.zero_cases import frozen_results, frozen_role

ALL = list(range(len(LENGTHS)))
SPLITS = [[[0, 2, 4, 6, 7], [1, 3, 5]], [[], ALL]]
"""Ragged, and a rank without samples."""


def columns() -> dict[str, Any]:
    batch = training_batch()
    return as_columns(batch)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("kind", ["reference", "measure", "reward"])
def test_spread_over_ranks_it_computes_the_same(
    llama: Path, scorer: Path, tmp_path: Path, two_ranks: Ranks, kind: str, offload: str
) -> None:
    path = str(scorer if kind == "reward" else llama)
    run = settings(llama, tmp_path, reference={"tokens_per_micro_batch": 20})
    budget = {"tokens_per_micro_batch": 20}
    spread = {"zero_stage": 3, "offload_parameters": offload, **budget}
    common: dict[str, Any] = {"kind": kind, "path": path, "settings": run, "columns": columns()}
    whole = frozen_results(alone(), parts=[ALL], how=budget, **common)
    assert whole["held"] == whole["all"] and np.abs(whole["results"][0]).max() > 0.1
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    found = [(frozen_results(alone(), parts=[ALL], how=spread, **common), ALL)]
    assert found[0][0]["held"] == whole["all"]
    for split in SPLITS:
        results = two_ranks.run(frozen_results, parts=split, how=spread, **common)
        assert sum(r["held"] for r in results) < 1.02 * whole["all"]
        found += list(zip(results, split, strict=True))
    for result, samples in found:
        if kind == "reward":
            expected = whole["results"][0][samples]
        else:
            expected = np.concatenate([np.zeros(0), *(whole["results"][0][starts[i] : starts[i + 1]] for i in samples)])
        for values in result["results"]:
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["reference", "reward"])
@pytest.mark.parametrize("stage", [0, 3])
def test_in_bfloat16(llama: Path, scorer: Path, tmp_path: Path, kind: str, stage: int) -> None:
    """The same numbers, bit for bit, as from a model that is whole: gathering rounds nothing."""
    path, batch = str(scorer if kind == "reward" else llama), training_batch()
    roles = [
        frozen_role(alone(), kind, path, settings(llama, tmp_path), dtype="bfloat16", zero_stage=s) for s in (0, stage)
    ]
    results = [
        r.score(batch)["score"] if kind == "reward" else r.token_logprobs(batch)["reference_logprobs"] for r in roles
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6 if stage == 0 else 0.05)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["reference", "reward"])
def test_away_from_its_device_it_computes_nothing(
    llama: Path, scorer: Path, tmp_path: Path, kind: str, stage: int
) -> None:
    role = frozen_role(
        alone(), kind, str(scorer if kind == "reward" else llama), settings(llama, tmp_path), zero_stage=stage
    )
    call = role.score if kind == "reward" else role.token_logprobs
    batch = training_batch()
    before = call(batch)
    role.set_residence("none")
    with pytest.raises(RunFailed, match=f"{kind}: a forward needs residence 'weights', but its residence is 'none'"):
        call(batch)
    for level in ("weights", "all"):
        role.set_residence(level)
        for name in before.keys():  # noqa: SIM118
            assert torch.equal(call(batch)[name], before[name])
