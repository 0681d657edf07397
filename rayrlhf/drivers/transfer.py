"""The way of the weights: from the policy's trainer to every rollout engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from rayrlhf.cluster import Group, Pending, RoleFailed, wait_any
from rayrlhf.config import Config
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.errors import RunFailed
from rayrlhf.planning.placement import Placement
from rayrlhf.planning.transfer import transport_of
from rayrlhf.weights import CONNECTING, Address, Manifest, PeerFailed, abort

__all__ = ["SYNC", "connect_weights", "transfer_weights"]

SYNC = (("policy", "weight_manifest"), ("rollout", "receive_weights"))
"""The calls of a transfer, as timings add them up. The policy sends while the engines receive; in one process, where it does
so before they begin, ``sync/seconds`` has both."""

OTHER_SIDE_SECONDS = 5.0
"""How long, after one side has failed, the other one is waited for: it has been told to stop."""

log = logging.getLogger(__name__)


def connect_weights(
    policy: Group,
    rollout: Group,
    config: Config | PreferenceConfig,
    placement: Placement | None,
    group_version: int = 1,
) -> None:
    """Open the way of the weights, once before the first transfer, and again where engines were replaced.

    Args:
        config: of the run.
        placement: where the roles sit, which decides what a ``rollout.weight_transport`` of ``auto`` is; None without GPUs.
        group_version: larger each time: what is left over from an earlier group can't take part.

    Raises:
        RunFailed: where one side doesn't come before ``rollout.weight_timeout_s``.
    """
    # In one process the engines receive when the policy has published everything.
    one_process, workers = config.cluster.executor == "inline", config.rollout.tensor_parallel
    address = policy.broadcast(
        "open_weights",
        transport=transport_of(config, placement),
        receivers=rollout.size * workers,
        group_version=group_version,
        per_engine=workers,
        keep_all=one_process,
    )[0]
    calls = [group.broadcast_async("connect_weights", address=address) for group in (policy, rollout)]
    _together(calls, address, CONNECTING)


def transfer_weights(policy: Group, rollout: Group, version: int, verify: bool) -> dict[str, float]:
    """Give the policy's weights to all rollout engines.

    Args:
        version: of these weights; larger than the engines' present one.
        verify: compare every engine's weights with the policy's by checksum.

    Returns:
        ``sync/bytes``: sent to each engine's worker. ``sync/buckets``. ``sync/seconds``: from the manifest to the last engine's
        answer. ``sync/gb_per_s``: 10^9 bytes a second, to each of the workers.

    Raises:
        RunFailed: where a side fails, or a weight differs; it names the engine and the tensors. The other side is told to
            stop.
    """
    started, sent, buckets = time.monotonic(), 0, 0
    while True:
        manifest: Manifest = policy.broadcast("weight_manifest", version=version, checksums=verify)[0]
        _send(policy, rollout, manifest, verify)
        sent, buckets = sent + manifest.nbytes, buckets + len(manifest.buckets)
        if manifest.kind == "adapter" or manifest.adapter is None:  # else this was the base, and its adapter comes next
            break
    seconds = time.monotonic() - started
    return {
        "sync/bytes": float(sent),
        "sync/buckets": float(buckets),
        "sync/seconds": seconds,
        "sync/gb_per_s": sent / seconds / 1e9,
    }


def _send(policy: Group, rollout: Group, manifest: Manifest, verify: bool) -> None:
    publishing = policy.broadcast_async("publish_weights", manifest=manifest)
    if publishing.done():  # in this process, or failed at once
        publishing.result()
    receiving = rollout.broadcast_async("receive_weights", manifest=manifest, verify=verify)
    _together([publishing, receiving], manifest.address, manifest.serial)
    policy.broadcast("release_weights")


def _together(calls: Sequence[Pending], address: Address | None, serial: int) -> None:
    """Wait for both sides.

    Raises:
        RunFailed: of the side that failed by itself, as soon as one has failed and the other one has stopped or its time is up.
    """
    waiting = list(calls)
    while waiting:
        for call in wait_any(waiting):
            waiting.remove(call)
            try:
                call.result()
            except RoleFailed as failure:
                raise _root(failure, waiting, address, serial) from failure.__cause__


def _root(failure: RoleFailed, waiting: Sequence[Pending], address: Address | None, serial: int) -> RoleFailed:
    """Of the first failure and what the other side then says: the one that is not merely told of the other's."""
    if not waiting:
        return failure
    if address is not None:
        try:
            abort(address, serial, f"{failure.role} rank {failure.rank}: {failure.cause}")
        except RunFailed as error:  # the trainer has ended, and whoever waits for it notices that himself
            log.warning("%s", error)
    wait_any(waiting, timeout=OTHER_SIDE_SECONDS)
    for call in waiting:
        try:
            if call.done():
                call.result()
        except RoleFailed as other:
            if failure.cause.startswith(PeerFailed.__name__) and not other.cause.startswith(PeerFailed.__name__):
                return other
    return failure
