"""The critic: values of states, and their regression towards returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.actors.trainer import LOSS, TOKENS, MinibatchLoss, StepCounts, TrainerRole, scatter_tokens, token_weights
from rayrlhf.algorithms import value_loss
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.models.adapters import add_lora
from rayrlhf.models.engine import partitioner_for
from rayrlhf.models.heads import ScalarModel
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.loading import load_critic
from rayrlhf.models.skeleton import bare_backbone, check_training
from rayrlhf.models.world import World

__all__ = ["CriticTrainer"]


class CriticTrainer(TrainerRole):
    """A value model under DeepSpeed ZeRO.

    Args:
        world: this process's place in the group.
        config: the whole run; ``config.critic`` is given.
        model_path: folder or hub name of the model that it starts from.
        total_steps: optimizer steps of the whole run.
    """

    config: Config
    role = "critic"
    training_columns = ("tokens", "response_mask", "values", "returns")
    statistics = {"value_loss": LOSS, "value_clipfrac": TOKENS}

    def __init__(self, world: World, config: Config, model_path: str, total_steps: int):
        critic = config.critic
        assert critic is not None
        zero = partitioner_for(critic, world, self.role, config.cluster.call_timeout_s)
        dtype = torch.float32 if zero is None else zero.dtype
        model = load_critic(model_path, critic, num_layers=critic.num_layers, dtype=dtype, zero=zero)
        if critic.lora is not None:
            adapted = add_lora(model.backbone, critic.lora, config.seed + 1)
            model = ScalarModel(adapted.get_base_model(), model.head)  # type: ignore[operator]
        super().__init__(world, config, critic, model, total_steps)

    @classmethod
    def check(cls, config: Config, model_path: str, total_steps: int) -> None:
        """Raise what the constructor would raise of the configuration; no weight is read.

        Raises:
            InputRefused: see `rayrlhf.models.skeleton`.
        """
        critic = config.critic
        assert critic is not None
        backbone = bare_backbone(model_path, critic, cls.role, critic.num_layers)
        check_training(backbone, critic, cls.role)
        if critic.lora is not None:
            add_lora(backbone, critic.lora, config.seed + 1)

    def values(self, batch: Batch) -> Batch:
        """The value of the state before each response token, and of the state after each sample's last token.

        Returns:
            Token column ``values`` and sample column ``final_values``, float32.
        """
        inputs = self.lay_out(batch)
        outputs = self.trainer.infer(inputs, self.trainer.engine)
        final = torch.zeros(len(batch), dtype=torch.float32)
        for micro, (_, last) in zip(inputs, outputs, strict=False):
            final[micro.samples] = last
        values = scatter_tokens(batch, inputs, [o[0] for o in outputs])
        return Batch(batch.offsets, {"values": values}, {"final_values": final})

    def training_forward(self):
        return self.trainer.engine

    def minibatch_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        """The clipped value loss, averaged over the response tokens."""
        weights = token_weights(shard, counts, "token_mean")
        clip_range = self.config.ppo.clip_range_value

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            values = outputs[0]
            where, device = inputs.where.cpu(), values.device
            old, returns = shard["values"][where].to(device), shard["returns"][where].to(device)
            clipped = value_loss(values, old, returns, clip_range)
            total = (weights[where].to(device) * clipped.loss).sum()
            return total, {"value_loss": total, "value_clipfrac": clipped.clipped.sum()}

        return loss
