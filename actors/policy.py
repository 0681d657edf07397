"""The policy: log-probabilities, PPO updates, weights for the rollout engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.trainer import MinibatchLoss, TrainerRole, scatter_tokens
from rayrlhf.algorithms import approximate_kl, importance_weights, kl_estimate, policy_loss
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.errors import InputRefused
from rayrlhf.models.export import gathered_adapters, named_weights, save_model_folder
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.loading import DTYPES, add_lora, check_output_head, load_causal_lm
from rayrlhf.models.world import World
from rayrlhf.weights import Manifest, make_transport, publish, release

__all__ = ["PolicyTrainer"]


class PolicyTrainer(TrainerRole):
    """The trained model under DeepSpeed ZeRO.

    Args:
        world: this process's place in the group.
        config: the whole run.
        model_path: folder or hub name of the model.
        transport: how weights travel to the rollout engines.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, world: World, config: Config, model_path: str, transport: str, total_steps: int):
        # Trained weights are float32; DeepSpeed makes the bfloat16 copy where one is computed with.
        lm = load_causal_lm(model_path, config.policy, dtype=torch.float32)
        check_output_head(lm)
        self.peft = add_lora(lm, config.policy.lora, config.seed) if config.policy.lora is not None else None
        if config.policy.zero_stage == 3 and any(True for _ in lm.get_output_embeddings().children()):
            # Its parts would be gathered for each chunk of logits, and ranks have different numbers of them.
            raise InputRefused("policy.lora.target_modules: with zero_stage 3 the output layer can't have an adapter")
        self.lm = lm
        self.transport = make_transport(transport)
        model = PolicyModel(lm, config.policy.logits_chunk_tokens)
        super().__init__(world, config, config.policy, model, total_steps)

    # -- log-probabilities --------------------------------------------------------------------------------------

    def token_logprobs(self, batch: Batch, adapters: bool = True, temperature: float | None = None) -> Batch:
        """Log-probabilities of the response tokens, at the rollout temperature unless another one is given.

        Returns:
            Column ``old_logprobs``; ``reference_logprobs`` where ``adapters`` is False: then the adapters are off, and
            the policy is its own reference.
        """
        inputs = self.lay_out(batch)
        forward = partial(self._forward, temperature=temperature)
        if adapters:
            outputs = self.trainer.infer(inputs, forward)
        else:
            assert self.peft is not None, "only a policy with LoRA is its own reference"
            with self.peft.disable_adapter():
                outputs = self.trainer.infer(inputs, forward)
        column = "old_logprobs" if adapters else "reference_logprobs"
        return Batch(batch.offsets, {column: scatter_tokens(batch, inputs, [o[0] for o in outputs])})

    def _forward(
        self, inputs: ModelInput, temperature: float | None = None, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self.trainer.engine(inputs, temperature or self.config.rollout.temperature, with_entropy)

    # -- training -----------------------------------------------------------------------------------------------

    training_columns = (
        "tokens",
        "response_mask",
        "old_logprobs",
        "rollout_logprobs",
        "reference_logprobs",
        "advantages",
    )

    def training_forward(self) -> Any:
        return partial(self._forward, with_entropy=True)

    def loss_aggregation(self) -> tuple[str, float | None]:
        return self.config.ppo.loss_aggregation, self.config.ppo.loss_denominator

    def minibatch_loss(self, shard: Batch, weights: Tensor) -> MinibatchLoss:
        """The clipped surrogate (Schulman et al. 2017, eq. 7), corrected for the rollout engine's own probabilities."""
        ppo = self.config.ppo
        old = shard["old_logprobs"]
        if ppo.importance_sampling_cap is not None:
            correction = importance_weights(old, shard["rollout_logprobs"], ppo.importance_sampling_cap)
        else:
            correction = torch.ones_like(old)

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = outputs
            where, device = inputs.where.cpu(), logprobs.device
            w, old_logprobs = weights[where].to(device), old[where].to(device)
            surrogate = policy_loss(
                logprobs,
                old_logprobs,
                shard["advantages"][where].to(device),
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
                dual_clip=ppo.dual_clip,
            )
            objective = (w * correction[where].to(device) * surrogate.loss).sum()
            stats = {
                "policy_loss": objective,
                "clipfrac": surrogate.clipped.sum(),
                "ppo_kl": approximate_kl(logprobs, old_logprobs).sum(),
                "entropy": entropy.sum(),
            }
            total = objective
            if ppo.entropy_coef:
                total = total - ppo.entropy_coef * (w * entropy).sum()
            if ppo.kl_loss_coef:
                reference = shard["reference_logprobs"][where].to(device)
                stats["kl_loss"] = (w * kl_estimate(logprobs, reference, ppo.kl_loss_estimator)).sum()
                total = total + ppo.kl_loss_coef * stats["kl_loss"]
            return total, stats

        return loss

    # -- weights ------------------------------------------------------------------------------------------------

    def publish_weights(self, version: int, checksums: bool) -> Manifest | None:
        """Lay the current weights out for the rollout engines. All ranks call it; rank 0 returns the manifest."""
        rollout = self.config.rollout
        weights = named_weights(self.lm, zero_stage=self.config.policy.zero_stage)
        if self.world.rank != 0:
            for _ in weights:  # takes part in the gathering
                pass
            return None
        return publish(
            weights,
            transport=self.transport,
            version=version,
            bucket_bytes=int(rollout.weight_bucket_mib * 2**20),
            dtype=rollout.dtype or self.config.policy.dtype,
            with_checksums=checksums,
        )

    def release_weights(self, manifest: Manifest) -> None:
        """Free what `publish_weights` laid out, after every engine has read it."""
        if self.world.rank == 0:
            release(manifest, self.transport)

    def close(self) -> None:
        """Free what weights may still lie in the transport."""
        self.transport.close()

    def save_model(self, folder: str) -> None:
        """Write the model as a Hugging Face folder: adapters merged, or the adapter alone where so configured."""
        lora = self.config.policy.lora
        if lora is not None and lora.save == "adapter":
            self._save_adapter(folder)
            return
        weights = named_weights(self.lm, zero_stage=self.config.policy.zero_stage)
        if self.world.rank == 0:
            save_model_folder(self.lm, weights, Path(folder), DTYPES[self.config.policy.dtype])
        else:
            for _ in weights:
                pass

    def _save_adapter(self, folder: str) -> None:
        assert self.peft is not None
        with gathered_adapters(self.lm, zero_stage=self.config.policy.zero_stage):
            if self.world.rank == 0:
                self.peft.save_pretrained(folder)
