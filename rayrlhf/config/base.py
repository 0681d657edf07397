"""The keys that every run has, whatever it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.health import HealthConfig
from rayrlhf.config.trainers import Positive, Section, Text

__all__ = ["CheckpointConfig", "ClusterConfig", "JobConfig", "MonitoringConfig", "NodeConfig", "RunConfig"]

Seconds = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(gt=0)]


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


class NodeConfig(Section):
    """Machines of one kind."""

    count: Positive = 1
    """How many there are."""
    gpus: int = Field(default=8, ge=0)
    """GPUs of each."""
    gpu_memory_gib: Amount = 80.0
    """Memory of one GPU, in GiB."""
    memory_gib: Amount = 1024.0
    """Host memory of each machine, in GiB."""
    gpu_link_gb_per_s: Amount = 450.0
    """What one GPU sends to others of its machine, in 10^9 bytes a second."""
    network_gb_per_s: Amount = 50.0
    """What a machine sends to others, in 10^9 bytes a second."""


class ClusterConfig(Section):
    executor: Literal["ray", "inline"] = "ray"
    """``ray``: each role in processes of its own. ``inline``: every role in the driver's process, for a debugger."""
    address: Text | None = None
    """Ray cluster to join: ``auto`` or ``host:port``. Without it a Ray of its own is started on this machine."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    nodes: list[NodeConfig] = []
    """The machines that the run is made for: what ``rayrlhf plan`` plans with, and what must be there when it starts. Without
    them the roles are placed on whatever GPUs the cluster has."""
    placement: Literal["colocated", "disaggregated"] | list[Annotated[list[Text], Field(min_length=2)]] = "colocated"
    """Which roles share GPUs. ``colocated``: all. ``disaggregated``: each has its own. A list of lists of roles: those of one
    list share, as in ``[[policy, critic], [reference, reward]]``; others have their own."""
    offload_idle: bool = True
    """Roles which share GPUs take turns: who has nothing to do keeps its states in host memory. false: all of it stays on the
    GPUs."""
    placement_timeout_s: Seconds = 900.0
    """How long, in seconds, the start waits for GPUs that others hold, and for machines that are still on their way to the Ray
    cluster: in a cloud they take minutes. What is missing is said at once."""
    threads: Positive | None = None
    """Threads of each process. By default, on one machine, OMP_NUM_THREADS, else all cores that we may use; on a Ray cluster
    OMP_NUM_THREADS (in a job: where the job was given it), else the cores of the process's own machine, divided by the
    run's processes there."""
    start_timeout_s: Seconds = 1800.0
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
