"""What sender and receivers of weights tell each other beside the weights: how far each of them is, and who has failed.

It goes through a `torch.distributed.TCPStore` in the sender's process. So a sender that dies is noticed at once by all
receivers. The store holds a fixed number of keys, whatever the number of transfers:

``group``          the name of the group, versioned: whoever comes with another name is sent away
``GROUP/at/WHO``   how far somebody is, ``SERIAL COUNT``: in which transfer, and how many steps he has made in it
``GROUP/failed``   ``SERIAL MESSAGE``: the transfer that has failed, and why; whoever waits in it stops waiting. At the group's
                   end ``-1 MESSAGE``, which concerns all
"""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

from rayrlhf.errors import RunFailed

__all__ = ["Address", "Control", "PeerFailed", "abort"]

TIMEOUT_KEY = "rollout.weight_timeout_s"
SENDER = "sender-"
"""A sender's name in the store, before its rank in the policy."""
CONNECTING = 0
"""The serial number of what is done before the first transfer."""
ALL = -1
NOTHING = -2
STORE_SECONDS = 30.0
"""An answer of a store that is there takes milliseconds."""
GRACE_SECONDS, GRACE_SHARE = 5.0, 0.1
"""Receivers wait longer than the sender, which knows who keeps all of them waiting: by so much, or this share of the deadline."""
FIRST_PAUSE, LONGEST_PAUSE = 1e-4, 0.01
"""Seconds between two looks."""


class PeerFailed(RunFailed):
    """The transfer has failed on another side, which says there why."""


@dataclass(frozen=True)
class Address:
    """Where receivers find the sender of weights. Picklable."""

    transport: str
    group: str
    """Name of the group, with its version: a receiver that is left over from an earlier one can't take part."""
    place: str
    """``host:port`` of the sender's store."""
    receivers: int
    timeout_s: float
    """Deadline of each bucket, in seconds."""
    per_engine: int = 1
    """Receivers of each rollout engine: its tensor-parallel workers."""

    def receiver(self, index: int) -> str:
        """A receiver's name in messages."""
        rank, worker = divmod(index, self.per_engine)
        return f"rollout rank {rank}" + (f" worker {worker}" if self.per_engine > 1 else "")


class Control:
    """One side's view of the store.

    Args:
        store: the process's own connection.
        address: of the group; ``place`` is that of the store.
        me: what this side is called in the store.
        name: what it is called in messages.
    """

    def __init__(self, store: Any, address: Address, me: str, name: str):
        self.store, self.address, self.name = store, address, name
        self._keys: Any = PrefixStore(address.group, store)
        self._me = f"at/{me}"

    @classmethod
    def host(cls, transport: str, group: str, receivers: int, timeout_s: float, host: str, per_engine: int) -> Control:
        """The sender's side; it makes the store.

        Args:
            host: the machine's address, as receivers reach it.
        """
        store = TCPStore(host, 0, None, True, _seconds(STORE_SECONDS), wait_for_workers=False)
        address = Address(transport, group, f"{host}:{store.port}", receivers, timeout_s, per_engine)
        control = cls(store, address, f"{SENDER}0", "the policy")
        for who in (f"{SENDER}0", *range(receivers)):
            control._keys.set(f"at/{who}", f"{CONNECTING} 0")
        control._keys.set("failed", f"{NOTHING} ")
        store.set("group", group)
        return control

    def put(self, key: str, value: bytes) -> None:
        """Leave a value for others."""
        with self._connected():
            self._keys.set(key, value)

    def has(self, key: str) -> bool:
        """Whether somebody has left a value."""
        with self._connected():
            return self._keys.check([key])

    def get(self, key: str) -> bytes:
        """A value that somebody has left already."""
        with self._connected():
            return self._keys.get(key)

    @classmethod
    def join(cls, address: Address, me: str, name: str, timeout_s: float = STORE_SECONDS) -> Control:
        """Another side of it.

        Raises:
            RunFailed: where nobody is there, or the group is another one.
        """
        host, _, port = address.place.rpartition(":")
        try:
            # A store that isn't there would be tried again and again, with a page of C++ on the screen each time.
            socket.create_connection((host, int(port)), timeout_s).close()
            store = TCPStore(host, int(port), None, False, _seconds(timeout_s), wait_for_workers=False)
            present = store.get("group").decode()
        except (DistError, OSError) as error:
            raise RunFailed(
                f"{name} can't join the weight group {address.group}: the policy's process does not answer at "
                f"{address.place}"
            ) from error
        if present != address.group:
            raise RunFailed(f"{name} can't join the weight group {address.group}: the group there is {present}")
        return cls(store, address, me, name)

    @classmethod
    def join_as_sender(cls, address: Address, rank: int) -> Control:
        """The side of another rank of the policy than the first, where each of them sends."""
        control = cls.join(address, f"{SENDER}{rank}", f"policy rank {rank}")
        control.report(CONNECTING, 0)
        return control

    # -- saying -------------------------------------------------------------------------------------------------

    def report(self, serial: int, count: int) -> None:
        """Tell how far this side is."""
        with self._connected():
            self._keys.set(self._me, f"{serial} {count}")

    def fail(self, serial: int, reason: str) -> None:
        """End the transfer for all others. The first reason stays; nothing happens where the sender is gone."""
        with suppress(DistError):
            before = self._keys.get("failed").decode()
            if not before.startswith((f"{serial} ", f"{ALL} ")):
                self._keys.compare_set("failed", before, f"{serial} {self.name}: {reason}")

    def close(self) -> None:
        """End the group, on the sender's side: nobody can join it any more, and whoever waits stops waiting."""
        self.store.set("group", "closed")
        self._keys.set("failed", f"{ALL} the policy: the weight group {self.address.group} is closed")

    # -- hearing ------------------------------------------------------------------------------------------------

    def check(self, serial: int) -> None:
        """Nothing, unless the transfer has failed elsewhere.

        Raises:
            PeerFailed: with the reason; or where the sender is gone.
        """
        with self._connected():
            self._raise_failure(serial, self._keys.get("failed"))

    def wait_sender(self, serial: int, count: int, what: str, rank: int = 0) -> None:
        """Until the sender has come so far.

        Args:
            what: what is waited for, as the beginning of a sentence.
            rank: of the sender in the policy, where several ranks send.

        Raises:
            RunFailed: after the deadline.
            PeerFailed: where the transfer has failed elsewhere, or the sender is gone.
        """
        longer = max(GRACE_SECONDS, GRACE_SHARE * self.address.timeout_s)
        self._wait([f"{SENDER}{rank}"], serial, count, f"{what} did not come from the policy to {self.name}", longer)

    def wait_receivers(self, serial: int, count: int, what: str, receivers: Sequence[int] | None = None) -> None:
        """Until all receivers, or those given, have come so far.

        Args:
            what: what they did not do, as the end of a sentence.
        """
        wanted = range(self.address.receivers) if receivers is None else receivers
        self._wait([str(index) for index in wanted], serial, count, what)

    def _wait(self, who: list[str], serial: int, count: int, what: str, longer: float = 0.0) -> None:
        keys = ["failed", *(f"at/{name}" for name in who)]
        end, pause = time.monotonic() + self.address.timeout_s + longer, FIRST_PAUSE
        while True:
            with self._connected():
                failed, *values = self._keys.multi_get(keys)
            self._raise_failure(serial, failed)
            places = [tuple(map(int, value.split())) for value in values]
            late = [name for name, place in zip(who, places, strict=True) if place < (serial, count)]
            if not late:
                return
            if time.monotonic() > end:
                limit = f"within {self.address.timeout_s:g} s ({TIMEOUT_KEY})"
                if late[0].startswith(SENDER):
                    raise RunFailed(f"{what} {limit}")
                names = ", ".join(self.address.receiver(int(index)) for index in late[:8])
                more = f" and {len(late) - 8} more" if len(late) > 8 else ""
                raise RunFailed(f"{names}{more} {what} {limit}")
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)

    def _raise_failure(self, serial: int, failed: bytes) -> None:
        number, _, reason = failed.decode().partition(" ")
        if int(number) in (serial, ALL):
            raise PeerFailed(f"the weight transfer was ended by {reason}")

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            raise PeerFailed(
                f"the policy's process, which sends the weights to {self.name}, does not answer any more at "
                f"{self.address.place}"
            ) from error


def _seconds(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)


def abort(address: Address, serial: int, reason: str, timeout_s: float = 2.0) -> None:
    """End a transfer from outside: whoever waits in it stops waiting.

    Raises:
        RunFailed: where the sender is not there any more.
    """
    Control.join(address, "driver", "the driver", timeout_s).fail(serial, reason)
