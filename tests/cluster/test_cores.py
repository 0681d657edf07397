"""How many cores a process may use: what it is bound to, and the CPU limits of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from rayrlhf import cores
from rayrlhf.cores import cpu_limit, usable_cores


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        # Version 2: in a container of its own namespace, in one of a machine, and nothing said.
        ("0::/", {"cpu.max": "400000 100000"}, 4.0),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "50000 10000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "max 100000", "other/cpu.max": "100000 100000"}, math.inf),
        ("0::/../../x", {"x/cpu.max": "200000 100000"}, 2.0),
        # Version 1: with the path of the container's host, with a group below the top, and nothing said.
        (
            "4:memory:/m\n3:cpu,cpuacct:/docker/f00",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "2:cpu:/a\n1:name=systemd:/\n0::/",
            {
                "cpu/a/cpu.cfs_quota_us": "20000",
                "cpu/a/cpu.cfs_period_us": "10000",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        ("2:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "1"}, math.inf),
    ],
)
def test_the_limits_of_control_groups(tmp_path: Path, own: str, files: dict[str, str], limit: float):
    (tmp_path / "self").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text + "\n")
    assert cpu_limit(tmp_path / "mounted", tmp_path / "self") == limit


def test_another_system_has_no_limit(tmp_path: Path):
    assert cpu_limit(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(("limit", "usable"), [(math.inf, 8), (12.0, 8), (3.7, 3), (0.2, 1)])
def test_the_smaller_of_what_is_bound_and_what_is_allowed(monkeypatch, limit: float, usable: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "cpu_limit", lambda: limit)
    assert usable_cores() == usable
