"""Every key of a PPO run's configuration, with its type, unit, default and meaning.

Sizes of batches are always said in prompts, samples or tokens, for the whole cluster; what falls to one device is
derived (`rayrlhf.config.derive`). This module imports neither torch nor ray nor vllm.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from rayrlhf.config.base import MonitoringConfig, RunConfig
from rayrlhf.config.trainers import CriticConfig, PolicyConfig, Positive, ReferenceConfig, Section, Text

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "PPOConfig",
    "PPOMonitoringConfig",
    "PromptsConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutConfig",
    "SamplerConfig",
    "ScoreSource",
    "ScorerProcesses",
    "ScoringConfig",
]


class PromptsConfig(Section):
    prompts: Text
    """Prompts: a .jsonl, .json, .parquet or .csv file, or the name of a Hugging Face dataset."""
    split: Text = "train"
    """Split of a Hugging Face dataset. Files have no splits."""
    subset: Text | None = None
    """Configuration name of a Hugging Face dataset that has several."""
    prompt_column: Text = "prompt"
    """Column with the prompt: a string, or a list of messages ``{role, content}``."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """When the model's chat template is applied. ``auto``: to prompts that are lists of messages. ``always``: a plain
    string becomes one user message. ``never``: plain strings only."""
    system_prompt: Text | None = None
    """System message that is put before each conversation which has none."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens, with the chat template."""
    overlong_prompts: Literal["drop", "truncate_left", "refuse"] = "drop"
    """What happens to longer prompts: dropped, cut at their beginning, or the run is refused. The counts are shown."""
    limit: Positive | None = None
    """Use only the first so many prompts of the file."""


class DataConfig(PromptsConfig):
    completion_column: Text | None = None
    """Column with a known good continuation, used only for the held-out NLL of evaluations."""
    shuffle: bool = True
    """New order of the prompts in each epoch, from the run's seed."""
    eval_prompts: Text | None = None
    """Held-out prompts for evaluation: a file or dataset name as in ``prompts``. Without it they are taken out of
    ``prompts``."""


class ScoreSource(Section):
    """What scores a response. Exactly one of ``function``, ``model`` and ``url`` is given."""

    name: Text | None = None
    """Name in the metrics; by default the function's name, the model's last path component, or the service's host."""
    function: Text | None = None
    """Import path ``package.module:function``. Called with ``prompts`` and ``responses`` (lists of strings) and, where
    its signature names them, further columns of the data; returns one number for each response."""
    model: Text | None = None
    """Sequence-classification model with one label: a folder or a Hugging Face name."""
    url: Text | None = None
    """Address of a service, as ``rayrlhf serve-reward`` is one: ``POST URL/score`` with ``prompts`` and ``responses``
    answers ``scores``."""
    token_env: Text | None = None
    """Environment variable with the token that the service of ``url`` wants; null: no token is sent."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Deadline, in seconds, of one attempt to reach ``url``."""
    retries: int = Field(default=4, ge=0)
    """Further attempts after a failed one, with pauses of 0.5, 1, 2, ... s in between."""


class RewardSource(ScoreSource):
    """One source of reward. Exactly one of ``function``, ``model`` and ``url`` is given."""

    weight: float = 1.0
    """Factor in the weighted sum of all sources."""


class ScorerProcesses(Section):
    """Where and how scores are computed."""

    ranks: Positive = 1
    """Processes (GPUs) over which the scoring is spread."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of reward models."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = "sdpa"
    """Attention implementation of reward models; see ``policy.attention``."""
    tokens_per_micro_batch: Positive = 16384
    """Tokens that a reward model sees in one forward, on one device."""
    zero_stage: Literal[0, 3] = 0
    """0: each rank holds all parameters of a reward model. 3: they are spread over the ranks, and gathered layer by layer."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Keep a reward model's parameters in host memory, and bring each layer in when it is needed; with ``zero_stage`` 3
    only."""
    trust_remote_code: bool = False
    """Run code that comes with a reward model."""


class ScoringConfig(ScorerProcesses):
    sources: list[RewardSource] = Field(min_length=1)
    """What is added up to the score of a response."""


class RewardConfig(ScoringConfig):
    gold: ScoreSource | None = None
    """A held-out score that is never trained on, only watched beside the reward: metric ``gold/mean``, and an analysis of
    reward hacking in the report."""
    normalize: bool = False
    """Subtract the running mean of all scores so far and divide by their running deviation."""
    clip: float | None = Field(default=None, gt=0)
    """Scores are clipped to ± this, after the normalisation."""
    length_penalty: float = Field(default=0.0, ge=0)
    """Subtracted for each response token beyond ``length_penalty_from``, after the clipping."""
    length_penalty_from: int = Field(default=0, ge=0)
    """Response tokens that cost nothing."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Subtracted, after the clipping, from a response that was cut by the length limit."""


class SamplerConfig(Section):
    """What generates responses, with weights that don't change."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What generates. ``transformers`` is slow, and needs no vLLM."""
    engines: Positive = 1
    """Number of engines."""
    tensor_parallel: Positive = 1
    """Processes (GPUs) over which each engine's weights are spread; all on one machine."""
    assignment: Literal["fixed", "least_loaded"] | None = None
    """How engines get their prompts. ``fixed``: dealt out beforehand by token count, so that the same run is the same again.
    ``least_loaded``: whoever has least to do gets the next ones. By default ``fixed`` on a CPU, else ``least_loaded``."""
    max_response_tokens: Positive = 256
    """Longest response, in tokens, EOS included."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainers' log-probabilities use it too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 only without importance-sampling correction."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all. Above 0 only without importance-sampling correction."""
    stop: list[Text] = []
    """Strings that end a response, besides the EOS tokens. They stay part of the response."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the engine's weights; by default the policy's compute type."""
    max_num_seqs: Positive = 256
    """Sequences that one engine decodes at the same time."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Size of one engine's KV cache in GiB. By default computed on a CPU from ``max_num_seqs`` and the lengths; on a
    GPU what ``gpu_memory_fraction`` leaves."""
    gpu_memory_fraction: float = Field(default=0.4, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache of an engine."""
    enforce_eager: bool = False
    """Do without CUDA graphs. Always so on a CPU."""
    chunk_samples: Positive = 16
    """Finished samples that an engine hands over at once: scoring starts with the first chunk."""


class RolloutConfig(SamplerConfig):
    samples_per_prompt: Positive = 1
    """Responses that are sampled for each prompt."""
    weight_transport: Literal["auto", "shared_memory", "gloo", "nccl", "ipc"] = "auto"
    """How new weights reach the engines. ``shared_memory``: through /dev/shm (one machine). ``gloo``: over the network, from host
    memory. ``nccl``: from GPU to GPU. ``ipc``: engine and policy share GPUs, and nothing is copied. ``auto`` takes the fastest
    that the placement allows."""
    weight_bucket_mib: float = Field(default=1024.0, gt=0)
    """Size of one bucket of the weight transfer in MiB; a larger tensor gets a bucket of its own."""
    weight_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline, in seconds, of each bucket of a weight transfer."""
    lora_transfer: Literal["merged", "adapter"] = "merged"
    """What reaches the engines of a policy with LoRA: all weights with the adapters merged in, or the adapters alone, which the
    engines then apply to the base model that they keep."""
    verify_weights: Literal["start", "always"] = "start"
    """When the engines' weights are compared with the trainer's by checksum: at start-up, or after each transfer
    too."""


class PPOConfig(Section):
    steps: Positive
    """Rollout-and-update rounds of the whole run."""
    prompts_per_step: Positive
    """Prompts of one step, for the whole cluster."""
    minibatch_samples: Positive
    """Samples of one optimizer step, for the whole cluster; must divide prompts_per_step * samples_per_prompt."""
    ppo_epochs: Positive = 1
    """Passes over the samples of a step."""
    advantage_estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """``gae`` needs a critic; ``rloo`` (leave-one-out) and ``grpo`` (group-normalised) compare the samples of a
    prompt."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount for each token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    whiten_advantages: bool | None = None
    """Advantages to mean 0 and deviation 1 over all response tokens of the step; by default with ``gae`` only."""
    truncated_responses: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """How a response ends that was cut by the length limit: as if it were complete, with the critic's value of its last
    state, or it isn't trained on."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clipped below at 1 - clip_range."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """The ratio is clipped above at 1 + clip_range_high; by default the same as ``clip_range``."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss where the advantage is negative, in multiples of it; none by default."""
    clip_range_value: float | None = Field(default=0.2, gt=0)
    """New values stay within ± this of the old ones in the clipped value loss; null for none."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Factor of the entropy bonus in the policy's loss."""
    loss_aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_denominator"
    ] = "token_mean"
    """How the token losses of an optimizer step become one number."""
    loss_denominator: float | None = Field(default=None, gt=0)
    """Denominator of ``fixed_denominator``: tokens an optimizer step."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Factor of the KL to the reference in the token rewards; the first value where it adapts."""
    kl_loss_coef: float = Field(default=0.0, ge=0)
    """Factor of a KL term in the policy's loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL in the token rewards."""
    kl_loss_estimator: Literal["k1", "k2", "k3"] = "k2"
    """Estimator of the KL term in the loss."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether ``kl_coef`` moves towards ``target_kl``."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL to the reference that the adaptive controller aims at, in nats a sequence."""
    kl_horizon: float = Field(default=10000.0, gt=0)
    """Samples over which the adaptive controller acts: the longer, the gentler."""
    importance_sampling_cap: float | None = Field(default=2.0, ge=1)
    """Cap of the truncated importance weights which correct for the difference between rollout engine and trainer;
    null: off."""


class EvaluationConfig(Section):
    prompts: int = Field(default=64, ge=0)
    """Held-out prompts of an evaluation. 0: none is made."""
    every_steps: int = Field(default=0, ge=0)
    """Evaluate after every so many steps; 0: before the first step and after the last only."""
    samples_shown: int = Field(default=3, ge=0)
    """Pairs of samples, before and after, that the comparison shows at the end."""


class PPOMonitoringConfig(MonitoringConfig):
    samples_per_step: int = Field(default=4, ge=0)
    """Samples of each step that are written to samples.jsonl."""


class Config(RunConfig):
    """Proximal policy optimisation."""

    model_config = ConfigDict(title="rayrlhf configuration of PPO")

    algorithm: Literal["ppo"] = "ppo"
    """Proximal policy optimisation, or another policy gradient; ``ppo.advantage_estimator`` names it."""
    policy: PolicyConfig
    """The model that is trained."""
    critic: CriticConfig | None = CriticConfig()
    """The value model, for ``gae``; null for the other estimators."""
    reference: ReferenceConfig | None = ReferenceConfig()
    """The frozen model that the KL is measured to; null for none."""
    reward: RewardConfig
    """What scores responses."""
    rollout: RolloutConfig = RolloutConfig()
    """What generates responses, and how."""
    data: DataConfig
    """Where prompts come from."""
    ppo: PPOConfig
    """The algorithm."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Comparison on held-out prompts."""
    monitoring: PPOMonitoringConfig = PPOMonitoringConfig()
    """What is shown and written down."""
