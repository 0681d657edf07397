"""Importing the large libraries, what Python's garbage collector has to do with them, and leaving them behind."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["leave_process", "quick_imports", "take_over_process"]

_ours = False
_code: int | None = None


def take_over_process() -> None:
    """Say that this process is the command line's or a role's, and nobody else's: see `quick_imports`."""
    global _ours
    if not _ours:
        _ours = True
        atexit.register(_last)  # what is registered first, is called last


def leave_process(code: int) -> NoReturn:
    """End a process that was taken over, with this exit code: as `sys.exit` does, but for what Python does last of all.

    It would take the modules down, object by object, which with the large libraries is a second of processor time, and at
    times ends in a crash within one of them, whose exit code is another.
    """
    global _code
    _code = code
    sys.exit(code)


def _last() -> None:
    """Threads have been waited for, and what others registered with `atexit` has been called."""
    if _code is None:
        gc.unfreeze()  # else extensions made with nanobind say that their objects leaked
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # who reads it may have left
            stream.flush()
    os._exit(_code)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it Python doesn't look for garbage. For imports alone.

    Torch, transformers, DeepSpeed and vLLM make a million objects as they are imported, nearly all of which stay. Python
    would go through them again and again, which takes a fifth of the time of the import. And afterwards too, for a third of a
    second, each time that DeepSpeed, vLLM or a role that leaves its GPU asks for garbage. So in a process of our own all
    that is there after an import is left out from then on (`gc.freeze`); in a user's process that is for the user to decide.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if _ours:
            gc.freeze()
