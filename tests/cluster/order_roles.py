"""A role that writes down when it is built and when it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rayrlhf.errors import InputRefused

if "ORDER_PID" in os.environ:  # before the role is built
    Path(os.environ["ORDER_PID"]).write_text(str(os.getpid()))


class Builder:
    def __init__(self, *, world, name: str, path: str, seconds: float = 0.3, wrong: str = "", refused: str = ""):
        self.name, self.path, self.rank = name, path, world.rank
        self.note("begins")
        time.sleep(seconds)
        self.note("is up")

    def note(self, what: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{self.name} {what}\n")

    @classmethod
    def check(cls, name: str, path: str, seconds: float = 0.3, wrong: str = "", refused: str = "") -> None:
        if wrong:
            raise LookupError(wrong)
        if refused:
            raise InputRefused(refused.split("; "))

    def leave(self, how: str) -> None:
        self.note(f"leaves {how}")
