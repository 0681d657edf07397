"""Roles that share GPUs are built one after the other, each after the one before has left them."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_setup import HERE

from rayrlhf.cluster import ray_start
from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.session import ray_session
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.cluster.start import start_groups
from rayrlhf.config.base import ClusterConfig, NodeConfig
from rayrlhf.errors import InputRefused

SETTINGS = ClusterConfig(threads=1, nodes=[NodeConfig(gpus=3)], start_timeout_s=600, call_timeout_s=60)
PATH = os.pathsep.join([HERE, os.path.dirname(os.path.dirname(HERE))])
SHARED = [["one", "two"]]
LONG = 280.0
SOON = 30.0
"""Seconds between a death and the error, while another role is being built: 10 on idle cores, which other tests may be using."""


@pytest.fixture(scope="module", autouse=True)
def ray_with_gpus() -> Iterator[None]:
    with ray_session(SETTINGS):
        yield


class Notes:
    def __init__(self, folder: Path):
        self.file = folder / "notes"
        self.pids = {name: folder / f"{name}.pid" for name in ("one", "two", "apart")}

    def spec(self, name: str, ranks: int = 1, gpus: int = 1, build: str = "Builder", **more: Any) -> RoleSpec:
        """A role that can leave its GPUs, where it has some; ``two`` is built before ``one``."""
        env = {"PYTHONPATH": PATH, "ORDER_PID": str(self.pids[name])}
        arguments = {"name": name, "path": str(self.file), **more}
        rest = ("leave", {"how": "quietly"}) if gpus else None
        return RoleSpec(name, f"order_roles:{build}", arguments, ranks, env, gpus, rest=rest)

    def lines(self, *names: str) -> list[str]:
        found = self.file.read_text().splitlines() if self.file.exists() else []
        return [line for line in found if line.split()[0] in names]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path)


def test_each_leaves_before_the_next_is_built(notes: Notes):
    specs = [notes.spec("one", ranks=2), notes.spec("two"), notes.spec("apart", gpus=0)]
    with start_groups(specs, executor="ray", settings=SETTINGS, sharing=SHARED):
        shared = notes.lines("one", "two")
    assert shared[:3] == ["two begins", "two is up", "two leaves quietly"]
    # Its two ranks are built at the same time, and leave when both are up.
    assert sorted(shared[3:7]) == ["one begins"] * 2 + ["one is up"] * 2 and shared[7:] == ["one leaves quietly"] * 2
    assert notes.lines("apart") == ["apart begins", "apart is up"]


def test_who_stays_is_built_one_after_the_other_too(notes: Notes):
    settings = SETTINGS.model_copy(update={"offload_idle": False})
    specs = [notes.spec("one"), notes.spec("two")]
    with start_groups(specs, executor="ray", settings=settings, sharing=SHARED):
        pass
    assert notes.lines("one", "two") == ["two begins", "two is up", "one begins", "one is up"]


def test_a_module_without_the_class_is_told_before_its_turn(notes: Notes):
    began = time.monotonic()
    with pytest.raises(RoleFailed, match="one rank 0 failed to start: ImportError: .* has no class 'Nobody'"):
        specs = [notes.spec("one", build="Nobody"), notes.spec("two", seconds=LONG)]
        start_groups(specs, executor="ray", settings=SETTINGS, sharing=SHARED)
    assert time.monotonic() - began < LONG / 2


def test_what_a_role_finds_wrong_with_its_arguments_is_told_before_its_turn(notes: Notes):
    """``one`` is the last to be built; its constructor is never called."""
    began = time.monotonic()
    with pytest.raises(RoleFailed) as caught:
        specs = [notes.spec("one", wrong="no module of this name"), notes.spec("two", seconds=LONG)]
        start_groups(specs, executor="ray", settings=SETTINGS, sharing=SHARED)
    assert time.monotonic() - began < LONG / 2
    assert caught.value.role == "one" and caught.value.phase == "start" and caught.value.log
    assert "failed to start: LookupError: no module of this name" in str(caught.value)
    assert "order_roles.py" in str(caught.value) and "in check: raise LookupError(wrong)" in str(caught.value)
    assert notes.lines("one") == [] and "two is up" not in notes.lines("two")


def test_what_roles_refuse_is_refused_and_each_problem_told_once(notes: Notes):
    """Both ranks of ``one`` say the same."""
    specs = [notes.spec("one", 2, refused="no such module; no such folder"), notes.spec("two", seconds=LONG)]
    with pytest.raises(InputRefused) as caught:
        start_groups(specs, executor="ray", settings=SETTINGS, sharing=SHARED)
    assert [re.sub("rank [01] on [0-9.]+:", "rank R on NODE:", problem) for problem in caught.value.problems] == [
        "one rank R on NODE: no such module",
        "one rank R on NODE: no such folder",
    ]
    assert notes.lines("one") == [] and caught.value.started  # others were: not that nothing was started


@pytest.mark.parametrize("dies", ["one", "apart"])
def test_who_dies_while_nothing_is_asked_of_it_ends_the_start(notes: Notes, dies: str):
    """``one`` before its turn, or ``apart`` when it is up; ``two`` is being built all the while."""
    killed: list[float] = []

    def kill() -> None:
        while not (notes.lines("two") and len(notes.lines("apart")) == 2):
            time.sleep(0.02)
        time.sleep(1.0)
        killed.append(time.monotonic())
        os.kill(int(notes.pids[dies].read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    specs = [notes.spec("one"), notes.spec("two", seconds=LONG), notes.spec("apart", gpus=0)]
    with pytest.raises(RoleFailed, match=f"{dies} rank 0 died while starting: .*SIGKILL"):
        start_groups(specs, executor="ray", settings=SETTINGS, sharing=SHARED)
    assert time.monotonic() - killed[0] < SOON


def test_a_late_start_names_who_is_at_it_and_not_who_waits(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    ready: list[set[str]] = []
    build_ready = ray_start._Start._build_ready

    def noting(start: ray_start._Start) -> None:
        build_ready(start)
        ready.append(set(start.ready))

    class OverOnceItIsBuilt(ray_start.Deadline):
        def left(self) -> float:
            return 0.0 if notes.lines("two") and ready and ready[-1] == {"one"} else super().left()

    monkeypatch.setattr(ray_start._Start, "_build_ready", noting)
    monkeypatch.setattr(ray_start, "Deadline", OverOnceItIsBuilt)
    with pytest.raises(RoleFailed) as caught:
        start_groups(
            [notes.spec("one"), notes.spec("two", seconds=LONG)], executor="ray", settings=SETTINGS, sharing=SHARED
        )
    assert caught.value.role == "two" and "two rank 0: in its constructor" in str(caught.value)
    assert "one rank 0: waiting until two has left its GPUs" in str(caught.value)
