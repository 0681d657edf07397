"""Saved state is whole across machines: what a rank writes elsewhere than where the driver looks is never counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrlhf import checkpoint
from rayrlhf.actors import language_model, trainer
from rayrlhf.checkpoint import CheckpointStore, NotWhole, Written
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.engine import TrainEngine
from tests.drivers.offline_runs import OfflineWorld
from tests.drivers.runs import TinyWorld


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SEEN_WITHIN_S", 0.3)


# -- the store -------------------------------------------------------------------------------------------------------


def two_ranks(folder: Path, second: Path) -> list[Written]:
    """What two ranks write into ``folder``, the second of them, on another machine, in truth into another one."""
    for rank, where in enumerate((folder, second)):
        (where / "policy").mkdir(parents=True, exist_ok=True)
        (where / f"policy/shard-{rank}").write_bytes(b"x" * (7 + rank))
    return [Written(f"policy/shard-{rank}", 7 + rank, f"policy rank {rank} on node 10.0.0.{rank}") for rank in (0, 1)]


def test_a_checkpoint_counts_once_every_rank_s_files_are_there(tmp_path: Path):
    store = CheckpointStore(tmp_path / "run", keep=1)
    store.save(1, {"step": 1}, lambda folder: two_ranks(folder, folder))
    with pytest.raises(
        NotWhole, match=r"policy rank 1 on node 10.0.0.1 wrote policy/shard-1 with 8 bytes, which isn't in"
    ):
        store.save(2, {"step": 2}, lambda folder: two_ranks(folder, tmp_path / "elsewhere"))
    # The older one isn't dropped for it, and nothing of the torn one is left.
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["step-1"]
    latest, passed_over = store.latest()
    assert latest is not None and latest.step == 1 and not passed_over
    store.save(3, {"step": 3}, lambda folder: two_ranks(folder, folder))
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["step-3"]
    files = json.loads((tmp_path / "run/step-3/manifest.json").read_text())["files"]
    assert files == {"driver.json": 11, "policy/shard-0": 7, "policy/shard-1": 8}


def test_a_file_of_another_size_is_not_that_rank_s(tmp_path: Path):
    def half(folder: Path) -> list[Written]:
        written = two_ranks(folder, folder)
        (folder / "policy/shard-1").write_bytes(b"x")
        return written

    with pytest.raises(NotWhole, match="policy/shard-1 with 8 bytes, which has 1 bytes in"):
        CheckpointStore(tmp_path, keep=1).save(1, {}, half)


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_a_rank_that_sees_another_folder_ends_the_run_before_its_first_step(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Path] = []

    def elsewhere(file: Path, content: str) -> bool:
        asked.append(file)
        return checkpoint.sees(tmp_path / file.name, content)

    monkeypatch.setattr(trainer, "sees", elsewhere)
    with pytest.raises(InputRefused) as caught:
        world.train("apart")
    (problem,) = caught.value.problems  # one a machine
    assert caught.value.started, "all roles were up"
    folder = world.folder / "apart"
    assert problem.startswith(f"run_dir: {folder} is not the same folder on node ")
    assert "policy rank 0 and critic rank 0 would write into it: cluster runs need a shared file system" in problem
    assert {file.parent for file in asked} == {folder} and not list(folder.glob("shared-*"))
    assert not (folder / "metrics.jsonl").exists()


def test_a_role_that_writes_elsewhere_keeps_the_checkpoint_before(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = TrainEngine.save

    def partly_elsewhere(self: TrainEngine, folder: str) -> dict[str, int]:
        lost = folder.endswith("step-4/critic")
        return save(self, str(tmp_path / "local-disk") if lost else folder)

    with monkeypatch.context() as patched:
        patched.setattr(TrainEngine, "save", partly_elsewhere)
        with pytest.raises(RunFailed) as caught:
            world.train("torn", "checkpoint.keep=1")
    said = str(caught.value)
    assert "the checkpoint of step 4 could not be written: critic rank 0 on node " in said
    assert "wrote critic/state/" in said and "run_dir must be one folder" in said and "make room" not in said
    checkpoints = world.folder / "torn/checkpoints"
    assert [f.name for f in checkpoints.iterdir()] == ["step-2"]
    resumed = world.train("torn", "checkpoint.keep=1", resume=True)
    assert "going on after step 2" in resumed.printed and [row["step"] for row in resumed.metrics] == [1, 2, 3, 4]
    # What the roles say they wrote is all that is there, but for the driver's own and DeepSpeed's script.
    files = json.loads((checkpoints / "step-4/manifest.json").read_text())["files"]
    found = {str(f.relative_to(checkpoints / "step-4")) for f in checkpoints.rglob("*") if f.is_file()}
    assert set(files) == found - {"manifest.json"} and sum(name.endswith("optim_states.pt") for name in files) == 2


def test_a_model_that_was_written_elsewhere_is_not_taken_for_written(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = language_model.LanguageModelTrainer.save_model
    monkeypatch.setattr(
        language_model.LanguageModelTrainer, "save_model", lambda self, folder: write(self, str(tmp_path / "model"))
    )
    with pytest.raises(RunFailed, match="the model could not be written into .*model: policy rank 0 on node .* wrote "):
        world.train("no-model", "ppo.steps=1")
    assert not (world.folder / "no-model/model").exists()


def test_a_best_state_that_was_written_elsewhere_is_not_kept(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = TrainEngine.save
    monkeypatch.setattr(
        TrainEngine, "save", lambda self, folder: save(self, str(tmp_path / "disk") if "/kept/" in folder else folder)
    )
    with pytest.raises(RunFailed, match="the state of step 0 could not be kept in .*: policy rank 0 on node .* wrote "):
        OfflineWorld(world.folder).train("not-kept", "dpo")
    assert list((world.folder / "not-kept/kept").iterdir()) == []
