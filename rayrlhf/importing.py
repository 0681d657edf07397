"""Importing the large libraries, and what Python's garbage collector has to do with them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_imports", "take_over_process"]

_ours = False


def take_over_process() -> None:
    """Say that this process is the command line's or a role's, and nobody else's: see `quick_imports`."""
    global _ours
    if not _ours:
        _ours = True
        # At the end Python takes everything down, in an order for which it looks at all objects once more.
        atexit.register(gc.unfreeze)


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
