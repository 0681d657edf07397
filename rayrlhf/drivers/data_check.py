"""``rayrlhf data check``: what is wrong with a data file, or with the data of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.config.offline import PreferenceConfig, SFTConfig
from rayrlhf.config.roots import AnyConfig
from rayrlhf.config.schema import Config
from rayrlhf.data.check import check_file
from rayrlhf.data.cleaning import fix
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
    fix_to: Path | None = None,
    console: Console | None = None,
) -> int:
    """Check, show, and where asked for write a cleaned copy.

    Args:
        what: a data file, or a configuration (``.yaml``), whose own model's tokenizer is used.
        model: for a file: the model whose tokenizer is used; without one nothing is said of lengths and templates.
        fix_to: where the cleaned copy goes.

    Returns:
        The exit code: 2 where errors were found and no copy was asked for, else 0.
    """
    console = console or Console()
    if what.suffix in (".yaml", ".yml"):
        if model is not None:
            raise InputRefused("--model: a configuration names its own model; give --model with a data file")
        config = load_config(what, list(overrides))
        report = check_file(config.data, _tokenizer_of(config), kind=data_kind(config))
    else:
        if overrides:
            raise InputRefused(f"{overrides[0]}: keys can be replaced in a configuration, and {what} is a data file")
        report = check_file(what, load_tokenizer(model) if model is not None else None)
    render_check(report, console)
    if fix_to is None:
        return 2 if report.errors else 0
    for line in fix(report, fix_to).lines():
        console.print(line, markup=False, highlight=False)
    return 0


def data_kind(config: AnyConfig) -> Any:
    """What the rows of a configuration's data are meant to be: prompts, examples, pairs or labelled."""
    if isinstance(config, Config):
        return "prompts"
    if isinstance(config, SFTConfig):
        return "examples"
    return "labelled" if isinstance(config, PreferenceConfig) and config.dpo.loss == "kto" else "pairs"


def _tokenizer_of(config: AnyConfig) -> Any:
    path = config.policy.tokenizer or to_model_folder(config.policy.path, Path(config.run_dir) / "base_model")
    return load_tokenizer(
        path, chat_template=config.policy.chat_template, trust_remote_code=config.policy.trust_remote_code
    )
