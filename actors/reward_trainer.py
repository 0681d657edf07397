"""A reward model in training, on pairs of responses of which one was preferred."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rayrlhf.actors.trainer import LOSS, SEQUENCES, MinibatchLoss, StepCounts, TrainerRole
from rayrlhf.algorithms import bradley_terry_loss
from rayrlhf.batch import Batch
from rayrlhf.checkpoint import sizes_on_disk
from rayrlhf.config.offline import RewardModelConfig
from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.adapters import add_lora
from rayrlhf.models.engine import partitioner_for
from rayrlhf.models.export import save_reward_folder
from rayrlhf.models.heads import ScalarModel
from rayrlhf.models.layout import ModelInput, micro_batches, pair_micro_batches
from rayrlhf.models.loading import DTYPES, load_critic, prompt_sharing, scorer_class
from rayrlhf.models.merging import Checked, merged_scores, probe_batch, write_checked
from rayrlhf.models.packing import packs
from rayrlhf.models.skeleton import bare_backbone, check_training
from rayrlhf.models.tokenizer import Padding
from rayrlhf.models.world import World

__all__ = ["RewardModelTrainer"]


def check_saved_whole(policy: TrainedConfig) -> None:
    if policy.lora is not None and policy.lora.save == "adapter":
        raise InputRefused("policy.lora.save is 'adapter': a reward model is written whole, legal here: 'merged'")


class RewardModelTrainer(TrainerRole):
    """A scalar head over a language model's backbone, read at the last token of prompt and response.

    The head starts at 0 (then the first loss is ln 2 for each pair), or is that of the reward model that it starts from.

    Args:
        world: this process's place in the group.
        config: the whole run.
        model_path: folder or hub name of a causal LM or a reward model.
        total_steps: optimizer steps of the whole run.

    Raises:
        InputRefused: where the model's family has no way to write a reward model down.
    """

    config: RewardModelConfig
    training_columns = ("tokens", "response_mask", "prompt_length", "margin")
    statistics = {"loss": LOSS, "accuracy": SEQUENCES, "margin": SEQUENCES}

    def __init__(self, world: World, config: RewardModelConfig, model_path: str, total_steps: int):
        policy = config.policy
        check_saved_whole(policy)
        zero = partitioner_for(policy, world, self.role, config.cluster.call_timeout_s)
        dtype = torch.float32 if zero is None else zero.dtype
        model = load_critic(model_path, policy, num_layers=None, dtype=dtype, zero=zero)
        scorer_class(model.backbone.config, model_path)  # now, not after all the training
        self.model_path = model_path
        self.sharing = prompt_sharing(model.backbone, policy)
        if policy.lora is not None:
            adapted = add_lora(model.backbone, policy.lora, config.seed)
            model = ScalarModel(adapted.get_base_model(), model.head)
        self.scalar = model
        super().__init__(world, config, policy, model, total_steps)

    @classmethod
    def check(cls, config: RewardModelConfig, model_path: str, total_steps: int) -> None:
        """Raise what the constructor would raise of the configuration; no weight is read.

        Raises:
            InputRefused: see `rayrlhf.models.skeleton`.
        """
        policy = config.policy
        check_saved_whole(policy)
        backbone = bare_backbone(model_path, policy, cls.role)
        scorer_class(backbone.config, model_path)
        check_training(backbone, policy, cls.role)
        if policy.lora is not None:
            add_lora(backbone, policy.lora, config.seed)

    def scores(self, batch: Batch) -> Batch:
        """Sample column ``score``, float32 [S], of any samples."""
        inputs = micro_batches(batch, self.trained.tokens_per_micro_batch, packs(self.trained), mask=None)
        scores = torch.zeros(len(batch), dtype=torch.float32)
        for micro, (last,) in zip(inputs, self.trainer.infer(inputs, self.training_forward()), strict=False):
            scores[micro.samples] = last
        return Batch(batch.offsets, {}, {"score": scores})

    # -- training -----------------------------------------------------------------------------------------------

    def training_forward(self) -> Callable[[ModelInput], tuple[Tensor, ...]]:
        return lambda inputs: (self.trainer.engine(inputs)[1],)

    def count(self, shard: Batch) -> tuple[int, int]:
        return int(shard["response_mask"].sum()), len(shard) // 2

    def lay_out_training(self, shard: Batch) -> list[ModelInput]:
        budget = self.trained.tokens_per_micro_batch
        return pair_micro_batches(shard, budget, packing=packs(self.trained), sharing=self.sharing, mask=None)

    def minibatch_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        """Bradley and Terry's likelihood, the mean over the pairs of the optimizer step."""
        settings = self.config.reward_model

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            chosen, rejected = outputs[0][0::2], outputs[0][1::2]
            margin = shard["margin"][inputs.samples.cpu()[0::2]].to(chosen.device) if settings.margin else None
            total = bradley_terry_loss(chosen, rejected, margin, settings.center_coef).sum() / counts.sequences
            return total, {
                "loss": total,
                "accuracy": (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum(),
                "margin": (chosen - rejected).sum(),
            }

        return loss

    # -- the model ----------------------------------------------------------------------------------------------

    def save_model(
        self, folder: str, mean: float = 0.0, deviation: float = 1.0, padding: Padding | None = None
    ) -> dict[str, int]:
        """Write a Hugging Face sequence-classification folder whose scores are (score - mean) / deviation.

        All ranks call it. Adapters are merged. See `save_reward_folder` for where mean, deviation and padding go.

        Returns:
            Of rank 0, which writes: bytes by the file's name. Of others nothing.

        Raises:
            RunFailed: where the merged model's scores aren't those of the model with its adapters; or where the weights
                aren't on the device (`set_residence`).
        """
        self.trainer.residence.require("weights", "saving the model")
        dtype = DTYPES[self.trained.dtype]

        def write(where: Path | None) -> None:
            save_reward_folder(
                self.scalar,
                where,
                dtype,
                zero_stage=self.trained.zero_stage,
                path=self.model_path,
                mean=mean,
                deviation=deviation,
                padding=padding,
            )

        raw = None
        if self.trained.lora is not None:
            raw = self.scores(probe_batch(self.scalar.backbone.config.get_text_config().vocab_size))["score"]
        if self.world.rank != 0:
            write(None)
        elif raw is None:
            write(Path(folder))
        else:
            trust = self.trained.trust_remote_code
            expected = (raw - mean) / deviation
            checked = Checked("scores", expected, lambda where: merged_scores(where, dtype, trust), dtype)
            write_checked(Path(folder), write, checked)
        return sizes_on_disk(Path(folder)) if self.world.rank == 0 else {}
