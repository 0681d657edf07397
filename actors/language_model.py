"""A causal language model in training, whatever its loss: log-probabilities, weights for the rollout engines, its file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.trainer import TrainerRole, scatter_tokens
from rayrlhf.batch import Batch
from rayrlhf.checkpoint import sizes_on_disk
from rayrlhf.config.base import RunConfig
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.config.trainers import PolicyConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.adapters import add_lora
from rayrlhf.models.engine import partitioner_for
from rayrlhf.models.export import (
    adapter_layout,
    gathered_adapters,
    named_adapters,
    named_weights,
    save_model_folder,
    weight_layout,
)
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.loading import DTYPES, check_output_head, load_causal_lm
from rayrlhf.models.merging import Checked, merged_logprobs, probe_batch, write_checked
from rayrlhf.models.skeleton import bare_causal_lm, check_training
from rayrlhf.models.world import World
from rayrlhf.weights import Address, Bucket, Manifest, Sender, join_sender, open_sender, plan_buckets

__all__ = ["LanguageModelTrainer", "load_trained_lm"]


def load_trained_lm(path: str, config: RunConfig, policy: PolicyConfig, world: World) -> Any:
    """The model as training begins with it, on the CPU; under ZeRO-3 this rank's share of it.

    Trained weights are float32; DeepSpeed makes the bfloat16 copy where one is computed with.
    """
    zero = partitioner_for(policy, world, LanguageModelTrainer.role, config.cluster.call_timeout_s)
    lm = load_causal_lm(path, policy, dtype=torch.float32 if zero is None else zero.dtype, zero=zero)
    check_output_head(lm)
    return lm


def adapted(lm: Any, policy: PolicyConfig, seed: int) -> Any:
    """The peft model around a language model with the configured adapters; None where there are none.

    Raises:
        InputRefused: where the model can't have them.
    """
    peft = add_lora(lm, policy.lora, seed) if policy.lora is not None else None
    if policy.zero_stage == 3 and any(True for _ in lm.get_output_embeddings().children()):
        # Its parts would be gathered for each chunk of logits, and ranks have different numbers of them.
        raise InputRefused("policy.lora.target_modules: with zero_stage 3 the output layer can't have an adapter")
    return peft


class LanguageModelTrainer(TrainerRole):
    """A language model under DeepSpeed ZeRO; a subclass says what it learns.

    Args:
        world: this process's place in the group.
        config: the whole run.
        policy: its section about this model.
        lm: from `load_trained_lm`; adapters are put in here.
        total_steps: optimizer steps of the whole run.
        rollout: how samples are drawn from the model, where any are; log-probabilities are at its temperature.
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
    ):
        self.peft = adapted(lm, policy, config.seed)
        self.lm, self.rollout = lm, rollout
        self.temperature = 1.0 if rollout is None else rollout.temperature
        self.sender: Sender | None = None
        self._buckets: dict[bool, tuple[Bucket, ...]] = {}
        self._transfers, self._base_sent = 0, False
        super().__init__(world, config, policy, PolicyModel(lm, policy.logits_chunk_tokens), total_steps)

    @classmethod
    def check(cls, config: Any, model_path: str, total_steps: int) -> None:
        """Raise what a subclass's constructor, called with the same, would raise of the configuration; no weight is read.

        Raises:
            InputRefused: see `rayrlhf.models.skeleton`.
        """
        lm = bare_causal_lm(model_path, config.policy, cls.role)
        check_training(lm, config.policy, cls.role)
        adapted(lm, config.policy, config.seed)

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

    def open_weights(
        self, transport: str, receivers: int, group_version: int, per_engine: int = 1, keep_all: bool = False
    ) -> Address | None:
        """Open the way of the weights to the rollout engines; an earlier one is closed. All ranks call it.

        Args:
            transport: how they travel: one of `rayrlhf.weights.TRANSPORTS`.
            receivers: processes that load weights.
            group_version: 1 or more, larger than before.
            per_engine: receivers of each engine.
            keep_all: what is published lies there until `release_weights`; nobody takes it in the meantime.

        Returns:
            Where receivers find the weights, on rank 0; None on others.
        """
        assert self.rollout is not None, "this run has no rollout engines"
        self._close_weights()
        self._base_sent = False
        if self.world.rank != 0:
            return None
        self.sender = open_sender(
            transport,
            run=Path(self.config.run_dir).name,
            receivers=receivers,
            version=group_version,
            device=self.trainer.device,
            timeout_s=self.rollout.weight_timeout_s,
            host=self.world.master_addr,
            per_engine=per_engine,
            senders=self.world.size,
            keep_all=keep_all,
        )
        return self.sender.address

    def connect_weights(self, address: Address) -> None:
        """Meet the receivers, at the same time as they do; all ranks call it.

        Args:
            address: what `open_weights` returned on rank 0.
        """
        if self.sender is None and address.transport == "ipc":
            self.sender = join_sender(address, self.world.rank, self.trainer.device)
        if self.sender is not None:
            self.sender.connect()

    def weight_manifest(self, version: int, checksums: bool) -> Manifest:
        """What the next `publish_weights` sends: names, shapes and places; nothing is gathered. All ranks call it.

        With ``rollout.lora_transfer: adapter`` that is the adapter. The engines need its base first, once in a group: the
        manifest is then one of kind ``weights`` with an ``adapter``, and that of the adapter comes when it has been published.

        Args:
            version: of the weights.
            checksums: send a CRC-32 of each tensor along.
        """
        assert self.rollout is not None, "this run has no rollout engines"
        adapter = self._sends_adapter and self._base_sent
        if adapter not in self._buckets:
            self._buckets[adapter] = plan_buckets(
                adapter_layout(self.lm) if adapter else weight_layout(self.lm),
                bucket_bytes=int(self.rollout.weight_bucket_mib * 2**20),
                dtype=self._travel_dtype,
            )
        self._transfers += 1
        return Manifest(
            version=version,
            dtype=self._travel_dtype,
            buckets=self._buckets[adapter],
            checksums=checksums,
            kind="adapter" if adapter else "weights",
            adapter=self._adapter_config() if self._sends_adapter else None,
            serial=self._transfers,
            address=None if self.sender is None else self.sender.address,
        )

    @property
    def _travel_dtype(self) -> str:
        return self.trained.dtype if self.rollout is None or self.rollout.dtype is None else self.rollout.dtype

    @property
    def _sends_adapter(self) -> bool:
        return self.peft is not None and self.rollout is not None and self.rollout.lora_transfer == "adapter"

    def _adapter_config(self) -> dict[str, Any]:
        assert self.peft is not None
        found = self.peft.peft_config[self.peft.active_adapter].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}
        return {key: getattr(value, "value", value) for key, value in plain.items()}

    def publish_weights(self, manifest: Manifest) -> None:
        """Send the current weights while the engines receive them; all ranks call it with rank 0's manifest.

        Raises:
            RunFailed: where a receiver doesn't take a bucket before its deadline, or has failed; or where the weights aren't
                on the device (`set_residence`).
        """
        self.trainer.residence.require("weights", "publishing weights")
        stage = self.trained.zero_stage
        if manifest.kind == "adapter":
            weights = named_adapters(self.lm, zero_stage=stage)
        else:
            weights = named_weights(self.lm, zero_stage=stage, merged=not self._sends_adapter)
        try:
            if self.sender is not None:
                self.sender.send(manifest, weights)
        finally:
            for _ in weights:  # the other ranks gather them together with this one, whether it sends them or not
                pass
        self._base_sent = True

    def release_weights(self) -> None:
        """Free what `publish_weights` laid out and receivers have taken: all of it where ``keep_all`` was asked for, and with
        ``ipc`` what they held until their loads had ended."""
        if self.sender is not None:
            self.sender.release()

    def _close_weights(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None

    def close(self) -> None:
        """Free what weights may still be under way."""
        self._close_weights()

    def save_model(self, folder: str) -> dict[str, int]:
        """Write the model as a Hugging Face folder: adapters merged, or the adapter alone where so configured.

        All ranks call it.

        Returns:
            Of rank 0, which writes: bytes by the file's name. Of others nothing.

        Raises:
            RunFailed: where the merged model's log-probabilities aren't those of the model with its adapters; or where the
                weights aren't on the device (`set_residence`).
        """
        self.trainer.residence.require("weights", "saving the model")
        self._write_model(folder)
        return sizes_on_disk(Path(folder)) if self.world.rank == 0 else {}

    def _write_model(self, folder: str) -> None:
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
