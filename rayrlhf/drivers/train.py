"""``rayrlhf train``: plan, run, comparison."""

from __future__ import annotations

from rich.console import Console

from rayrlhf.config import Config, plan_rows
from rayrlhf.drivers import ppo
from rayrlhf.drivers.run import launch
from rayrlhf.monitoring import pair_samples, render_comparison, render_plan

__all__ = ["train"]


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> None:
    """Show the plan, train, and show the model before and after.

    Raises:
        InputRefused: before anything was started.
        RunFailed: where the run broke off; what was trained up to the last whole step is kept.
    """
    console = console or Console()
    render_plan(plan_rows(config), console)
    with launch(config, resume=resume, console=console) as run:
        ppo.train(run)
        results = run.evaluations.results
    if len(results) > 1:
        pairs = pair_samples(results[0], results[-1], config.evaluation.samples_shown)
        render_comparison(results[0], results[-1], pairs, config.run_dir, console)
    else:
        console.print(f"The run's folder: {config.run_dir}")
