"""What came out of a pipeline's stages, in a line each, and which model won."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rayrlhf.config.offline import RewardModelConfig, SFTConfig
from rayrlhf.config.pipeline import Stage
from rayrlhf.monitoring.jsonl import read_rows
from rayrlhf.monitoring.text import finite, fixed

__all__ = ["REPORTABLE", "gate_failures", "stage_result", "winners"]

REPORTABLE = ("metrics.jsonl", "evaluations.jsonl", "evaluation.json")
"""A stage's folder with one of these has something for the report."""


def stage_result(stage: Stage) -> str:
    """What a finished stage came to, as its own files say; empty where they say nothing."""
    folder, algorithm = stage.folder, stage.config.algorithm
    if algorithm in ("sampling", "critique"):
        summary = _json(folder / "summary.json")
        if not isinstance(summary, dict):
            return ""
        return f"{summary.get('written', '?')} lines from {summary.get('prompts', '?')} prompts"
    if algorithm == "evaluation":
        told = winners(folder)
        return told[0].rpartition(": ")[0] if told else ""
    rows = read_rows(folder / "evaluations.jsonl")
    if isinstance(stage.config, SFTConfig):
        return _change("held-out perplexity", rows, "perplexity", min if stage.config.training.keep_best else None)
    if isinstance(stage.config, RewardModelConfig):
        return _change("held-out accuracy", rows, "accuracy", max if stage.config.training.keep_best else None)
    if algorithm == "ppo":
        return _change("held-out score", rows, "score/mean", None)
    return _preference(folder, rows)


def gate_failures(folder: Path) -> list[str]:
    """What a preference run's ``gates.json`` says of the parts that failed; none where there is no such file."""
    gates = _json(folder / "gates.json")
    if not isinstance(gates, dict) or gates.get("passed") is not False:
        return []
    failed = [gate for gate in gates.get("gates", []) if gate.get("passed") is False]
    return [f"{gate.get('name')}: {gate.get('found')}, wanted {gate.get('wanted')}" for gate in failed]


def winners(folder: Path) -> list[str]:
    """For each judge of an evaluation a sentence: the model with the highest mean win rate over all others, its rate
    against each with its interval, and the comparisons whose interval has 50 % in it. The first judge comes first."""
    rows = _json(folder / "win_rates.json")
    if not isinstance(rows, list):
        return []
    judges: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for row in rows:
        rate, low, high = (finite(row.get(key)) for key in ("rate", "low", "high"))
        if rate is None or low is None or high is None:
            continue
        against = judges.setdefault(str(row.get("judge")), defaultdict(dict))
        against[row["a"]][row["b"]] = rate, low, high
        against[row["b"]][row["a"]] = 1 - rate, 1 - high, 1 - low
    return [_winner(judge, against) for judge, against in judges.items()]


def _winner(judge: str, against: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    means = {name: sum(rate for rate, _, _ in others.values()) / len(others) for name, others in against.items()}
    best = max(means, key=lambda name: means[name])
    parts = [f"{_percent(r)} [{_percent(lo)}, {_percent(hi)}] against {b}" for b, (r, lo, hi) in against[best].items()]
    unsure = [other for other, (_, low, high) in against[best].items() if low <= 0.5 <= high]
    line = f"{best} wins by {judge}: {', '.join(parts)}"
    return line + (f"; 50 % lies within the interval against {', '.join(unsure)}" if unsure else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _preference(folder: Path, rows: list[dict[str, Any]]) -> str:
    verdict = _json(folder / "gates.json")
    step = verdict.get("step") if isinstance(verdict, dict) else None
    chosen = next((row for row in rows if row["step"] == step), rows[-1] if rows else {})
    parts = [f"margin {fixed(chosen['rewards/margins'], 3)}"] if "rewards/margins" in chosen else []
    if finite(chosen.get("kl_per_token")) is not None:
        parts.append(f"KL {fixed(chosen['kl_per_token'], 4)} nats a token")
    parts += [f"gate {failure}" for failure in gate_failures(folder)]
    return "; ".join(parts)


def _change(name: str, rows: list[dict[str, Any]], key: str, best: Any) -> str:
    """A measure before the training and of the model that is kept: the best one, or the last."""
    values = [value for row in rows if (value := finite(row.get(key))) is not None]
    if not values:
        return ""
    after = values[-1] if best is None else best(values)
    return f"{name} {fixed(values[0], 3)} -> {fixed(after, 3)}" if len(values) > 1 else f"{name} {fixed(after, 3)}"


def _json(path: Path) -> Any:
    """What a file holds; None where it isn't there or is no JSON: these lines are for reading, nothing depends on them."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
