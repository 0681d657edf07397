"""``rayrlhf sample``: responses of a model, scored and ranked, as preference pairs or as examples to learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from rayrlhf.batch import Batch
from rayrlhf.cluster import Group
from rayrlhf.config import Config
from rayrlhf.config.base import RunConfig
from rayrlhf.data import Prompt
from rayrlhf.drivers.base import started
from rayrlhf.drivers.experience import deal, prompt_batch
from rayrlhf.drivers.preflight import prepare
from rayrlhf.drivers.roles import role_specs
from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["sample_responses"]

FORMS = ("pairs", "best", "all")


def sample_responses(
    config: RunConfig,
    out: Path,
    *,
    responses: int,
    prompts: int | None,
    form: str,
    least_gap: float,
    console: Console | None = None,
) -> dict[str, int]:
    """Sample, score, and write one line a pair, a best response or a response.

    Args:
        config: of PPO; its policy's model, prompts, rollout and reward are used, and nothing is trained.
        out: the file, written whole or not at all.
        responses: to each prompt.
        prompts: the first so many training prompts; None: all.
        form: "pairs" (prompt, chosen, rejected, margin: the best over the worst), "best" (prompt, completion, score) or
            "all" (prompt, response, score).
        least_gap: pairs whose scores differ by less, or not at all, are left out.

    Returns:
        ``written`` lines, ``prompts``, and ``ties`` (pairs left out).

    Raises:
        InputRefused: before anything was started.
        RunFailed: where a role failed, or the file can't be written.
    """
    console = console or Console()
    if not isinstance(config, Config):
        raise InputRefused(f"algorithm: sample takes a configuration of ppo, found {config.algorithm}")
    _check(out, responses, form)
    prepared = prepare(config, resume=None)
    chosen = prepared.prompts.train[:prompts]
    specs = [spec for spec in role_specs(prepared) if spec.name in ("reward", "rollout")]
    counts = {"written": 0, "prompts": len(chosen), "ties": 0}
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with started(config, specs) as groups, open(partial, "w", encoding="utf-8") as file:
            starts = range(0, len(chosen), config.ppo.prompts_per_step)
            for start in track(starts, "sampling", console=console, disable=not console.is_terminal):
                some = chosen[start : start + config.ppo.prompts_per_step]
                batch = _scored(groups, prompt_batch(some, responses, (config.seed, start)))
                for row in _rows(some, batch, prepared.tokenizer, form, least_gap, counts):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(out)
    except OSError as error:
        raise RunFailed(f"{out} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    ties = f"; {counts['ties']} left out: their scores don't differ enough" if counts["ties"] else ""
    console.print(f"{counts['written']} lines from {counts['prompts']} prompts in {out}{ties}", highlight=False)
    return counts


def _check(out: Path, responses: int, form: str) -> None:
    problems = [] if form in FORMS else [f"--as: found {form!r}; legal: {', '.join(FORMS)}"]
    if form == "pairs" and responses < 2:
        problems.append(f"--responses: found {responses}; a pair needs 2 or more")
    if out.suffix != ".jsonl":
        problems.append(f"{out}: legal: a name that ends in .jsonl")
    if out.exists():
        problems.append(f"{out} exists already; sample writes a new file")
    if problems:
        raise InputRefused(problems)


def _scored(groups: Mapping[str, Group], prompts: Batch) -> Batch:
    """The samples in the order of ``prompts``, with their scores."""
    running = [
        (chunk, groups["reward"].submit("score", chunk))
        for chunk in groups["rollout"].stream("generate", deal(prompts, groups["rollout"].size))
    ]
    batch = Batch.concat([chunk.merge(call.result()) for chunk, call in running])
    return batch.select(torch.argsort(batch["position"]))


def _rows(
    prompts: list[Prompt], batch: Batch, tokenizer: Any, form: str, least_gap: float, counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    spans, lengths, scores = batch.spans(), batch["prompt_length"].tolist(), batch["score"].tolist()
    texts = [
        tokenizer.decode(batch["tokens"][start + length : end].tolist(), skip_special_tokens=True)
        for (start, end), length in zip(spans, lengths, strict=True)
    ]
    each = len(batch) // len(prompts)
    for k, prompt in enumerate(prompts):
        ranked = sorted(zip(scores[k * each :][:each], texts[k * each :][:each], strict=True), key=lambda one: -one[0])
        given: Any = prompt.text if prompt.messages is None else prompt.messages
        (high, best), (low, worst) = ranked[0], ranked[-1]
        if form == "pairs" and (high - low < least_gap or high == low or best == worst):
            counts["ties"] += 1
            continue
        found: list[dict[str, Any]]
        if form == "pairs":
            found = [{"prompt": given, "chosen": best, "rejected": worst, "margin": high - low}]
        elif form == "best":
            found = [{"prompt": given, "completion": best, "score": high}]
        else:
            found = [{"prompt": given, "response": text, "score": score} for score, text in ranked]
        counts["written"] += len(found)
        yield from found
