"""The two ways in which a command ends badly, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["InputRefused", "RunFailed"]


class InputRefused(Exception):
    """Configuration, data or a model can't be used. Every problem is listed. Exit code 2.

    Attributes:
        started: this was found after processes of the run had been started; they were ended.
    """

    def __init__(self, problems: Iterable[str] | str, *, started: bool = False):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.started = started
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """Something failed while the run was under way. What was trained so far is kept. Exit code 1."""
