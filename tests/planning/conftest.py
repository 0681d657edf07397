"""Configurations for plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import load_config

BASES = Path(__file__).parent.parent / "config"


@pytest.fixture
def load() -> Callable[..., Any]:
    """The small legal configuration of an algorithm, with overrides."""

    def run(*overrides: str, base: str = "base") -> Any:
        return load_config(BASES / f"{base}.yaml", list(overrides))

    return run


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
