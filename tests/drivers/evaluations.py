"""Evaluations of tiny models, and what they leave."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.drivers.evaluate import evaluate_models
from tests.drivers.runs import TinyWorld
from tests.support.tiny import save_tiny_model

PROMPTS = 24


def longer(prompts: list[str], responses: list[str]) -> list[float]:
    """Words of a response."""
    return [float(len(response.split())) for response in responses]


class Models:
    """Folders with models: ``base``, ``twin`` (the same weights elsewhere), ``other``, and evaluations of them."""

    def __init__(self, world: TinyWorld):
        self.folder, self.prompts = world.folder, world.folder / "prompts.jsonl"
        for name in ("base", "twin", "other"):
            save_tiny_model(self.folder / name / "model", seed=7 if name == "other" else 0)

    def config_file(self, name: str, compared: tuple[str, ...] = ("base", "twin", "other"), **sections: Any) -> Path:
        values: dict[str, Any] = {
            "algorithm": "evaluation",
            "run_dir": str(self.folder / name),
            "seed": 3,
            "models": [{"path": str(self.folder / model / "model")} for model in compared],
            "measure": {"dtype": "float32", "tokens_per_micro_batch": 64},
            "rollout": {"engine": "transformers", "max_response_tokens": 8, "chunk_samples": 5},
            "data": {"prompts": str(self.prompts), "completion_column": "completion", "max_prompt_tokens": 8, "limit": PROMPTS},
            "scores": {
                "reward": {"function": "tests.drivers.runs:small_numbers"},
                "helpfulness": {"function": "tests.drivers.evaluations:longer"},
            },
            "cluster": {"executor": "inline", "threads": 1, "start_timeout_s": 200, "call_timeout_s": 120},
        }  # fmt: skip
        for section, keys in sections.items():
            both = isinstance(keys, dict) and isinstance(values.get(section), dict)
            values[section] = {**values[section], **keys} if both else keys
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def evaluate(self, name: str, compared: tuple[str, ...] = ("base", "twin", "other"), **sections: Any) -> Result:
        console = Console(file=io.StringIO(), width=150)
        try:
            evaluate_models(load_config(self.config_file(name, compared, **sections), []), console=console)
        finally:
            self.printed = console.file.getvalue()  # type: ignore[attr-defined]
        return Result(self.folder / name, self.printed)


class Result:
    """What an evaluation left."""

    def __init__(self, folder: Path, printed: str = ""):
        self.folder, self.printed = folder, printed
        self.evaluation = json.loads((folder / "evaluation.json").read_text())
        self.rates = json.loads((folder / "win_rates.json").read_text())
        self.rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
        self.models = {model["name"]: model for model in self.evaluation["models"]}

    def told(self, model: str) -> list[dict[str, Any]]:
        return [row["models"][model] for row in self.rows]

    def rate(self, a: str, b: str, judge: str) -> dict[str, Any]:
        (found,) = [r for r in self.rates if (r["a"], r["b"], r["judge"]) == (a, b, judge)]
        return found
