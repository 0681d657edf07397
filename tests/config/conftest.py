"""Small legal configurations, and ways to load variations of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rayrlhf.config import AnyConfig, load_config
from rayrlhf.errors import InputRefused

HERE = Path(__file__).parent
BASES = {
    "ppo": (HERE / "base.yaml").read_text(),
    "sft": (HERE / "base_sft.yaml").read_text(),
    "reward_model": (HERE / "base_reward_model.yaml").read_text(),
    "dpo": (HERE / "base_dpo.yaml").read_text(),
    "sampling": (HERE / "base_sampling.yaml").read_text(),
    "critique": (HERE / "base_critique.yaml").read_text(),
    "evaluation": (HERE / "base_evaluation.yaml").read_text(),
}
BASE = BASES["ppo"]


@pytest.fixture
def bases() -> dict[str, str]:
    """A small legal configuration of each algorithm."""
    return BASES


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., AnyConfig]:
    """Load a text (by default the base) with overrides."""

    def run(*overrides: str, text: str = BASE) -> AnyConfig:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return run


@pytest.fixture
def refused(load: Callable[..., AnyConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """The problems for which a text with overrides is refused; the file is called c.yaml in them."""

    def run(*overrides: str, text: str = BASE) -> list[str]:
        with pytest.raises(InputRefused) as caught:
            load(*overrides, text=text)
        return [problem.replace(str(tmp_path / "c.yaml"), "c.yaml") for problem in caught.value.problems]

    return run
