"""A Ray cluster of several nodes on this machine, with GPUs that aren't there: to try placement and jobs without a cluster.

    python launch/fake_cluster.py 2 2 2                # three nodes with two GPUs each
    python launch/fake_cluster.py 0 4 --port 9000      # another port for the dashboard; 0 takes a free one

The addresses are printed as a line of JSON once all nodes are up. Ctrl-C, or the end of the standard input where that is a
pipe, ends them all. Roles with ``cluster.device: cpu`` run on such GPUs (configs/ppo_fake_cluster.yaml).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading

from ray._common.utils import get_default_ray_temp_dir, try_to_create_directory
from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20
"""Object store of each node; Ray's smallest is 75 MB."""

QUICK = {
    # No idle workers for tasks, one a CPU of each node: roles are actors, and come with processes of their own.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main() -> None:
    """Start the nodes, say where they are, and wait."""
    options = argparse.ArgumentParser(description="A Ray cluster on this machine, with GPUs that aren't there.")
    options.add_argument("gpus", type=int, nargs="+", help="GPUs of each node; the first is the head")
    options.add_argument("--port", type=int, default=8265, help="port of the dashboard")
    options.add_argument("--cpus", type=int, default=4, help="CPUs that each node says it has")
    given = options.parse_args()
    for name, value in QUICK.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Wherever a cluster has its folder, Ray notes its address in this one, which may not be there yet.
    try_to_create_directory(get_default_ray_temp_dir())
    # A folder of its own: Ray takes the cluster that was started last in a folder for the one that is meant.
    # Sockets lie below it, and their paths have at most 107 characters.
    base = "/tmp" if os.access("/tmp", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="rayfake-", dir=base, ignore_cleanup_errors=True) as folder:
        cluster = Cluster()
        # A worker's own port for its dashboard agent: all nodes have the same address.
        shared = {"num_cpus": given.cpus, "object_store_memory": STORE_BYTES, "dashboard_agent_listen_port": 0}
        shared["temp_dir"] = folder
        with contextlib.suppress(KeyboardInterrupt):
            try:
                head = cluster.add_node(
                    num_gpus=given.gpus[0], include_dashboard=True, dashboard_port=given.port, **shared
                )
                for count in given.gpus[1:]:
                    cluster.add_node(num_gpus=count, **shared)
                addresses = {"dashboard": f"http://{head.webui_url}", "address": cluster.address, "pid": os.getpid()}
                print(json.dumps(addresses), flush=True)
                if sys.stdin.isatty():
                    threading.Event().wait()
                sys.stdin.read()
            finally:
                cluster.shutdown()


if __name__ == "__main__":
    main()
