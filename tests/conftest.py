"""What all tests share."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Read once, when the libraries are imported: idle threads must not spin, and nothing is asked of a hub.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Else the processes of Ray get next to nothing where another test computes in its own.
os.environ.setdefault("RAY_worker_niceness", "0")

atexit.register(gc.unfreeze)  # Python takes everything down in the end

SLOW = ("submit", "multinode", "drivers", "rollout", "weights", "cluster", "models")
"""Folders whose files take minutes, the slowest first: begun last, one of them would run on alone in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; the order within a file stays."""
    rank = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(SLOW)))


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """What is imported by now is left out when garbage is looked for, as in the processes of a run: it is a third of a
    second each time, and DeepSpeed asks for it with every engine."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """What a test has logged travels between the suite's processes as UTF-8; some tests log what can't."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
