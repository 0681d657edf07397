"""What was found in the data, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PromptReport", "SourceReport"]


@dataclass(frozen=True)
class SourceReport:
    """Counts of one file or dataset. Lengths are in tokens, before anything is cut."""

    name: str
    rows: int
    conversations: int
    shortest: int
    longest: int
    longest_at: str
    max_prompt_tokens: int
    dropped: int
    truncated: int

    @property
    def usable(self) -> int:
        return self.rows - self.dropped

    def line(self) -> str:
        """One line for the user."""
        text = f"{self.name}: {_count(self.rows, 'prompt')}"
        if self.conversations:
            text += f", {self.conversations} of them conversations"
        text += f"; the longest has {_count(self.longest, 'token')} ({self.longest_at})"
        for count, what in ((self.dropped, "dropped"), (self.truncated, "cut at the beginning")):
            if count:
                text += f"; {count} longer than {self.max_prompt_tokens} tokens {what}"
        return text


@dataclass(frozen=True)
class PromptReport:
    """What `load_prompts` did: each source, and the split.

    ``duplicates_left_out`` counts the prompts which are not trained on because they equal a held-out one.
    """

    sources: tuple[SourceReport, ...]
    train: int
    held_out: int
    duplicates_left_out: int

    def lines(self) -> list[str]:
        """The report for the user, a few lines."""
        split = f"{_count(self.train, 'prompt')} to train on, {self.held_out} held out"
        if self.duplicates_left_out:
            split += f"; {_count(self.duplicates_left_out, 'duplicate')} of held-out prompts left out of the training"
        return [*(source.line() for source in self.sources), split]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
