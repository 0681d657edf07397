"""What the machine and the processes say of themselves: hardware, memory, and who else used the cores."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets that matter to matrix products, memory, operating system."""
    cpu = Path("/proc/cpuinfo")
    rows = [line.split(":", 1) for line in cpu.read_text().splitlines() if ":" in line] if cpu.exists() else []
    facts = {key.strip(): value.strip() for key, value in rows}
    sets = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": facts.get("model name", platform.processor()),
        "cores": psutil.cpu_count(),
        "instruction_sets": [name for name in sets if name in facts.get("flags", "").split()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants that are alive."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree, ended children included."""
    total = 0.0
    for process in tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class CoreWatch:
    """How much of the machine's cores somebody else used while a process tree was at work."""

    def __init__(self, pid: int):
        self.pid = pid
        self.own, self.busy, self.idle = self._now()

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user already
        return cpu_seconds(self.pid), sum(times) - idle - guests, idle

    def read(self) -> dict[str, float]:
        """Since the start: the tree's own CPU seconds, and others' share of all cores, 0 to 1, stolen time too."""
        own, busy, idle = self._now()
        busy, idle, own = busy - self.busy, idle - self.idle, own - self.own
        return {"cpu_seconds": own, "others": max(0.0, busy - own) / max(busy + idle, 1e-9)}


def memory(pid: int) -> dict[str, Any]:
    """Memory of a process tree: each process's peak RSS, and what all hold at present with shared pages counted once.

    Returns:
        ``processes``: [{name, peak_mib}], largest first; ``peak_sum_mib``, an upper bound, since shared pages count in
        each process; ``together_mib``, the sum of PSS.
    """
    processes: list[dict[str, Any]] = []
    together = 0.0
    for process in tree(pid):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            together += process.memory_full_info().pss / 2**20
            name = (process.cmdline() or [process.name()])[0]
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
            continue
        peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0) / 1024
        processes.append({"name": name if name.startswith("ray::") else Path(name).name, "peak_mib": round(peak)})
    processes.sort(key=lambda row: -row["peak_mib"])
    return {
        "processes": processes,
        "peak_sum_mib": sum(row["peak_mib"] for row in processes),
        "together_mib": round(together),
    }
