"""The two ways in which a command ends badly, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["InputRefused", "RunFailed"]


class InputRefused(Exception):
    """Configuration, data or a model can't be used. Every problem is listed; nothing was started. Exit code 2."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """Something failed while the run was under way. What was trained so far is kept. Exit code 1."""
