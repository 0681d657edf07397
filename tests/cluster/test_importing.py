"""Garbage is looked for again after an import, and only a process of our own leaves out what it has imported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import zlib

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


def test_an_import_that_loads_nothing_leaves_nothing_out():
    code = "import gc; from rayrlhf.importing import *; take_over_process()\n"
    code += "with quick_imports(): import json\nrelease_closed(); print(gc.get_freeze_count())\n"
    code += "with quick_imports(): import json\nprint(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "0\n0\n" and not done.stderr


ENDS = """
import atexit, logging, os, sys, threading, time
from rayrlhf.importing import leave_process, take_over_process

class Last:
    def __del__(self):
        os.write(1, b"taken down;")

atexit.register(lambda: os.write(1, b"registered before;"))
take_over_process()
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
    assert "thread;registered;registered before;" in done.stdout
    assert sorted(done.stdout.split(";")) == ["", "logged", "printed", "registered", "registered before", "thread"]


def test_what_was_written_is_there_and_what_could_not_be_is_told(tmp_path):
    """A file that nobody closed, one that goes through another, and a disk that is full."""
    program = "import gzip, sys; from rayrlhf.importing import leave_process, take_over_process; take_over_process()\n"
    program += "open_file = open(sys.argv[1] + '/a', 'w'); open_file.write('precious')\n"
    program += "packed = gzip.open(sys.argv[1] + '/b', 'wt'); packed.write('packed')\nprint('told')\nleave_process(0)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT, env=environment,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: <stdout> can't be written: No space left on device\n")
    assert (tmp_path / "a").read_text() == "precious"
    assert zlib.decompressobj(31).decompress((tmp_path / "b").read_bytes()) == b"packed"


@pytest.mark.parametrize(
    "before, code, said",
    [
        ("sys.stdout.close()", 0, ""),
        ("sys.stdout = None", 0, ""),
        (
            "kept = open('/dev/full', 'w'); kept.write('x')",
            1,
            "error: /dev/full can't be written: No space left on device\n",
        ),
        ("kept = subprocess.Popen('true', stdin=-1); kept.wait(); kept.stdin.write(b'x')", 0, ""),
    ],
)
def test_only_what_can_not_be_written_is_a_failure(before, code, said):
    program = "import subprocess, sys; from rayrlhf.importing import leave_process, take_over_process\n"
    program += f"take_over_process(); {before}; leave_process(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_process_that_an_exception_ends_is_taken_down_as_usual():
    program = "import logging.handlers" + ENDS % "raise KeyError('why')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1 and "KeyError: 'why'" in done.stderr and "taken down" in done.stdout


def test_a_full_disk_is_told_in_a_line():
    command = [sys.executable, "-u", "-m", "rayrlhf.cli", "plan", "configs/ppo_70b.yaml", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "The run failed: No space left on device: where its output goes\n"


def test_a_command_whose_reader_has_left_ends_in_silence():
    line = f"set -o pipefail; {sys.executable} -m rayrlhf.cli --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr
