from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import rollout_models as models  # noqa: E402


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose output layer is its own."""
    return models.make_model(tmp_path_factory.mktemp("untied"), kind="llama")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, with biases in its attention, whose output layer is its embedding."""
    return models.make_model(tmp_path_factory.mktemp("tied"), kind="qwen2", tied=True)


@pytest.fixture(scope="session")
def few_letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with eight letters for a vocabulary, so that short strings come up by chance."""
    return models.make_model(tmp_path_factory.mktemp("letters"), characters=list("abcdefgh"))
