"""What was found in the data, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExampleReport", "LengthReport", "PromptReport", "SourceReport"]


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


@dataclass(frozen=True)
class LengthReport:
    """Counts of one file or dataset of examples or pairs (``what``). Lengths are in tokens, before anything is cut.

    ``same_tokens`` counts the pairs that were left out because both responses have the same tokens, once cut.
    """

    name: str
    what: str
    rows: int
    conversations: int
    longest: int
    longest_at: str
    max_prompt_tokens: int
    max_tokens: int
    dropped: int
    truncated: int
    same_tokens: int

    @property
    def usable(self) -> int:
        return self.rows - self.dropped - self.same_tokens

    def line(self) -> str:
        """One line for the user."""
        text = f"{self.name}: {_count(self.rows, self.what)}"
        if self.conversations:
            text += f", {self.conversations} of them conversations"
        text += f"; the longest has {_count(self.longest, 'token')} ({self.longest_at})"
        limits = f"longer than {self.max_tokens} tokens, or {self.max_prompt_tokens} of the prompt,"
        for count, done in ((self.dropped, "dropped"), (self.truncated, "cut")):
            if count:
                text += f"; {count} {limits} {done}"
        if self.same_tokens:
            text += f"; {_count(self.same_tokens, 'pair')} left out, whose responses have the same tokens"
        return text


@dataclass(frozen=True)
class ExampleReport:
    """What the loading of examples did: each source, and the split.

    ``train`` and ``validation`` count examples as they are used, copies by weight included; ``duplicates_left_out``
    those which are not trained on because their prompt is held out.
    """

    sources: tuple[LengthReport, ...]
    what: str
    train: int
    validation: int
    duplicates_left_out: int

    def lines(self) -> list[str]:
        """The report for the user, a few lines."""
        split = f"{_count(self.train, self.what)} to train on, {self.validation} held out"
        if self.duplicates_left_out:
            split += f"; {self.duplicates_left_out} with held-out prompts left out of the training"
        return [*(source.line() for source in self.sources), split]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
