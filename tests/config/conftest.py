"""A small legal configuration, and ways to load variations of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rayrlhf.config import Config, load_config
from rayrlhf.errors import InputRefused

BASE = (Path(__file__).parent / "base.yaml").read_text()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Load a text (by default the base) with overrides."""

    def run(*overrides: str, text: str = BASE) -> Config:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return run


@pytest.fixture
def refused(load: Callable[..., Config], tmp_path: Path) -> Callable[..., list[str]]:
    """The problems for which a text with overrides is refused; the file is called c.yaml in them."""

    def run(*overrides: str, text: str = BASE) -> list[str]:
        with pytest.raises(InputRefused) as caught:
            load(*overrides, text=text)
        return [problem.replace(str(tmp_path / "c.yaml"), "c.yaml") for problem in caught.value.problems]

    return run
