"""Supervised fine-tuning: the likelihood of completions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from rayrlhf.actors.language_model import LanguageModelTrainer, load_trained_lm
from rayrlhf.actors.trainer import LOSS, MinibatchLoss, StepCounts, token_weights
from rayrlhf.batch import Batch
from rayrlhf.config.offline import SFTConfig
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.world import World

__all__ = ["SFTTrainer"]


class SFTTrainer(LanguageModelTrainer):
    """A language model that learns completions.

    Args:
        world: this process's place in the group.
        config: the whole run.
        model_path: folder or hub name of the model.
        total_steps: optimizer steps of the whole run.
    """

    training_columns = ("tokens", "response_mask")
    statistics = {"loss": LOSS}

    def __init__(self, world: World, config: SFTConfig, model_path: str, total_steps: int):
        super().__init__(
            world, config, config.policy, load_trained_lm(model_path, config, config.policy, world), total_steps
        )

    def training_forward(self) -> Callable[[ModelInput], tuple[Tensor, ...]]:
        return partial(self._forward, temperature=1.0)

    def minibatch_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        """Negative log-likelihood, the mean over the learnt tokens of the optimizer step."""
        weights = token_weights(shard, counts, "token_mean")

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = outputs[0]
            total = -(weights[inputs.where.cpu()].to(logprobs.device) * logprobs).sum()
            return total, {"loss": total}

        return loss
