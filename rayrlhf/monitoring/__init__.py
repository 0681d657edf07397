"""What a run writes down and shows: metrics, samples, log, progress display, plan and final comparison."""

from __future__ import annotations

import logging

from rayrlhf.monitoring.comparison import evaluation_line, pair_samples, render_comparison
from rayrlhf.monitoring.health import HealthWarning, check_health, review_health, stopping
from rayrlhf.monitoring.jsonl import read_rows
from rayrlhf.monitoring.log import close_log, setup_log
from rayrlhf.monitoring.metrics import MetricWriter, check_tensorboard, check_wandb
from rayrlhf.monitoring.plan import render_plan
from rayrlhf.monitoring.progress import Progress
from rayrlhf.monitoring.samples import SampleWriter

__all__ = [
    "HealthWarning",
    "MetricWriter",
    "Progress",
    "SampleWriter",
    "check_health",
    "check_tensorboard",
    "check_wandb",
    "close_log",
    "evaluation_line",
    "pair_samples",
    "read_rows",
    "render_comparison",
    "render_plan",
    "review_health",
    "setup_log",
    "stopping",
]

# Without a handler of its own, Python would print our warnings to stderr, in the middle of the live table.
logging.getLogger("rayrlhf").addHandler(logging.NullHandler())
