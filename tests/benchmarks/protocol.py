"""How the benchmark and a contender talk: JSON lines over stdin and stdout, one timed step at a time.

Each contender is a process of its own, which stays warm while others have their turn. It says ``ready`` once it could
start its first step, then does one step for each ``step`` that it is sent, and ends at ``quit`` or end of file.
This module needs the standard library alone, because it is imported in several environments.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Job(Protocol):
    """What contenders do, as text that both sides understand."""

    def dump(self) -> str:
        """As JSON."""


Parsed = TypeVar("Parsed")


class Channel:
    """A contender's end. Whatever else the process prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def _say(self, event: str, **content: Any) -> None:
        self._out.write(json.dumps({"event": event, **content}) + "\n")

    def ready(self, **facts: Any) -> None:
        """Tell that the next thing would be a step; ``facts`` are versions and settings for the report."""
        self._say("ready", facts=facts)

    def wait(self) -> bool:
        """Wait for the next step; False when there is none any more."""
        line = sys.stdin.readline()
        return bool(line) and json.loads(line)["command"] == "step"

    def done(
        self,
        seconds: float,
        response_tokens: int | None = None,
        metrics: dict[str, float] | None = None,
        **phases: float,
    ) -> None:
        """Report a step: its seconds, the response tokens that it generated, its metrics, and seconds by phase."""
        self._say("step", seconds=seconds, response_tokens=response_tokens, metrics=metrics or {}, phases=phases)


def serve(channel: Channel, step: Callable[[], dict[str, Any]], **facts: Any) -> None:
    """The loop of a contender whose step is a function; it returns the arguments of `Channel.done`."""
    channel.ready(**facts)
    while channel.wait():
        channel.done(**step())


def arguments(parse: Callable[[str], Parsed]) -> tuple[Parsed, dict[str, Any]]:
    """What the benchmark started this contender with: the workload, and the contender's own options."""
    return parse(sys.argv[1]), json.loads(sys.argv[2])


class ContenderFailed(Exception):
    """A contender ended, or didn't answer in time."""


class Contender:
    """The benchmark's end of one process.

    Args:
        name: under which it is reported.
        python: interpreter of its environment.
        script: file in this folder.
        options: what the script makes of the workload; JSON.
        environment: variables besides our own.
        log: where its stderr goes.
    """

    def __init__(
        self,
        name: str,
        python: str,
        script: str,
        workload: Job,
        options: dict[str, Any],
        environment: dict[str, str],
        log: Path,
    ):
        self.name, self.log = name, log
        self._lines: queue.Queue[str | None] = queue.Queue()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).with_name(script)), workload.dump(), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | environment,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _expect(self, event: str, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ContenderFailed(f"{self.name} did not answer within {timeout_s:g} s; see {self.log}") from None
        if line is None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise ContenderFailed(f"{self.name} ended with exit code {self.process.wait()}; {self.log}:\n{tail}")
        answer = json.loads(line)
        if answer["event"] != event:
            raise ContenderFailed(f"{self.name} said {answer['event']} where {event} was expected")
        return answer

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Wait until it is ready; returns what it says of itself."""
        return self._expect("ready", timeout_s)["facts"]

    def step(self, timeout_s: float) -> dict[str, Any]:
        """One step; see `Channel.done`."""
        assert self.process.stdin is not None
        self.process.stdin.write('{"command": "step"}\n')
        self.process.stdin.flush()
        return self._expect("step", timeout_s)

    def close(self, timeout_s: float = 60) -> None:
        """End the process: by asking, then by killing it."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self.process.stdin.close()
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
