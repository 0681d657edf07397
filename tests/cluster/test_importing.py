"""Garbage is looked for again after an import, and only a process of our own leaves out what it has imported."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from rayrlhf.importing import quick_imports
from tests.conftest import ROOT


def test_collection_goes_on_as_it_was():
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError), quick_imports():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_process_of_our_own_leaves_out_what_it_has_imported():
    code = "import gc; from rayrlhf.importing import *; take_over_process()\n"
    code += "with quick_imports(): import json\nprint(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert int(done.stdout) > 1000 and not done.stderr
