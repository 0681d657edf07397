"""A run's folder is one folder for all machines that write into it, or what they write is lost."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from rayrlhf.checkpoint import Written
from rayrlhf.cluster import Group
from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["check_shared_folder", "written"]


def check_shared_folder(folder: Path, groups: Mapping[str, Group], trained: Sequence[str]) -> None:
    """Let every rank that will write below a run's folder read a file that this process has just written there.

    Args:
        folder: the run's.
        groups: the roles of the run.
        trained: which of them write.

    Raises:
        InputRefused: naming the machines on which the folder is another one, and who is there.
    """
    token = secrets.token_hex(16)
    probe = folder.absolute() / f"shared-{token}"
    try:
        probe.write_text(token, encoding="utf-8")
        asked = {name: groups[name] for name in trained if name in groups}
        calls = {name: group.broadcast_async("sees", file=str(probe), content=token) for name, group in asked.items()}
        apart: dict[str, list[str]] = {}
        for name, call in calls.items():
            for rank, seen in enumerate(call.result()):
                if not seen:
                    apart.setdefault(asked[name].addresses[rank], []).append(f"{name} rank {rank}")
    finally:
        probe.unlink(missing_ok=True)
    if apart:
        raise InputRefused(
            f"run_dir: {folder} is not the same folder on node {machine}, where {' and '.join(ranks)} would write into it: "
            "cluster runs need a shared file system"
            for machine, ranks in apart.items()
        )


def written(group: Group, answers: Sequence[Mapping[str, int]], prefix: str = "") -> list[Written]:
    """What the ranks of a group say that they wrote.

    Args:
        answers: of each of the first ranks: bytes by the file's name.
        prefix: of these names below the folder that the driver has in mind.

    Raises:
        RunFailed: where one of them wrote nothing.
    """
    files: list[Written] = []
    for rank, found in enumerate(answers):
        by = f"{group.name} rank {rank} on node {group.addresses[rank]}"
        if not found:
            raise RunFailed(f"{by} wrote nothing into {prefix or 'the folder'}")
        files += [Written(f"{prefix}{name}", size, by) for name, size in found.items()]
    return files
