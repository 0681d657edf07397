"""The keys that every run has, whatever it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.health import HealthConfig
from rayrlhf.config.trainers import Positive, Section, Text

__all__ = ["CheckpointConfig", "ClusterConfig", "JobConfig", "MonitoringConfig", "RunConfig"]

Seconds = Annotated[float, Field(gt=0)]


class CheckpointConfig(Section):
    every_steps: int = Field(default=0, ge=0)
    """Save after every so many steps, and after the last; 0: after the last only."""
    keep: Positive = 2
    """Checkpoints that are kept; older ones are removed."""


class MonitoringConfig(Section):
    progress: Literal["auto", "table", "lines", "none"] = "auto"
    """Live table, one line a step, or nothing; ``auto`` takes the table on a terminal, else lines."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb_project: Text | None = None
    """Log to this Weights & Biases project; needs ``pip install wandb``."""


class ClusterConfig(Section):
    executor: Literal["ray", "inline"] = "ray"
    """``ray``: each role in processes of its own. ``inline``: every role in the driver's process, for a debugger."""
    address: Text | None = None
    """Ray cluster to join: ``auto`` or ``host:port``. Without it a Ray of its own is started on this machine."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    threads: Positive | None = None
    """Threads of each process on a CPU; by default all cores that the machine gives us."""
    start_timeout_s: Seconds = 600.0
    """Deadline, in seconds, for all roles to come up."""
    call_timeout_s: Seconds = 1800.0
    """Deadline, in seconds, of each call of a role."""


class JobConfig(Section):
    """What everything has that is started with a configuration."""

    algorithm: str
    """What is done."""
    run_dir: Text
    """Folder of the run: configuration, metrics, samples, checkpoints, model. Made where it doesn't exist."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Everything random is derived from it."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the roles run."""


class RunConfig(JobConfig):
    """What everything has that trains a model. Each algorithm's own configuration adds its keys to these."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state of the run is saved."""
    health: HealthConfig = HealthConfig()
    """When the metrics are worth a warning, and when they end the run."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """What is shown and written down."""
