"""A causal language model in training, whatever its loss: log-probabilities, weights for the rollout engines, its file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.trainer import TrainerRole, scatter_tokens
from rayrlhf.batch import Batch
from rayrlhf.config.base import RunConfig
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.config.trainers import PolicyConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.export import gathered_adapters, named_weights, save_model_folder
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.loading import DTYPES, add_lora, check_output_head, load_causal_lm
from rayrlhf.models.merging import Checked, merged_logprobs, probe_batch, write_checked
from rayrlhf.models.world import World
from rayrlhf.weights import Manifest, make_transport, publish, release

__all__ = ["LanguageModelTrainer", "load_trained_lm"]


def load_trained_lm(path: str, policy: PolicyConfig) -> Any:
    """The model as training begins with it, on the CPU.

    Trained weights are float32; DeepSpeed makes the bfloat16 copy where one is computed with.
    """
    lm = load_causal_lm(path, policy, dtype=torch.float32)
    check_output_head(lm)
    return lm


class LanguageModelTrainer(TrainerRole):
    """A language model under DeepSpeed ZeRO; a subclass says what it learns.

    Args:
        world: this process's place in the group.
        config: the whole run.
        policy: its section about this model.
        lm: from `load_trained_lm`; adapters are put in here.
        total_steps: optimizer steps of the whole run.
        rollout: how samples are drawn from the model, where any are; log-probabilities are at its temperature.
        transport: how weights travel to the rollout engines; None where there are none.
    """

    def __init__(
        self,
        world: World,
        config: RunConfig,
        policy: PolicyConfig,
        lm: Any,
        total_steps: int,
        *,
        rollout: RolloutConfig | None = None,
        transport: str | None = None,
    ):
        self.peft = add_lora(lm, policy.lora, config.seed) if policy.lora is not None else None
        if policy.zero_stage == 3 and any(True for _ in lm.get_output_embeddings().children()):
            # Its parts would be gathered for each chunk of logits, and ranks have different numbers of them.
            raise InputRefused("policy.lora.target_modules: with zero_stage 3 the output layer can't have an adapter")
        self.lm, self.rollout = lm, rollout
        self.temperature = 1.0 if rollout is None else rollout.temperature
        self.transport = None if transport is None else make_transport(transport)
        super().__init__(world, config, policy, PolicyModel(lm, policy.logits_chunk_tokens), total_steps)

    # -- log-probabilities --------------------------------------------------------------------------------------

    def token_logprobs(self, batch: Batch, adapters: bool = True, temperature: float | None = None) -> Batch:
        """Log-probabilities of the response tokens, at the rollout temperature (without rollouts 1) unless another is given.

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
        return self.trainer.engine(inputs, temperature or self.temperature, with_entropy)

    # -- weights ------------------------------------------------------------------------------------------------

    def publish_weights(self, version: int, checksums: bool) -> Manifest | None:
        """Lay the current weights out for the rollout engines. All ranks call it; rank 0 returns the manifest."""
        assert self.rollout is not None and self.transport is not None, "this run has no rollout engines"
        weights = named_weights(self.lm, zero_stage=self.trained.zero_stage)
        if self.world.rank != 0:
            for _ in weights:  # takes part in the gathering
                pass
            return None
        return publish(
            weights,
            transport=self.transport,
            version=version,
            bucket_bytes=int(self.rollout.weight_bucket_mib * 2**20),
            dtype=self.rollout.dtype or self.trained.dtype,
            with_checksums=checksums,
        )

    def release_weights(self, manifest: Manifest) -> None:
        """Free what `publish_weights` laid out, after every engine has read it."""
        assert self.transport is not None, "this run has no rollout engines"
        if self.world.rank == 0:
            release(manifest, self.transport)

    def close(self) -> None:
        """Free what weights may still lie in the transport."""
        if self.transport is not None:
            self.transport.close()

    def save_model(self, folder: str) -> None:
        """Write the model as a Hugging Face folder: adapters merged, or the adapter alone where so configured.

        All ranks call it.

        Raises:
            RunFailed: where the merged model's log-probabilities aren't those of the model with its adapters.
        """
        lora, dtype = self.trained.lora, DTYPES[self.trained.dtype]
        if lora is not None and lora.save == "adapter":
            self._save_adapter(folder)
            return
        expected = None if lora is None else self._probed()
        weights = named_weights(self.lm, zero_stage=self.trained.zero_stage)
        if self.world.rank != 0:
            for _ in weights:
                pass
        elif expected is None:
            save_model_folder(self.lm, weights, Path(folder), dtype)
        else:
            checked = Checked(
                "log-probabilities", expected, lambda where: merged_logprobs(type(self.lm), where, dtype), dtype
            )
            write_checked(Path(folder), lambda where: save_model_folder(self.lm, weights, where, dtype), checked)

    def _probed(self) -> Tensor:
        """Log-probabilities of the probes, adapters on."""
        probes = probe_batch(self.lm.config.get_text_config().vocab_size)
        return self.token_logprobs(probes, temperature=1.0)["old_logprobs"][probes["response_mask"]]

    def _save_adapter(self, folder: str) -> None:
        assert self.peft is not None
        with gathered_adapters(self.lm, zero_stage=self.trained.zero_stage):
            if self.world.rank == 0:
                self.peft.save_pretrained(folder)
