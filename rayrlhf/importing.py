"""Importing the large libraries, what Python's garbage collector has to do with them, and leaving them behind."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["leave_process", "quick_imports", "release_closed", "take_over_process"]

_ours = False


def take_over_process() -> None:
    """Say that this process is the command line's or a role's, and nobody else's: see `quick_imports`."""
    global _ours
    if not _ours:
        _ours = True
        atexit.register(gc.unfreeze)  # else extensions made with nanobind say that their objects leaked


def leave_process(code: int) -> NoReturn:
    """End a process that was taken over, with this exit code, as Python does, but for what it does last of all.

    It would take the modules down, object by object, which with the large libraries is a second of processor time, and at
    times ends in a crash within one of them, whose exit code is another. What is before that is done: threads are waited
    for, whatever was registered with `atexit` is called, and files that are still open get what was written to them.

    Where something can't be written (a full disk), this is said, and the exit code isn't 0. A reader who has left is no
    failure.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for name, why in _flush_files().items():
        code = code or 1
        with suppress(OSError):
            print(f"error: {name} can't be written: {why}", file=sys.stderr, flush=True)
    os._exit(code)


def _flush_files() -> dict[str, str]:
    """Write what files hold that nobody has closed, the output and say those of a reward function's module; gives those for
    which it fails, with the cause. Twice, as some write into others."""
    failed: dict[str, str] = {}
    files = [thing for thing in gc.get_objects() if issubclass(type(thing), io.IOBase)]
    for file in files + files:
        try:
            file.flush()
        except ConnectionError:  # a pipe or connection whose other end has left
            continue
        except OSError as error:
            failed[str(getattr(file, "name", file))] = error.strerror or str(error)
        except Exception:  # it is closed, or was never whole
            continue
    return failed


def release_closed() -> None:
    """What has been left out when garbage is looked for counts again: roles are closed, and may have left some."""
    if _ours:
        gc.unfreeze()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it Python doesn't look for garbage. For imports alone.

    Torch, transformers, DeepSpeed and vLLM make a million objects as they are imported, nearly all of which stay. Python
    would go through them again and again, which takes a fifth of the time of the import. And afterwards too, for a third of a
    second, each time that DeepSpeed, vLLM or a role that leaves its GPU asks for garbage. So in a process of our own all
    that is there after an import is left out from then on (`gc.freeze`); in a user's process that is for the user to decide.
    """
    enabled, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if _ours and len(sys.modules) > loaded:
            gc.freeze()
