"""What a driver is told when a role fails: which role, which rank, in which phase, and why."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["Failure", "RoleFailed"]

START = "start"
"""The phase of an error while a role comes up."""

FRAMES_SHOWN = 4


@dataclass(frozen=True)
class Failure:
    """An exception of a role as plain data: unlike the exception itself it can always be sent to another process."""

    cause: str
    """Type and message."""
    frames: tuple[str, ...]
    """The innermost frames, outermost of them first."""
    time: float = field(default_factory=time.time)
    """When it happened, in seconds since the epoch."""
    problems: tuple[str, ...] = ()
    """What an `InputRefused` lists; nothing for any other exception."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        now = time.time()  # reading the frames' lines takes longer than another rank needs to fail of it
        message = str(error).strip()
        frames = [
            f"{f.filename}:{f.lineno} in {f.name}" + (f": {f.line}" if f.line else "")
            for f in traceback.extract_tb(error.__traceback__)
        ]
        cause = type(error).__name__ + (f": {message}" if message else "")
        problems = tuple(error.problems) if isinstance(error, InputRefused) else ()
        return cls(cause, tuple(frames[-FRAMES_SHOWN:]), now, problems)


class RoleFailed(RunFailed):
    """A role raised an error, died, or didn't answer before its deadline.

    Attributes:
        role: name of the group.
        rank: which of its processes.
        phase: the method that was called, or ``start``.
        cause: type and message of the role's own exception, or how it died.
        log: the log file of the process, None where there is none (inline) or it isn't known.
    """

    def __init__(self, role: str, rank: int, phase: str, cause: str, message: str, log: str | None = None):
        super().__init__(message)
        self.role, self.rank, self.phase, self.cause, self.log = role, rank, phase, cause, log

    def __reduce__(self) -> tuple:
        return type(self), (self.role, self.rank, self.phase, self.cause, str(self), self.log)

    @classmethod
    def raised(cls, role: str, rank: int, phase: str, failure: Failure, log: str | None = None) -> RoleFailed:
        """The role's code raised an exception."""
        what = "failed to start" if phase == START else f"failed in {phase}"
        message = f"{role} rank {rank} {what}: {failure.cause}" + _lines("last frames", failure.frames) + _log(log)
        return cls(role, rank, phase, failure.cause, message, log)

    @classmethod
    def died(
        cls, role: str, rank: int, phase: str, cause: str, log: str | None = None, last_lines: Sequence[str] = ()
    ) -> RoleFailed:
        """The role's process is gone."""
        when = "while starting" if phase == START else f"in {phase}"
        message = f"{role} rank {rank} died {when}: {cause}" + _log(log) + _lines("last log lines", last_lines)
        return cls(role, rank, phase, cause, message, log)

    @classmethod
    def late(
        cls,
        role: str,
        rank: int,
        phase: str,
        seconds: float,
        deadline: str,
        log: str | None = None,
        last_lines: Sequence[str] = (),
    ) -> RoleFailed:
        """The role didn't answer in time; ``deadline`` says where the limit comes from."""
        cause = f"did not answer {phase} within {seconds:g} s (deadline {deadline})"
        message = f"{role} rank {rank} {cause}" + _log(log) + _lines("last log lines", last_lines)
        return cls(role, rank, phase, cause, message, log)


def _log(log: str | None) -> str:
    return f"\n  log: {log}" if log else ""


def _lines(title: str, lines: Sequence[str]) -> str:
    return f"\n  {title}:" + "".join(f"\n    {line}" for line in lines) if lines else ""
