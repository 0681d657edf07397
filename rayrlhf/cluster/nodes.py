"""The machines of a Ray cluster: which there are, what is free on them, and whether they still answer."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import selectors
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

__all__ = ["Node", "NodeWatch", "all_nodes", "free_gpus", "live_nodes", "lost_nodes", "own_gpu_ids", "unanswering"]

ANSWER_SECONDS = 1.5
"""How long a node may take to accept a connection."""
ASK_SECONDS = 1.5
"""Pause between two rounds of a watch."""
CHANCES = 2
"""Rounds in a row without an answer after which a node counts as lost."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    name: str
    """Its address; with a part of its id where several nodes are at one address."""
    address: str
    port: int
    """Where its raylet listens."""
    gpus: int
    """In all, free or not."""
    cpus: float
    """0: its owner wants nothing to be put there that can be elsewhere."""


def all_nodes() -> list[Node]:
    """The nodes that Ray holds for alive: this one first, then by address.

    Ray notices a node that is gone after 4 s to half a minute only: see `live_nodes`.
    """
    here = ray.get_runtime_context().get_node_id()
    found = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in found]
    nodes = [
        Node(
            id=node["NodeID"],
            name=address if addresses.count(address) == 1 else f"{address} (node {node['NodeID'][:6]})",
            address=address,
            port=int(node["NodeManagerPort"]),
            gpus=int(node["Resources"].get("GPU", 0)),
            cpus=node["Resources"].get("CPU", 0.0),
        )
        for node, address in zip(found, addresses, strict=True)
    ]
    return sorted(nodes, key=lambda node: (node.id != here, _address_key(node.address), node.id))


def live_nodes() -> list[Node]:
    """`all_nodes` without those that don't answer."""
    nodes = all_nodes()
    gone = unanswering(nodes)
    return [node for node in nodes if node.id not in gone]


def free_gpus(nodes: Sequence[Node]) -> dict[str, int]:
    """Whole GPUs that nobody holds, by node id; what Ray has heard of lags behind by a fraction of a second."""
    free: dict[str, dict[str, Any]] = ray._private.state.available_resources_per_node()
    return {node.id: int(free.get(node.id, {}).get("GPU", 0)) for node in nodes}


def own_gpu_ids() -> list[str]:
    """The GPUs that Ray has given to the process which asks."""
    return ray.get_runtime_context().get_accelerator_ids()["GPU"]


def lost_nodes(ids: Iterable[str]) -> dict[str, str]:
    """Those nodes which don't answer, or which Ray itself knows to be gone: their names, by id."""
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = {node.id: node for node in all_nodes()}
    wanted = set(ids)
    silent = unanswering(nodes[node] for node in wanted if node in nodes)
    return {
        node: nodes[node].name if node in nodes else names.get(node, node)
        for node in wanted
        if node in silent or node not in nodes
    }


def unanswering(nodes: Iterable[Node], seconds: float = ANSWER_SECONDS) -> set[str]:
    """The ids of nodes whose raylet accepts no connection within some seconds; all are asked at the same time."""
    gone: set[str] = set()
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for node in nodes:
            family = socket.AF_INET6 if ":" in node.address else socket.AF_INET
            asking = stack.enter_context(socket.socket(family))
            asking.setblocking(False)
            if asking.connect_ex((node.address, node.port)) in (0, errno.EINPROGRESS):
                waiting.register(asking, selectors.EVENT_WRITE, node.id)
            else:
                gone.add(node.id)
        end = time.monotonic() + seconds
        while waiting.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                waiting.unregister(key.fileobj)
                if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # type: ignore[union-attr]
                    gone.add(key.data)
        gone |= {key.data for key in waiting.get_map().values()}
    return gone


class NodeWatch:
    """Asks nodes again and again whether they are still there: Ray itself takes up to half a minute to notice."""

    def __init__(self, nodes: Iterable[Node]):
        self.nodes = list(dict.fromkeys(nodes))
        self._silent: dict[str, int] = {}
        self._next = time.monotonic() + ASK_SECONDS

    def lost(self) -> Node | None:
        """A node that didn't answer several times in a row. Returns at once where it isn't yet time to ask again."""
        if time.monotonic() < self._next:
            return None
        gone = unanswering(self.nodes)
        self._next = time.monotonic() + ASK_SECONDS
        self._silent = {node: self._silent.get(node, 0) + 1 for node in gone}
        return next((node for node in self.nodes if self._silent.get(node.id, 0) >= CHANCES), None)


def _address_key(address: str) -> tuple[int, int, str]:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return 9, 0, address
    return parsed.version, int(parsed), address
