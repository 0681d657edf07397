"""The order in which prompts are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayrlhf.errors import InputRefused

__all__ = ["PromptSampler", "epoch_order"]


def epoch_order(size: int, seed: int, shuffle: bool, epoch: int) -> list[int]:
    """The order in which an epoch takes 0..size-1: from (seed, epoch) alone, or always 0, 1, 2, ..."""
    if not shuffle:
        return list(range(size))
    # spawn key 1: a stream apart from the held-out split's, which has the same seed
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, epoch)))
    return random.permutation(size).tolist()


class PromptSampler:
    """Gives the indices 0..size-1, each exactly once an epoch, epoch after epoch.

    The order of epoch e depends on (seed, e) alone, so a place in the data is two numbers, and a resumed run goes on as
    if it had not been interrupted.

    Args:
        size: number of training prompts, at least 1.
        seed: the run's seed, not negative.
        shuffle: a new order in each epoch; otherwise always 0, 1, 2, ...
        fingerprint: stands for the prompts themselves (`PromptData.fingerprint`): only a state with the same is loaded.

    Raises:
        ValueError: ``size`` below 1 or ``seed`` below 0.
    """

    def __init__(self, size: int, seed: int, shuffle: bool, fingerprint: str = ""):
        if size < 1:
            raise ValueError(f"a sampler needs at least one prompt, not {size}")
        self._identity: dict[str, Any] = {"size": size, "seed": seed, "shuffle": shuffle, "fingerprint": fingerprint}
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._go_to(epoch=0, position=0)

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self._epoch

    @property
    def position(self) -> int:
        """Prompts given in the present epoch, less than ``size``."""
        return self._position

    def next(self, n: int) -> list[int]:
        """The next ``n`` indices, going on with the next epoch where one ends."""
        if n < 0:
            raise ValueError(f"can't take {n} prompts")
        taken: list[int] = []
        while len(taken) < n:
            part = self._order[self._position : self._position + n - len(taken)]
            taken += part
            if self._position + len(part) == self._size:
                self._go_to(self._epoch + 1, 0)
            else:
                self._position += len(part)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what it is a place in. JSON can hold it."""
        return {**self._identity, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            InputRefused: the state belongs to other prompts, another seed or another order.
        """
        words = {
            "size": "number of training prompts",
            "seed": "seed",
            "shuffle": "data.shuffle",
            "fingerprint": "fingerprint of the training prompts",
        }
        problems = [
            f"the {words[name]} was {state.get(name)!r} when the checkpoint was written and is {value!r} now: "
            "the place in the data can't be found again"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if not problems and not (epoch >= 0 and 0 <= position < self._size):
            problems.append(f"the checkpoint's place in the data, epoch {epoch}, position {position}, can't be")
        if problems:
            raise InputRefused(problems)
        self._go_to(epoch, position)

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = epoch_order(self._size, self._seed, self._shuffle, epoch)
