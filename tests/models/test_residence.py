"""Roles that leave their device and come back: nothing is lost, nothing is where it shouldn't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayrlhf.errors import RunFailed
from rayrlhf.models import residence as residence_module
from rayrlhf.models.residence import Residence
from tests.models.making import LENGTHS, alone, parts_of, settings, training_batch
from tests.models.rank_cases import as_columns, make_role, weights_of
from tests.models.ranks import Ranks
from tests.models.zero_cases import away_and_back, bytes_held, frozen_role

ALL = list(range(len(LENGTHS)))
OPTIMIZER = {"lr": 1e-2, "max_grad_norm": 0.05, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("policy", {"zero_stage": 1, "dtype": "bfloat16"}),
        ("policy", {"zero_stage": 2}),
        ("policy", {"zero_stage": 3, "dtype": "bfloat16"}),
        ("policy", {"zero_stage": 3, "lora": {"rank": 4}}),
        ("policy", {"zero_stage": 2, "offload_optimizer": "cpu"}),
        ("policy", {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}),
        ("critic", {"zero_stage": 2}),
    ],
)
def test_training_goes_on_as_if_it_had_never_left(
    llama: Path, tmp_path: Path, kind: str, policy: dict[str, Any]
) -> None:
    """Bit for bit, over all ways between the levels, with saving and loading in between."""
    # Of a model with adapters it is the weights that are large.
    check(away_and_back(alone(), **case(llama, tmp_path, kind, policy)), 0.95 if "lora" in policy else 0.7)


@pytest.mark.parametrize("stage", [2, 3])
def test_on_two_ranks(llama: Path, tmp_path: Path, two_ranks: Ranks, stage: int) -> None:
    for found in two_ranks.run(away_and_back, **case(llama, tmp_path, "policy", {"zero_stage": stage}, ranks=2)):
        check(found)


def case(path: Path, run_dir: Path, kind: str, role: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    section = {"tokens_per_micro_batch": 40, "optimizer": OPTIMIZER, **role}
    halves = [[0, 2, 4, 6], [1, 5, 7, 3]]
    parts = [[half] if ranks == 1 else [half[:1], half[1:]] for half in halves]
    return {"kind": kind, "path": str(path), "settings": settings(path, run_dir, policy=section, critic=section),
            "columns": as_columns(training_batch()), "parts": parts}  # fmt: skip


def check(found: dict[str, Any], share_of_weights: float = 0.7) -> None:
    assert found["metrics"][0] == found["metrics"][1]
    assert not found["differing"] and found["moved"] > 1e-4
    assert found["same_outputs"]
    all_bytes, weights, none, back = found["bytes"]
    assert none < 0.01 * all_bytes and none < weights < share_of_weights * all_bytes and back == all_bytes


def test_what_needs_more_is_refused(llama: Path, tmp_path: Path) -> None:
    run = settings(llama, tmp_path)
    policy, critic = make_role(alone(), "policy", str(llama), run), make_role(alone(), "critic", str(llama), run)
    batch, step = training_batch(), parts_of(ALL)
    for name, role, forward in (
        ("policy", policy, policy.token_logprobs),  # type: ignore[attr-defined]
        ("critic", critic, critic.values),  # type: ignore[attr-defined]
    ):
        role.set_residence("weights")
        forward(batch)
        for call, what in (
            (lambda r=role: r.update(batch, step, 1), "an update"),
            (lambda r=role: r.save(str(tmp_path / "state")), "saving the training state"),
            (lambda r=role: r.load(str(tmp_path / "state")), "loading the training state"),
        ):
            with pytest.raises(
                RunFailed, match=f"{name}: {what} needs residence 'all', but its residence is 'weights'"
            ):
                call()
        role.set_residence("none")
        with pytest.raises(
            RunFailed, match=f"{name}: a forward needs residence 'weights', but its residence is 'none'"
        ):
            forward(batch)
        if role is policy:
            with pytest.raises(RunFailed, match="policy: saving the model needs residence 'weights'"):
                policy.save_model(str(tmp_path / "model"))  # type: ignore[attr-defined]
        role.set_residence("all")
        assert role.update(batch, step, 1)["optimizer_steps"] == 1.0
        with pytest.raises(ValueError, match="residence 'gpu': legal are none, weights, all"):
            role.set_residence("gpu")  # type: ignore[arg-type]


def test_on_a_cpu_nothing_moves_unless_told(llama: Path, tmp_path: Path) -> None:
    role = make_role(alone(), "policy", str(llama), settings(llama, tmp_path))
    before = bytes_held(role)
    role.set_residence("none")
    assert bytes_held(role) == before and role.trainer.residence.level == "none"
    assert weights_of(role)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_model_leaves_and_comes_back(llama: Path, tmp_path: Path, stage: int) -> None:
    role, batch = (
        frozen_role(alone(), "reference", str(llama), settings(llama, tmp_path), zero_stage=stage),
        training_batch(),
    )
    if stage == 0:  # as it is after a copy to a device: no longer the file's own pages, which can't be freed
        for parameter in role.frozen.model.parameters():
            parameter.data = parameter.data.clone()
    before = [role.token_logprobs(batch)["reference_logprobs"] for _ in range(3)][
        -1
    ]  # ZeRO-3 learns from the first two
    role.frozen.residence.moves = True
    held = lambda: sum(  # noqa: E731
        getattr(p, "ds_tensor", p).untyped_storage().nbytes() + p.untyped_storage().nbytes()
        for p in role.frozen.model.parameters()
    )
    full = held()
    for _ in range(2):
        role.set_residence("none")
        assert held() == 0
        role.set_residence("weights")
        assert held() == full and torch.equal(role.token_logprobs(batch)["reference_logprobs"], before)


def test_views_are_the_same_views_afterwards() -> None:
    """By hand: a flat buffer, two parameters that lie in it, and a view that nothing but this test knows of."""
    flat = torch.arange(10.0)
    model = nn.Module()
    model.a, model.b = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[4:])
    model.register_buffer("c", torch.ones(3))
    hidden, states = flat[2:6], {"moments": [torch.full((5,), 7.0)]}
    residence = Residence("policy", model, states, torch.device("cpu"), moves=True)
    for level, weights, moments in (
        ("weights", 40, 0),
        ("none", 0, 0),
        ("weights", 40, 0),
        ("all", 40, 20),
        ("none", 0, 0),
    ):
        residence.set(level)  # type: ignore[arg-type]
        assert flat.untyped_storage().nbytes() == weights, level
        assert bool(model.c.untyped_storage().nbytes()) == bool(weights), level
        assert states["moments"][0].untyped_storage().nbytes() == moments, level
    residence.set("all")
    assert (
        model.a.tolist() == [[0, 1], [2, 3]]
        and model.b.tolist() == [4, 5, 6, 7, 8, 9]
        and model.c.tolist() == [1, 1, 1]
    )
    assert states["moments"][0].tolist() == [7] * 5
    with torch.no_grad():
        model.b[0] = -1.0
        model.a[1, 1] = -2.0
    assert hidden.tolist() == [2, -2, -1, 5] and flat[3] == -2


def test_host_memory_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage of several pieces and a rest comes back as it was; pieces that are free are used again, by whatever storage."""
    monkeypatch.setattr(residence_module, "PIECE", 16)
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.arange(9.0)), nn.Parameter(torch.arange(100.0, 104.0))  # 36 and 16 bytes
    residence = Residence("policy", model, None, torch.device("cpu"), moves=True)
    taken: list[int] = []
    new_piece = residence._new_piece
    monkeypatch.setattr(residence, "_new_piece", lambda size: taken.append(size) or new_piece(size))
    for _ in range(3):
        residence.set("none")
        assert not model.a.untyped_storage().nbytes() and not model.b.untyped_storage().nbytes()
        residence.set("all")
        assert model.a.tolist() == list(range(9)) and model.b.tolist() == [100, 101, 102, 103]
    assert sorted(taken) == [4, 16, 16, 16]
