"""Deaths, deadlines and starts that fail: what is told, and how soon."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil
import pytest
from toy_setup import SETTINGS, running, samples, toy

from rayrlhf.cluster import ray_start
from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.group import Group, wait_any
from rayrlhf.cluster.ray_logs import read_tail
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.cluster.start import start_groups
from rayrlhf.errors import InputRefused, RunFailed


@pytest.fixture(scope="module")
def groups(local_ray):
    specs = [
        toy("killed", 2),
        toy("meeting", 2, "Meeting"),
        toy("parting", 2, "Meeting"),
        toy("late", 1),
        toy("crash", 1),
        toy("broken_stream", 1),
    ]
    with start_groups(specs, executor="ray", settings=SETTINGS) as groups:
        yield groups


def role_processes() -> set[int]:
    """Actor processes that run now, of this test's own Ray: beside it others may run on the machine."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith("ray::RoleProcess"):
                found.add(process.pid)
    return found


def wait_until(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def until_asleep(group: Group, rank: int) -> None:
    """Until a rank's log says that it has got the call: how soon Ray delivers it depends on how busy the cores are."""
    log = group._members.infos[rank].log
    wait_until(lambda: "about to sleep" in read_tail(log), 60.0)


class Within:
    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.begin = time.monotonic()

    def __exit__(self, *error):
        assert time.monotonic() - self.begin < self.seconds


def test_sigkill_in_mid_call(groups):
    pid = groups["killed"].broadcast("describe")[1]["pid"]
    pending = groups["killed"].broadcast_async("sleep", seconds=60)
    until_asleep(groups["killed"], 1)
    os.kill(pid, signal.SIGKILL)
    with Within(30):
        assert wait_any([pending]) == [pending]
    with pytest.raises(RoleFailed) as caught:
        pending.result()
    error = caught.value
    assert (error.role, error.rank, error.phase) == ("killed", 1, "sleep")
    assert "SIGKILL" in error.cause and "killed rank 1 died in sleep" in str(error)
    assert error.log in str(error) and "about to sleep" in str(error)


def test_ranks_meet_and_one_that_dies_in_a_collective_is_the_one_named(groups):
    batch = samples([3, 2, 2])
    assert groups["meeting"].call("add", batch)["total"].tolist() == [int(batch["tokens"].sum())] * 3
    with Within(30), pytest.raises(RoleFailed) as caught:
        groups["meeting"].broadcast("leave", rank=1, how="kill")
    assert (caught.value.rank, caught.value.phase) == (1, "leave") and "died" in str(caught.value)


def test_exception_while_the_other_rank_waits_in_a_collective(groups):
    says = "parting rank 1 failed in leave: FloatingPointError: loss is nan"
    with Within(30), pytest.raises(RoleFailed, match=says) as caught:
        groups["parting"].broadcast("leave", rank=1, how="raise")
    assert (caught.value.role, caught.value.rank, caught.value.phase) == ("parting", 1, "leave")
    with Within(30), pytest.raises(RoleFailed, match=says):  # rank 0 still waits for it
        groups["parting"].broadcast("ping")


def test_deadline_names_the_phase_the_limit_and_the_last_log_lines(groups):
    pending = groups["late"].broadcast_async("sleep", seconds=60, timeout_s=0.5)
    until_asleep(groups["late"], 0)
    with Within(30), pytest.raises(RoleFailed) as caught:
        pending.result()
    assert str(caught.value).startswith("late rank 0 did not answer sleep within 0.5 s (deadline of this call)")
    assert "about to sleep" in str(caught.value) and caught.value.phase == "sleep"


def test_crash_is_told_by_its_signal(groups):
    with Within(30), pytest.raises(RoleFailed, match="crash rank 0 died in end") as caught:
        groups["crash"].broadcast("end", how="segfault")
    assert "crashed with signal SIGSEGV" in caught.value.cause and "Segmentation fault" in str(caught.value)
    with Within(30), pytest.raises(RoleFailed, match="died in end"):
        groups["crash"].call("where", samples([1]))


def test_death_in_a_stream(groups, tmp_path):
    mark = tmp_path / "first chunk is there"
    stream = groups["broken_stream"].stream("die_in_stream", [samples([1, 2])], mark=str(mark))
    with Within(30):
        first = next(stream)
        mark.touch()
        with pytest.raises(RoleFailed, match="broken_stream rank 0 died in die_in_stream"):
            next(stream)
    assert first["index"].tolist() == [0, 1]


def test_failed_start_names_the_role_and_ends_the_others(local_ray, tmp_path):
    mark = tmp_path / "failing"
    specs = [toy("policy"), toy("critic", hang_rank=0), toy("reference", 2, fail_rank=1, mark=str(mark))]
    before = role_processes()
    with pytest.raises(RunFailed) as caught:
        start_groups(specs, executor="ray", settings=SETTINGS)
    assert time.time() - mark.stat().st_mtime < 30
    error = caught.value
    assert (error.role, error.rank, error.phase) == ("reference", 1, "start")
    assert "reference rank 1 failed to start: FileNotFoundError: no weights in /nowhere/model" in str(error)
    assert "toy_roles.py" in str(error) and error.log in str(error)
    wait_until(lambda: role_processes() <= before)


def test_late_start_names_who_is_missing(local_ray, tmp_path, monkeypatch):
    mark = tmp_path / "hanging"

    class OverOnceItHangs(ray_start.Deadline):
        def left(self):
            return 0.0 if mark.exists() else super().left()

    monkeypatch.setattr(ray_start, "Deadline", OverOnceItHangs)
    before = role_processes()
    with pytest.raises(RunFailed) as caught:
        start_groups([toy("slow", hang_rank=0, mark=str(mark))], executor="ray", settings=SETTINGS)
    limit = f"{SETTINGS.start_timeout_s:g} s (deadline cluster.start_timeout_s)"
    assert f"1 of 1 processes were not up within {limit}" in str(caught.value)
    assert "slow rank 0: in its constructor" in str(caught.value) and "loading the last shard" in str(caught.value)
    wait_until(lambda: role_processes() <= before)


def test_module_that_can_not_be_imported(local_ray):
    with pytest.raises(RunFailed, match="ghost rank 0 failed to start: ModuleNotFoundError: .*no_such_module"):
        start_groups([RoleSpec("ghost", "no_such_module:Role")], executor="ray", settings=SETTINGS)


def test_close_calls_the_roles_close_and_ends_all_processes(local_ray, tmp_path):
    mark = str(tmp_path / "mark")
    groups = start_groups([toy("closing", 1, "Closing", path=mark)], executor="ray", settings=SETTINGS)
    pids = groups["closing"].pids
    assert len(pids) == 1 and set(pids) <= role_processes()
    group = groups["closing"]
    groups.close()
    groups.close()
    assert not any(running(pid) for pid in pids)
    assert os.path.exists(f"{mark}.0")
    with pytest.raises(RuntimeError, match="group closing is closed"):
        group.broadcast("ping")


def test_more_gpus_than_there_are_is_refused_before_any_process(local_ray):
    before = role_processes()
    spec = RoleSpec("policy", "toy_roles:Toy", ranks=4, gpus_per_rank=1)
    with pytest.raises(InputRefused, match=r"no GPUs, but 4 are needed \(policy 4\)"):
        start_groups([spec], executor="ray", settings=SETTINGS)
    assert role_processes() <= before  # those of earlier tests may still be ending
