"""How many cores a process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["cpu_limit", "usable_cores"]

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores of this machine that this process may use. A container's CPU limit counts, which hides none of the cores: it gives
    less time on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_limit())))


def cpu_limit(mounted: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> float:
    """Seconds of CPU time a second that the process's control groups allow, and those above them; infinity without a limit.

    Args:
        mounted: where Linux shows its control groups, of version 1, 2 or both.
        own: names this process's, one hierarchy a line: ``number:controllers:path``, without controllers for version 2.
    """
    if not own.exists():  # another system than Linux
        return math.inf
    limits = [math.inf]
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops = {mounted}
        elif "cpu" in controllers.split(","):
            tops = {mounted / "cpu", mounted / controllers}
        else:
            continue
        # In a container the path may be that on its host, which isn't there; its own limits are at the top then.
        group = Path(os.path.normpath(path))
        limits += [_limit(top / above.relative_to("/")) for top in tops for above in (group, *group.parents)]
    return min(limits)


def _limit(group: Path) -> float:
    """What one group allows: microseconds of CPU time (``max`` or -1: any) in each period."""
    found = _words(group / "cpu.max") or [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
    if len(found) != 2 or "max" in found:
        return math.inf
    quota, period = map(int, found)
    return quota / period if quota > 0 else math.inf


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:  # no such group here, or none that limits the CPU
        return []
