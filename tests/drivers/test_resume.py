"""A run that is killed and goes on is the run that was never interrupted."""

from __future__ import annotations

import signal

import pytest

from rayrlhf.config import dump_config, load_config
from rayrlhf.drivers.checks import check_run_dir
from rayrlhf.drivers.submit import _as_job
from rayrlhf.errors import InputRefused
from tests.conftest import ROOT
from tests.drivers.runs import Finished, TinyWorld

REWARD = "reward.sources.0.function=tests.drivers.runs:kills_the_process"
CHUNKS_A_STEP = 4
CHUNKS_AN_EVALUATION = 2


@pytest.fixture(scope="module")
def whole(world: TinyWorld) -> Finished:
    """Four steps without interruption."""
    return world.train("whole", REWARD)


def test_the_same_seed_gives_the_same_run(world: TinyWorld, whole: Finished):
    again = world.train("again", REWARD)
    assert again.numbers == whole.numbers
    assert again.evaluations == whole.evaluations
    assert again.same_weights(whole)
    other = world.train("other-seed", REWARD, "seed=4", "ppo.steps=2")
    assert other.numbers[0]["score/mean"] != whole.numbers[0]["score/mean"]


def test_killed_and_resumed_equals_never_interrupted(world: TinyWorld, whole: Finished):
    # Dead in the middle of step 4, after the checkpoint of step 2: steps 3 and 4 are made again.
    at = CHUNKS_AN_EVALUATION + 3 * CHUNKS_A_STEP + 2
    killed = world.command("killed", REWARD, env={"DIES_AT_CALL": str(at)})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = Finished(world.folder / "killed")
    assert [row["step"] for row in left.metrics] == [1, 2, 3]
    resumed = world.command("killed", REWARD, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 2" in resumed.stdout
    assert left.numbers == whole.numbers
    assert left.evaluations == whole.evaluations
    assert left.same_weights(whole)


def test_a_torn_checkpoint_is_passed_over_and_named(world: TinyWorld, whole: Finished):
    torn = world.train("torn", REWARD, "ppo.steps=4")
    newest = torn.folder / "checkpoints" / "step-4"
    shard = next(newest.rglob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-100])
    resumed = world.train("torn", REWARD, resume=True)
    assert "step-4 is not whole and was passed over" in resumed.printed and shard.name in resumed.printed
    assert "going on after step 2" in resumed.printed
    assert resumed.numbers == whole.numbers
    assert resumed.same_weights(whole)


def test_resume_refuses_another_configuration(world: TinyWorld, whole: Finished):
    with pytest.raises(InputRefused) as refused:
        world.train("whole", REWARD, "ppo.gamma=0.5", "seed=9", resume=True)
    assert len(refused.value.problems) == 2
    assert "ppo.gamma is 0.5, but the run in" in str(refused.value) and "seed is 9" in str(refused.value)


def test_a_run_s_folder_may_be_named_in_another_way(tmp_path, monkeypatch):
    """A job has the absolute path of what the command here names from the folder in which it is given."""
    monkeypatch.chdir(tmp_path)
    here = load_config(ROOT / "tests" / "config" / "base.yaml", ["run_dir=runs/a"])
    there = _as_job(here, tmp_path, resume=True)
    assert there.run_dir == str(tmp_path / "runs" / "a") != here.run_dir
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    for begun, resumed in ((here, there), (there, here)):
        dump_config(begun, folder / "config.yaml")
        check_run_dir(resumed, resume=True)
        with pytest.raises(InputRefused, match=r"--resume: seed is 9, but the run in .*runs/a has 0$"):
            check_run_dir(resumed.model_copy(update={"seed": 9}), resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(world: TinyWorld, whole: Finished):
    with pytest.raises(InputRefused, match="holds a run already"):
        world.train("whole", REWARD)
