"""Configurations of tiny runs on examples, and the examples: what is good has small words, what is bad has large ones."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.drivers.train import train
from tests.drivers.runs import Finished

BASE: dict[str, Any] = {
    "seed": 5,
    "policy": {
        "dtype": "float32",
        "tokens_per_micro_batch": 256,
        "optimizer": {"lr": 3e-3, "warmup_steps": 1},
    },
    "data": {"max_prompt_tokens": 8, "max_tokens": 24, "validation_fraction": 0.25, "chat_template": "never"},
    "training": {"epochs": 2, "batch_examples": 8, "validate_every_steps": 4},
    "checkpoint": {"every_steps": 3, "keep": 9},
    "monitoring": {"progress": "lines", "tensorboard": False},
    "cluster": {"executor": "inline", "threads": 1, "start_timeout_s": 200, "call_timeout_s": 120},
}
SAMPLING = {"engine": "transformers", "max_response_tokens": 8}


def words(chance: random.Random, low: int, high: int, most: int = 7) -> str:
    return " ".join(f"w{chance.randint(low, high)}" for _ in range(chance.randint(2, most)))


def write_examples(folder: Path) -> None:
    """sft.jsonl, pairs.jsonl and labelled.jsonl."""
    chance = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "pairs": [], "labelled": []}
    for i in range(64):
        prompt = f"w{i} {words(chance, 0, 60, 4)}"
        good, bad = words(chance, 0, 15), words(chance, 45, 60)
        rows["sft"].append({"prompt": prompt, "completion": f" {good}"})
        rows["pairs"].append({"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"})
        rows["labelled"].append({"prompt": prompt, "completion": f" {good if i % 2 else bad}", "label": bool(i % 2)})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class OfflineWorld:
    """A folder with a model and examples, in which runs are made."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_examples(folder)

    def config_file(self, name: str, algorithm: str, sections: dict[str, Any]) -> Path:
        """A configuration for a run of this name."""
        values = json.loads(json.dumps(BASE)) | {"algorithm": algorithm, "run_dir": str(self.folder / name)}
        values["policy"]["path"] = str(self.folder / "model")
        data = "sft" if algorithm == "sft" else "pairs"
        values["data"]["train"] = str(self.folder / f"{data}.jsonl")
        if algorithm == "dpo":
            values["rollout"] = dict(SAMPLING)
            values["reference"] = {"dtype": "float32"}
            values["guard"] = {"kl_prompts": 8, "max_kl": 50.0}
        for section, keys in sections.items():
            if keys == "default":
                values.pop(section)
                continue
            values[section] = {**(values.get(section) or {}), **keys} if isinstance(keys, dict) else keys
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def train(
        self, name: str, algorithm: str, sections: dict[str, Any] | None = None, *overrides: str, resume: bool = False
    ) -> Finished:
        """Run in this process; returns what it left, and what it printed."""
        console = Console(file=io.StringIO(), width=160)
        file = self.config_file(name, algorithm, sections or {})
        try:
            train(load_config(file, list(overrides)), resume=resume, console=console)
        finally:
            self.printed = console.file.getvalue()  # type: ignore[attr-defined]
        return Finished(self.folder / name, self.printed)

    def copy(self, run: Finished, name: str) -> Path:
        """A run's folder under another name, as if it had been made there."""
        folder = self.folder / name
        shutil.copytree(run.folder, folder)
        values = yaml.safe_load((folder / "config.yaml").read_text())
        values["run_dir"] = str(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return folder
