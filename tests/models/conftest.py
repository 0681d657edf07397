"""Tiny models, and groups of ranks that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.making import base_model
from tests.models.ranks import Ranks
from tests.support.tiny import save_reward_model, save_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, tied embeddings."""
    return base_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, biases in its attention, an output layer of its own."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen"), kind="qwen2", tied=False, layers=3, seed=5)


@pytest.fixture(scope="session")
def scorer(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over the llama."""
    return save_reward_model(tmp_path_factory.mktemp("scorer"), llama)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()
