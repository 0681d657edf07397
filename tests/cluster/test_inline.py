"""Roles in the driver's own process, and what needs no process at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from toy_setup import HERE, SETTINGS, samples, toy

from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.spec import RoleSpec, process_env, thread_count, wanted_threads
from rayrlhf.cluster.start import start_groups
from rayrlhf.config.base import ClusterConfig
from rayrlhf.cores import usable_cores
from rayrlhf.errors import InputRefused


def test_ray_is_not_imported():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from toy_setup import *\n"
        "from rayrlhf.cluster.start import start_groups\n"
        "from rayrlhf.cluster.group import wait_any\n"
        "with start_groups([toy('a'), toy('b')], executor='inline', settings=SETTINGS) as groups:\n"
        "    wait_any([groups['a'].submit('columns', samples([1, 2]))])[0].result()\n"
        "    assert len(list(groups['b'].stream('numbers', [samples([1, 2])], chunk=1))) == 2\n"
        "assert 'ray' not in sys.modules and 'vllm' not in sys.modules and not groups\n"
    )
    subprocess.run([sys.executable, "-c", code, HERE], check=True, cwd=os.path.dirname(os.path.dirname(HERE)))


def test_several_ranks_are_refused():
    with pytest.raises(InputRefused) as caught:
        start_groups([toy("policy", 2), toy("critic"), toy("reward", 3)], executor="inline", settings=SETTINGS)
    assert len(caught.value.problems) == 2 and "policy: 2 ranks" in caught.value.problems[0]


def test_environment_is_set_before_the_import_and_the_users_wins(monkeypatch, tmp_path):
    (tmp_path / "reads_env.py").write_text(
        "import os\nNEW, OLD = os.environ['TOY_NEW'], os.environ['TOY_OLD']\n"
        "class Role:\n"
        "    def __init__(self, *, world): self.found = (NEW, OLD, world)\n"
        "    def tell(self): return self.found\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TOY_OLD", "users")
    monkeypatch.setenv("TOY_NEW", "x")  # so that it is removed again after the test
    monkeypatch.delenv("TOY_NEW")
    spec = RoleSpec("r", "reads_env:Role", env={"TOY_NEW": "ours", "TOY_OLD": "ours"})
    with start_groups([spec], executor="inline", settings=SETTINGS) as groups:
        new, old, world = groups["r"].broadcast("tell")[0]
    assert (new, old) == ("ours", "users")
    assert (world.rank, world.size, world.device, world.threads) == (0, 1, "cpu", 1) and world.master_port > 0


def test_what_a_role_finds_wrong_with_its_arguments_is_told_before_any_is_built(tmp_path):
    def spec(name: str, **more: str) -> RoleSpec:
        return RoleSpec(name, "order_roles:Builder", {"name": name, "path": str(tmp_path / "notes"), **more})

    with pytest.raises(RoleFailed, match="two rank 0 failed to start: LookupError: wrong") as caught:
        start_groups([spec("one"), spec("two", wrong="wrong")], executor="inline", settings=SETTINGS)
    assert isinstance(caught.value.__cause__, LookupError) and not (tmp_path / "notes").exists()
    with pytest.raises(InputRefused) as refused:
        both = [spec("one", refused="no such module; no such folder"), spec("two", refused="no package")]
        start_groups(both, executor="inline", settings=SETTINGS)
    assert refused.value.problems == ["one: no such module", "one: no such folder", "two: no package"]
    assert not (tmp_path / "notes").exists()


def test_failed_constructor_keeps_its_exception_and_closes_what_was_up(tmp_path):
    specs = [toy("up", role="Closing", path=str(tmp_path / "mark")), toy("policy", fail_rank=0)]
    with pytest.raises(RoleFailed, match="policy rank 0 failed to start: FileNotFoundError: no weights") as caught:
        start_groups(specs, executor="inline", settings=SETTINGS)
    assert isinstance(caught.value.__cause__, FileNotFoundError) and caught.value.phase == "start"
    assert (tmp_path / "mark.0").exists()


def test_a_breakpoint_in_a_role_stops_there(monkeypatch):
    stopped = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stopped.append(sys._getframe(1).f_code.co_name))
    with start_groups([toy("a")], executor="inline", settings=SETTINGS) as groups:
        groups["a"].broadcast("stop")
    assert stopped == ["stop"]


def test_closed_group_and_equal_names():
    groups = start_groups([toy("a")], executor="inline", settings=SETTINGS)
    group = groups["a"]
    groups.close()
    with pytest.raises(RuntimeError, match="group a is closed"):
        group.call("where", samples([1]))
    with pytest.raises(ValueError, match="names of roles must differ"):
        start_groups([toy("a"), toy("a")], executor="inline", settings=SETTINGS)


def test_spec_is_checked():
    with pytest.raises(ValueError, match="'module:Class', found 'toy_roles.Toy'"):
        RoleSpec("a", "toy_roles.Toy")
    with pytest.raises(ValueError, match="ranks must be at least 1, found 0"):
        RoleSpec("a", "m:C", ranks=0)
    with pytest.raises(ValueError, match="gpus_per_rank must be .* found 1.5"):
        RoleSpec("a", "m:C", gpus_per_rank=1.5)
    with pytest.raises(RoleFailed, match="ImportError: module 'toy_roles' has no class 'Nobody'"):
        start_groups([RoleSpec("a", "toy_roles:Nobody")], executor="inline", settings=SETTINGS)


def test_roles_with_gpus_share_the_one_of_this_process():
    specs = [toy("policy", gpus=1), toy("rollout", gpus=1), toy("reward")]
    with start_groups(specs, executor="inline", settings=SETTINGS) as groups:
        assert [seat.gpus for seat in groups.placement.seats] == [(0,), (0,)]
        assert groups.placement.sharing("policy") == {"rollout"}
    with start_groups([toy("reward")], executor="inline", settings=SETTINGS) as groups:
        assert groups.placement is None
    with pytest.raises(InputRefused, match="rollout: 2 GPUs for one process"):
        start_groups([toy("rollout", gpus=2)], executor="inline", settings=SETTINGS)


def test_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert thread_count(ClusterConfig(threads=3)) == 3
    assert thread_count(ClusterConfig()) == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert thread_count(ClusterConfig()) == usable_cores()
    assert wanted_threads(ClusterConfig()) is None
    env = process_env(RoleSpec("a", "m:C", env={"OMP_NUM_THREADS": "1", "X": "y"}), ClusterConfig(), 3)
    assert env == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "X": "y"}
    assert process_env(RoleSpec("a", "m:C"), ClusterConfig(executor="inline"), 3) == {"OMP_NUM_THREADS": "3"}
    assert process_env(RoleSpec("a", "m:C"), ClusterConfig(), None) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("job", "wanted"), [({}, None), ({"env_vars": {"A": "2"}}, None), ({"env_vars": {"OMP_NUM_THREADS": "6"}}, 6)]
)
def test_threads_that_ray_puts_into_a_job_are_nobody_s_wish(job, wanted):
    """As Ray starts a job's driver: out of an actor without CPUs, in which it has set one thread."""
    inherited = {"OMP_NUM_THREADS": "1", **job.get("env_vars", {})}
    env = {**inherited, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": job, "metadata": {}})}
    assert wanted_threads(ClusterConfig(), env) == wanted
    assert wanted_threads(ClusterConfig(threads=2), env) == 2
    assert wanted_threads(ClusterConfig(), inherited) == (wanted or 1)
