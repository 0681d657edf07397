"""A tiny model, prompts, and runs that several tests look at."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.drivers.runs import TinyWorld
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TinyWorld:
    """A model folder and prompts, for each file of tests; runs get folders below it."""
    folder: Path = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    chance = random.Random(0)
    rows = [{"prompt": " ".join(f"w{chance.randint(0, 60)}" for _ in range(chance.randint(2, 6)))} for _ in range(80)]
    for row in rows:
        row["completion"] = " ".join(f"w{chance.randint(0, 60)}" for _ in range(4))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TinyWorld(folder)
