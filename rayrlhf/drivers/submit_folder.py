"""The folder that travelled with a job, as every process of the job sees it.

As a program it prints the address of the Ray cluster in which the job runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["HOOK", "enter", "own_address"]

HOOK = "rayrlhf.drivers.submit_folder.enter"
"""For Ray's ``worker_process_setup_hook``."""
_FOLDER = Path(__file__).resolve().parents[2]
_SESSION = (_FOLDER / ".." / ".." / "..").resolve()
"""The Ray session's folder, below which Ray unpacks what travels."""


def enter() -> None:
    """Work in the folder in which this library lies: relative paths of the configuration are meant from there."""
    os.chdir(_FOLDER)


def own_address(session: Path = _SESSION, environment: Mapping[str, str] = os.environ) -> str:
    """``host:port`` of the cluster in which this job runs.

    Ray tells a job, in RAY_ADDRESS, what cluster it finds on the head's machine: where several run there, any of them. The
    session's folder has the port of its own head node.
    """
    told = environment["RAY_ADDRESS"]
    ports = sorted(session.glob("gcs_server_port_*"), key=lambda file: file.stat().st_mtime)
    port = ports[-1].read_text().strip() if ports else ""
    if not port or told.endswith(f":{port}"):
        return told
    import ray

    return f"{ray.util.get_node_ip_address()}:{port}"


if __name__ == "__main__":
    print(own_address())
