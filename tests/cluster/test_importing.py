"""Garbage is looked for again after an import, and only a process of our own leaves out what it has imported."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from rayrlhf.importing import quick_imports
from tests.conftest import ROOT


def test_collection_goes_on_as_it_was(monkeypatch: pytest.MonkeyPatch):
    def never() -> None:
        raise AssertionError("what a user's process has made is left to the user")

    monkeypatch.setattr(gc, "freeze", never)
    with pytest.raises(KeyError), quick_imports():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
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


ENDS = """
import atexit, logging, os, sys, threading, time
from rayrlhf.importing import leave_process, take_over_process
take_over_process()

class Last:
    def __del__(self):
        os.write(1, b"taken down;")

kept = Last()
kept.itself = kept
atexit.register(lambda: os.write(1, b"registered;"))
threading.Thread(target=lambda: (time.sleep(0.3), os.write(1, b"thread;"))).start()
stream = logging.StreamHandler(sys.stdout)
stream.terminator = ""
logging.basicConfig(format="%%(message)s", handlers=[logging.handlers.MemoryHandler(9, 60, target=stream)])
logging.error("logged;")
print("printed;", end="")
%s
"""


@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_process_that_leaves_has_done_all_but_take_its_modules_down(code: int):
    program = "import logging.handlers" + ENDS % f"leave_process({code})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, "")
    assert "thread;registered;" in done.stdout
    assert sorted(done.stdout.split(";")) == ["", "logged", "printed", "registered", "thread"]


def test_a_process_that_an_exception_ends_is_taken_down_as_usual():
    program = "import logging.handlers" + ENDS % "raise KeyError('why')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1 and "KeyError: 'why'" in done.stderr and "taken down" in done.stdout


def test_a_command_whose_reader_has_left_ends_in_silence():
    line = f"set -o pipefail; {sys.executable} -m rayrlhf.cli --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr
