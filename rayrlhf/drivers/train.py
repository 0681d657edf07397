"""``rayrlhf train``: plan, run, and what came of it."""

from __future__ import annotations

from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.config.base import JobConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.pipeline import COMMANDS
from rayrlhf.drivers import ppo, preference, reward_model, sft
from rayrlhf.drivers.base import BaseRun
from rayrlhf.drivers.offline import launch_offline
from rayrlhf.drivers.run import launch
from rayrlhf.errors import InputRefused
from rayrlhf.monitoring import pair_samples, render_comparison, render_plan
from rayrlhf.monitoring.plan import render_notes
from rayrlhf.planning.plan import memory_notes
from rayrlhf.planning.rows import plan_rows

__all__ = ["train"]

LOOPS = {SFTConfig: sft.train, RewardModelConfig: reward_model.train, PreferenceConfig: preference.train}


def train(config: JobConfig, *, resume: bool = False, console: Console | None = None) -> None:
    """Show the plan, train, and show what came of it.

    Raises:
        InputRefused: before anything was started.
        RunFailed: where the run broke off (what was trained up to the last whole step is kept), or its gate isn't passed.
    """
    console = console or Console()
    if isinstance(config, Config):
        _train_ppo(config, resume, console)
        return
    if not isinstance(config, SFTConfig | RewardModelConfig | PreferenceConfig):
        command = COMMANDS[config.algorithm]
        raise InputRefused(f"algorithm: {config.algorithm} trains nothing; the command for it is rayrlhf {command}")
    with launch_offline(config, resume=resume, console=console) as run:
        LOOPS[type(config)](run)
    console.print(f"The model: {config.run_dir}/model")
    _say_report(run, console)


def _train_ppo(config: Config, resume: bool, console: Console) -> None:
    render_plan(plan_rows(config), console)
    render_notes(memory_notes(config), console)
    with launch(config, resume=resume, console=console) as run:
        ppo.train(run)
        results = run.evaluations.results
    if len(results) > 1:
        pairs = pair_samples(results[0], results[-1], config.evaluation.samples_shown)
        render_comparison(results[0], results[-1], pairs, config.run_dir, console)
    else:
        console.print(f"The run's folder: {config.run_dir}")
    _say_report(run, console)


def _say_report(run: BaseRun, console: Console) -> None:
    if run.report is not None:
        console.print(f"The report: {run.report}", soft_wrap=True, highlight=False)
