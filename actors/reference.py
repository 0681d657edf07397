"""The frozen reference."""

from __future__ import annotations

import torch

from rayrlhf.actors.trainer import scatter_tokens
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.models.distributed import device_of
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.layout import neighbours_together
from rayrlhf.models.loading import DTYPES, check_output_head, load_causal_lm, prompt_sharing
from rayrlhf.models.packing import packs
from rayrlhf.models.world import World

__all__ = ["ReferenceModel"]


class ReferenceModel:
    """A causal language model that nothing trains; each rank holds all of it and takes its share of the samples.

    Args:
        world: this process's place in the group.
        config: the whole run; ``config.reference`` is given.
        model_path: folder or hub name.
    """

    def __init__(self, world: World, config: Config | PreferenceConfig, model_path: str):
        reference = config.reference
        assert reference is not None
        self.config, self.device = reference, device_of(world)
        self.temperature = config.rollout.temperature
        if world.threads is not None:
            torch.set_num_threads(world.threads)
        lm = load_causal_lm(model_path, reference, dtype=DTYPES[reference.dtype])
        check_output_head(lm)
        self.sharing = prompt_sharing(lm.base_model, reference) if isinstance(config, PreferenceConfig) else None
        self.model = PolicyModel(lm, reference.logits_chunk_tokens).to(self.device).eval()

    @torch.no_grad()
    def token_logprobs(self, batch: Batch, temperature: float | None = None) -> Batch:
        """Column ``reference_logprobs``: log-probabilities of the response tokens.

        Args:
            temperature: the logits are divided by it; None: the rollout temperature.
        """
        budget, packing = self.config.tokens_per_micro_batch, packs(self.config)
        inputs = neighbours_together(batch, budget, packing=packing, sharing=self.sharing)
        outputs = [self.model(i.to(self.device), temperature or self.temperature)[0].cpu() for i in inputs]
        return Batch(batch.offsets, {"reference_logprobs": scatter_tokens(batch, inputs, outputs)})
