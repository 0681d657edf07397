"""What can be known to be wrong with a model before it is read: models without weights, in seconds, of any size.

Roles that share GPUs are built one after the other, and each reads its model. What would keep a later one from being built is
looked for here before the first one begins. Not seen without weights: tensors that are missing in the files, and attention that
looks where it shouldn't (`rayrlhf.models.loading` tries it).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayrlhf.config.trainers import ModelConfig, TrainedConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.heads import check_one_label, linear_head
from rayrlhf.models.loading import is_reward_model, load_config, model_config, quiet_loading
from rayrlhf.models.parallel import check_sharing
from rayrlhf.models.zero import check_disk

__all__ = ["bare_backbone", "bare_causal_lm", "bare_reward_model", "check_training"]


def bare_causal_lm(path: str, model: ModelConfig, key: str) -> Any:
    """What `load_causal_lm` reads, without weights: its parameters are on the meta device.

    Args:
        path: folder or hub name.
        model: how it will be run.
        key: of that section, for messages.

    Raises:
        InputRefused: where there is no model at ``path``, or it can't be run in this process as ``model`` says.
    """
    return _bare(AutoModelForCausalLM, model_config(path, model), model, key)


def bare_backbone(path: str, model: ModelConfig, key: str, num_layers: int | None = None) -> Any:
    """The backbone that `load_critic` reads, without weights; as `bare_causal_lm`."""
    if is_reward_model(load_config(path, trust_remote_code=model.trust_remote_code)):
        return bare_reward_model(path, model, key, num_layers).base_model
    return _bare(AutoModel, model_config(path, model, num_layers), model, key)


def bare_reward_model(path: str, model: ModelConfig, key: str, num_layers: int | None = None) -> Any:
    """The sequence-classification model that `load_reward_model` reads, without weights; as `bare_causal_lm`."""
    config = model_config(path, model, num_layers)
    check_one_label(path, config)
    classifier = _bare(AutoModelForSequenceClassification, config, model, key)
    linear_head(path, classifier)
    return classifier


def check_training(bare: Any, section: TrainedConfig, key: str) -> None:
    """Whether a model can be trained in this process as configured: ranks that share it, states on a disk.

    Raises:
        InputRefused: with what stands against it.
    """
    check_sharing(bare.config, section, key)
    check_disk(section, key)


def _bare(kind: Any, config: Any, model: ModelConfig, key: str) -> Any:
    with torch.device("meta"), quiet_loading():
        try:
            made = kind.from_config(
                config, attn_implementation=model.attention, trust_remote_code=model.trust_remote_code
            )
        except ImportError as error:
            if not model.attention.startswith("flash"):
                raise
            raise InputRefused(
                f"{key}.attention: found {model.attention}, which can't be used on this machine ({error}); legal: sdpa, eager or "
                "varlen, or install the package flash-attn there (pip install flash-attn)"
            ) from error
        made.tie_weights()  # some tie their parameters only once they have weights
    return made
