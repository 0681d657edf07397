"""The Ray that a run uses: one of its own on this machine, or a cluster that is there already."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rayrlhf.config.base import ClusterConfig
from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["is_private", "ray_session", "resolve_address"]

log = logging.getLogger(__name__)

CONNECT_SECONDS = 4.0
HEALTH_SECONDS = 10.0
LOAD_SECONDS = 60.0
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the processes of its jobs. There its address comes from Ray itself, and needs no asking."""
STORE_LIMIT = 2 << 30
STORE_SHARE = 0.3

_private = False

# The limit counts from the question on: where the cores are busy, loading Ray alone may take as long.
_ASK = """
import signal, sys
from ray._raylet import GcsClient
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
GcsClient(address=sys.argv[1])
"""

_QUICK = {
    # No idle workers for tasks: roles are actors, and come with processes of their own.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def is_private() -> bool:
    """Whether Ray was started by `ray_session`, for this process alone."""
    return _private


@contextmanager
def ray_session(settings: ClusterConfig) -> Iterator[None]:
    """Ray for the time of a run.

    Where this process is connected already, that Ray is used and left as it is. Without ``settings.address`` a Ray of
    its own is started and ended; several on one machine don't meet. With an address that cluster is joined and left,
    never ended. Ray's own messages go to the log ``rayrlhf.cluster.session``, not to the terminal. The files of a Ray
    of one's own (logs of all roles) are removed after a success and after a refusal, and kept after another error, which
    names them.

    Raises:
        InputRefused: where no Ray answers at the address.
        RunFailed: where a Ray of one's own doesn't come up.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if settings.address is not None:
        address = resolve_address(settings.address)
        if JOB_VARIABLE not in os.environ:
            check_address(address)
        with _quiet():
            _join(address)
            try:
                yield
            finally:
                ray.shutdown()
        return
    with _quiet(), _own_ray(settings):
        yield


@contextmanager
def _own_ray(settings: ClusterConfig) -> Iterator[None]:
    import ray

    global _private
    folder = _short_folder()
    keep = True
    try:
        with _environment(_QUICK):
            try:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=_store_bytes(),
                    num_gpus=None if settings.device == "cuda" else _stand_ins(settings),
                    _temp_dir=folder,
                )
            except Exception as error:  # Ray has no class of its own for this: "the node timed out during startup"
                raise RunFailed(f"Ray did not come up on this machine: {error}. Its logs: {folder}") from error
        _private = True
        yield
        keep = False
    except InputRefused:
        keep = False
        raise
    finally:
        _private = False
        ray.shutdown()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _stand_ins(settings: ClusterConfig) -> int:
    """GPUs that this machine has in name only: on a CPU, as many as the configuration says of its first machine, so that
    roles are placed as they would be on such a machine."""
    return settings.nodes[0].gpus if settings.nodes else 0


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputRefused(f"cluster.address: can't join the Ray at {address}: {error}") from error


def resolve_address(address: str, env: Mapping[str, str] = os.environ) -> str:
    """``host:port`` of a configured address. ``auto`` is RAY_ADDRESS, else what ``ray start`` started on this machine.

    Raises:
        InputRefused: where there is none, or the address is no host:port.
    """
    found = address
    if address == "auto":
        file = os.path.join(env.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        found = env.get("RAY_ADDRESS", "")
        if not found and os.path.exists(file):
            with open(file) as current:
                found = current.read().strip()
        if not found:
            raise InputRefused(
                "cluster.address=auto: no Ray was started on this machine with `ray start`, and RAY_ADDRESS is not "
                "set. Start one, give host:port, or leave cluster.address out: a Ray for this run alone is started then"
            )
    if not re.fullmatch(r"[^:/\s]+:\d{1,5}", found):
        origin = " (it is RAY_ADDRESS)" if found != address else ""
        raise InputRefused(
            f"cluster.address: {found!r} is not host:port{origin}. A Ray that is reached through ray:// or http:// "
            "takes jobs only: use `rayrlhf submit`"
        )
    return found


def check_address(address: str) -> None:
    """Ask the Ray at ``host:port`` whether it is well; Ray itself would try for two minutes, then end the process.

    Raises:
        InputRefused: where it doesn't answer within 15 s.
        RunFailed: where this machine can't even ask.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputRefused(
            f"cluster.address: nothing answers at {address} ({error}). Is Ray up there (`ray status`), and the port "
            "that of its head node (6379 by default)?"
        ) from error
    command = [sys.executable, "-c", _ASK, address, str(HEALTH_SECONDS)]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS + HEALTH_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(
            f"cluster.address: Ray could not be loaded on this machine within {LOAD_SECONDS:g} s"
        ) from error
    answered, said = asked.returncode == 0, asked.stderr.strip().splitlines()[-1:]
    if asked.returncode == -signal.SIGALRM:
        said = [f"no answer within {HEALTH_SECONDS:g} s"]
    if not answered:
        raise InputRefused(
            f"cluster.address: what listens at {address} does not answer as a Ray head node does ({' '.join(said)}). "
            "With token authentication RAY_AUTH_MODE and RAY_AUTH_TOKEN must be the same here as there"
        )


def _store_bytes() -> int:
    """Size of the object store: it lies in shared memory, which containers often keep small."""
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else STORE_LIMIT
    return int(min(STORE_LIMIT, max(STORE_SHARE * shared, 80 << 20)))


def _short_folder() -> str:
    """A new folder with a short name: Ray's sockets lie below it, and their paths have at most 107 characters."""
    base = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="rayrlhf-", dir=base)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables which are set for a while, where the user hasn't set them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's own messages (a worker died, ...) away from the terminal: what matters of them is in our errors."""
    import ray._private.worker as worker

    original = worker.print_to_stdstream
    worker.print_to_stdstream = lambda data, *_, **__: log.debug("ray: %s", " ".join(data.get("lines", [])))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\..*")
        try:
            yield
        finally:
            worker.print_to_stdstream = original
