"""Ports of this machine, while other tests use some too."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

BELOW_EPHEMERAL = range(20_000, 32_000)
"""Neither Ray's workers (to 19,999) nor connections (from 32,768) are given one of these."""


def free_port() -> int:
    """A port that something started later can listen on."""
    chance = random.SystemRandom()  # other processes of the suite were seeded alike
    while True:
        port = chance.choice(BELOW_EPHEMERAL)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port on which nobody listens, and which nobody else can have meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
