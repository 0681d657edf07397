"""The keys of the roles which hold a model: policy, critic and reference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CriticConfig",
    "FrozenConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "ReferenceConfig",
    "Section",
    "TrainedConfig",
]

Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values don't change, docs stand under the fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,
    )


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the adapter's product is multiplied by alpha / rank."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter, by the end of their names."""
    save: Literal["merged", "adapter"] = "merged"
    """What the run's final model is: a merged model, or the adapter alone."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), with float32 states."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate at the end of the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient is scaled down to this norm, over all ranks."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does between warm-up and the run's last optimizer step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of ``linear`` and ``cosine``, in multiples of ``lr``."""
    max_skipped_steps: Positive = 3
    """So many optimizer steps with non-finite loss or gradient, one after the other, end the run."""


class ModelConfig(Section):
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. Weights that are trained are kept in float32 as well."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = "sdpa"
    """Attention implementation of transformers, or ``varlen``: torch's own attention of variable lengths."""
    packing: bool | None = None
    """Put several samples into one row instead of padding them; by default where the attention has variable lengths
    (flash_attention_2, varlen)."""
    tokens_per_micro_batch: Positive = 8192
    """Tokens of one forward on one device, padding included; at least the longest sample."""
    logits_chunk_tokens: Positive = 2048
    """Tokens for which logits over the vocabulary exist at the same time."""
    ranks: Positive = 1
    """Processes (GPUs)."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class TrainedConfig(ModelConfig):
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO: what is spread over the ranks: 1 optimizer states, 2 gradients too, 3 parameters too."""
    sequence_parallel: Positive = 1
    """So many ranks share one long sequence, each with a part of it (Ulysses); divides ``ranks``."""
    tensor_parallel: Positive = 1
    """So many ranks share each layer's weights (DeepSpeed's AutoTP); divides ``ranks``."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states live: on the device, in host memory, or on a disk; a run with states on a disk can't be
    resumed."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters live that aren't needed at the moment; others than none with ``zero_stage`` 3 only."""
    nvme_path: Text | None = None
    """Folder on a fast disk of each machine, for ``nvme``."""
    gradient_checkpointing: bool = False
    """Keep only layer inputs for the backward pass and compute the rest again."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW (Loshchilov & Hutter 2019), with float32 states."""


class PolicyConfig(TrainedConfig):
    path: Text
    """Model folder, Hugging Face name, .gguf file, or ``package:NAME`` for a Python package that ships one .gguf
    file."""
    tokenizer: Text | None = None
    """Folder or name of the tokenizer; by default the model's."""
    chat_template: Text | None = None
    """File with a Jinja chat template, for a model without one."""


class CriticConfig(TrainedConfig):
    path: Text | None = None
    """Model that the critic starts from: a causal LM or a reward model; by default the policy's."""
    num_layers: Positive | None = None
    """Keep only the first so many layers of it."""


class FrozenConfig(ModelConfig):
    zero_stage: Literal[0, 3] = 0
    """0: each rank holds all parameters. 3: they are spread over the ranks, and gathered layer by layer."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Keep the parameters in host memory, and bring each layer in when it is needed; with ``zero_stage`` 3 only."""


class ReferenceConfig(FrozenConfig):
    path: Text | None = None
    """The frozen reference; by default the policy's model (with LoRA: the policy with its adapters off, at no cost of
    memory)."""
