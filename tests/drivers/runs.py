"""Configurations of tiny runs, the rewards they use, and what they leave behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rayrlhf.config import load_config
from rayrlhf.drivers.train import train
from tests.conftest import ROOT

BASE = """
seed: 3
policy: {dtype: float32, tokens_per_micro_batch: 128, optimizer: {lr: 0.003, schedule: linear}}
critic: {dtype: float32, tokens_per_micro_batch: 128, optimizer: {lr: 0.003}}
reference: {dtype: float32}
reward: {sources: [{function: "tests.drivers.runs:small_numbers"}], normalize: true}
data: {max_prompt_tokens: 8, completion_column: completion}
rollout: {engine: transformers, max_response_tokens: 8, samples_per_prompt: 2, chunk_samples: 4}
ppo: {steps: 4, prompts_per_step: 8, minibatch_samples: 8, ppo_epochs: 2, kl_controller: adaptive, target_kl: 1.0, kl_horizon: 50}
evaluation: {prompts: 8}
checkpoint: {every_steps: 2, keep: 5}
monitoring: {progress: lines, tensorboard: false}
cluster: {executor: inline, threads: 1, start_timeout_s: 600, call_timeout_s: 120}
"""


class TinyWorld:
    """A folder with a model and prompts, in which runs are made."""

    def __init__(self, folder: Path):
        self.folder = folder

    def config_file(self, name: str) -> Path:
        """A configuration for a run of this name."""
        values = yaml.safe_load(BASE)
        values["run_dir"] = str(self.folder / name)
        values["policy"]["path"] = str(self.folder / "model")
        values["data"]["prompts"] = str(self.folder / "prompts.jsonl")
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def train(self, name: str, *overrides: str, resume: bool = False) -> Finished:
        """Run in this process; returns what it left, and what it printed."""
        console = Console(file=io.StringIO(), width=160)
        train(load_config(self.config_file(name), list(overrides)), resume=resume, console=console)
        return Finished(self.folder / name, console.file.getvalue())  # type: ignore[attr-defined]

    def command(self, name: str, *arguments: str, env: dict[str, str] | None = None, **kwargs: Any):
        """`rayrlhf train` as a user types it, in a process of its own."""
        line = [sys.executable, "-m", "rayrlhf.cli", "train", str(self.config_file(name)), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.run(line, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment, **kwargs)


CLOCK = ("tokens_per_s", "sync/seconds", "sync/gb_per_s")


class Finished:
    """What a run left behind."""

    def __init__(self, folder: Path, printed: str = ""):
        self.folder, self.printed = folder, printed

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The rows without what a clock says."""
        return [
            {k: v for k, v in row.items() if not k.startswith("timing/") and k not in CLOCK} for row in self.metrics
        ]

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "evaluations.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The final model's."""
        return load_file(self.folder / "model" / "model.safetensors")

    def same_weights(self, other: Finished) -> bool:
        mine, theirs = self.weights, other.weights
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# -- rewards ---------------------------------------------------------------------------------------------------------


def small_numbers(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of words below w20 among eight."""
    return [sum(int(word[1:]) < 20 for word in response.split()) / 8 for response in responses]


calls = 0


def _fails_at(prompts: list[str], responses: list[str], call: int) -> bool:
    global calls
    calls += 1
    return calls == call


def kills_the_process(prompts: list[str], responses: list[str]) -> list[float]:
    """As `small_numbers`, but the process dies at the call whose number is in DIES_AT_CALL."""
    if _fails_at(prompts, responses, int(os.environ.get("DIES_AT_CALL", "0"))):
        os.kill(os.getpid(), signal.SIGKILL)
    return small_numbers(prompts, responses)


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    """As `small_numbers`, but raises at the call whose number is in DIES_AT_CALL."""
    if _fails_at(prompts, responses, int(os.environ.get("DIES_AT_CALL", "0"))):
        raise KeyError("no such word")
    return small_numbers(prompts, responses)
