"""``rayrlhf train``: plan, run, and what came of it."""

from __future__ import annotations

from rich.console import Console

from rayrlhf.config import Config, plan_rows
from rayrlhf.config.base import RunConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.drivers import ppo, preference, reward_model, sft
from rayrlhf.drivers.offline import launch_offline
from rayrlhf.drivers.run import launch
from rayrlhf.monitoring import pair_samples, render_comparison, render_plan

__all__ = ["train"]

LOOPS = {SFTConfig: sft.train, RewardModelConfig: reward_model.train, PreferenceConfig: preference.train}


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> None:
    """Show the plan, train, and show what came of it.

    Raises:
        InputRefused: before anything was started.
        RunFailed: where the run broke off (what was trained up to the last whole step is kept), or its gate isn't passed.
    """
    console = console or Console()
    if isinstance(config, Config):
        _train_ppo(config, resume, console)
        return
    assert isinstance(config, SFTConfig | RewardModelConfig | PreferenceConfig)
    with launch_offline(config, resume=resume, console=console) as run:
        LOOPS[type(config)](run)
    console.print(f"The model: {config.run_dir}/model")


def _train_ppo(config: Config, resume: bool, console: Console) -> None:
    render_plan(plan_rows(config), console)
    with launch(config, resume=resume, console=console) as run:
        ppo.train(run)
        results = run.evaluations.results
    if len(results) > 1:
        pairs = pair_samples(results[0], results[-1], config.evaluation.samples_shown)
        render_comparison(results[0], results[-1], pairs, config.run_dir, console)
    else:
        console.print(f"The run's folder: {config.run_dir}")
