"""``rayrlhf data check``: what is wrong with a data file, or with the data of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.offline import PreferenceConfig, SFTConfig
from rayrlhf.config.roots import AnyConfig
from rayrlhf.config.schema import Config
from rayrlhf.data.check import check_file
from rayrlhf.data.cleaning import fix
from rayrlhf.drivers.serve import scorer
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import to_model_folder
from rayrlhf.models.tokenizer import load_tokenizer
from rayrlhf.monitoring.data_check import render_check

__all__ = ["check_data", "data_kind"]


def check_data(
    what: Path,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    reward_model: str | None = None,
    fix_to: Path | None = None,
    console: Console | None = None,
) -> int:
    """Check, show, and where asked for write a cleaned copy.

    Args:
        what: a data file, or a configuration (``.yaml``), whose own model's tokenizer is used.
        model: for a file: the model whose tokenizer is used; without one nothing is said of lengths and templates.
        reward_model: a reward model's folder: then pairs are suspected to be swapped by its scores, and not by their looks.
        fix_to: where the cleaned copy goes.

    Returns:
        The exit code: 2 where errors were found and no copy was asked for, else 0.

    Raises:
        InputRefused: where an option would be ignored, or something can't be read.
    """
    console = console or Console()
    score = None if reward_model is None else _scorer(reward_model)
    if what.suffix in (".yaml", ".yml"):
        if model is not None:
            raise InputRefused("--model: a configuration names its own model; give --model with a data file")
        config = load_config(what, list(overrides))
        report = check_file(config.data, _tokenizer_of(config), score, kind=data_kind(config))
    else:
        if overrides:
            raise InputRefused(f"{overrides[0]}: keys can be replaced in a configuration, and {what} is a data file")
        report = check_file(what, load_tokenizer(model) if model is not None else None, score)
    if reward_model is not None and not any(file.kind == "pairs" for file in report.files):
        kinds = ", ".join(sorted({str(file.kind or "of no known kind") for file in report.files}))
        raise InputRefused(f"--reward-model: it is asked about pairs, and {what} holds none (found: {kinds})")
    render_check(report, console)
    if fix_to is None:
        return 2 if report.errors else 0
    for line in fix(report, fix_to).lines():
        console.print(line, markup=False, highlight=False)
    return 0


def _scorer(reward_model: str) -> Any:
    try:
        return scorer(reward_model)
    except InputRefused as refused:
        raise InputRefused(f"--reward-model: {problem}" for problem in refused.problems) from refused


def data_kind(config: AnyConfig) -> Any:
    """What the rows of a configuration's data are meant to be: prompts, examples, pairs or labelled."""
    if isinstance(config, Config | SamplingConfig | CritiqueConfig | ModelEvaluationConfig):
        return "prompts"
    if isinstance(config, SFTConfig):
        return "examples"
    return "labelled" if isinstance(config, PreferenceConfig) and config.dpo.loss == "kto" else "pairs"


def _tokenizer_of(config: AnyConfig) -> Any:
    if isinstance(config, ModelEvaluationConfig):
        first = config.models[0]
        path = first.tokenizer or to_model_folder(first.path, Path(config.run_dir) / "base_model")
        return load_tokenizer(path, chat_template=first.chat_template)
    path = config.policy.tokenizer or to_model_folder(config.policy.path, Path(config.run_dir) / "base_model")
    return load_tokenizer(
        path, chat_template=config.policy.chat_template, trust_remote_code=config.policy.trust_remote_code
    )
