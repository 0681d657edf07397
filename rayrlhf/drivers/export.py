"""``rayrlhf export``: a run's final model as one Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from rayrlhf.config import load_config
from rayrlhf.config.jobs import ModelEvaluationConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.loading import quiet_loading, to_model_folder
from rayrlhf.models.merging import MERGE_CHECK
from rayrlhf.models.tokenizer import load_tokenizer

__all__ = ["export_model"]

TOLERANCE = 1e-3
"""Largest difference of a log-probability, in nats, that merging may make in float32."""
PROBES = (4, 64)
"""Sequences, and tokens of each, on which merged and unmerged models are compared."""


def export_model(run: Path, out: Path) -> list[str]:
    """Write ``RUN/model`` to ``out``; an adapter is merged into its base model.

    Returns:
        What was done, a line each.

    Raises:
        InputRefused: ``run`` has no model, or ``out`` exists.
        RunFailed: the merged model's log-probabilities are not the adapter's, or it can't be written. Nothing is left.
    """
    model = run / "model"
    if not (model / "config.json").is_file() and not (model / "adapter_config.json").is_file():
        raise InputRefused(f"{run} holds no model yet: {model} has neither config.json nor adapter_config.json")
    if out.exists():
        raise InputRefused(f"{out} exists already; export writes a new folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if (model / "adapter_config.json").is_file():
            lines = _merge(run, model, partial)
        else:
            shutil.copytree(model, partial)
            lines = [_whole(model)]
        partial.replace(out)
    except OSError as error:
        raise RunFailed(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [*lines, f"written to {out}"]


def _whole(model: Path) -> str:
    """What is known of a model that holds whole weights already."""
    file = model / MERGE_CHECK
    if not file.is_file():
        return "the run's model holds whole weights; no adapters were merged into them"
    found = json.loads(file.read_text(encoding="utf-8"))
    which = "at most" if found["dtype"] == "float32" else "on average"
    return (
        f"the run's model holds whole weights; when its adapters were merged, {found['compared']} differed by {which} "
        f"{found['difference']:.2g} in {found['dtype']} (legal: {found['tolerance']:.2g})"
    )


def _merge(run: Path, adapter: Path, out: Path) -> list[str]:
    from peft import PeftModel

    config = load_config(run / "config.yaml")
    if isinstance(config, ModelEvaluationConfig):
        raise InputRefused(f"{run}: holds an evaluation, which has no model of its own")
    policy = config.policy
    base = to_model_folder(policy.path, run / "base_model")
    load_model_config(base, trust_remote_code=policy.trust_remote_code)  # says plainly where there is none
    auto = _auto_class(adapter)
    with quiet_loading():
        whole: Any = auto.from_pretrained(base, dtype=torch.float32, trust_remote_code=policy.trust_remote_code)
        adapted = PeftModel.from_pretrained(whole, adapter).eval()
    before = _logprobs(adapted)
    merged: Any = adapted.merge_and_unload()
    difference = float((_logprobs(merged) - before).abs().max())
    if not difference <= TOLERANCE:  # NaN too
        raise RunFailed(
            f"merging changes log-probabilities by up to {difference:.3g} nats (legal: {TOLERANCE:g}); nothing is written"
        )
    merged.to(getattr(torch, policy.dtype)).save_pretrained(out)
    tokenizer = policy.tokenizer or base
    load_tokenizer(
        tokenizer, chat_template=policy.chat_template, trust_remote_code=policy.trust_remote_code
    ).save_pretrained(out)
    return [f"adapter merged into {base}: log-probabilities differ by at most {difference:.2g} nats in float32"]


def _auto_class(adapter: Path) -> Any:
    from transformers import AutoModelForCausalLM

    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if kind not in (None, "CAUSAL_LM"):
        raise InputRefused(f"{adapter}: an adapter of a model of type {kind} can't be merged; legal: CAUSAL_LM")
    return AutoModelForCausalLM


@torch.no_grad()
def _logprobs(model: Any) -> torch.Tensor:
    """Log-probabilities of tokens that a fixed seed draws: float32 [sequences, tokens - 1]."""
    rows, length = PROBES
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (rows, length), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
