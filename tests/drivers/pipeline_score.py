"""The reward of the tests of pipelines. Nothing heavy is loaded with it: the pipeline itself looks whether it is there."""

from __future__ import annotations

import os
import signal
import time

calls = 0


def small_numbers(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of words below w20. At the call whose number is in AT_CALL the process, and the one that started it, get
    what DOES names: a SIGKILL each, or the pipeline a SIGINT."""
    global calls
    calls += 1
    if calls == int(os.environ.get("AT_CALL", "0")):
        os.kill(os.getppid(), signal.SIGKILL if os.environ["DOES"] == "kill" else signal.SIGINT)
        if os.environ["DOES"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # However slow the pipeline is to pass its SIGINT on, the stage has not ended by then; the signal ends the sleep.
        time.sleep(30)
    return [sum(int(word[1:]) < 20 for word in response.split()) / 8 for response in responses]
