"""The frozen reference."""

from __future__ import annotations

from rayrlhf.actors.trainer import scatter_tokens
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.config.base import RunConfig
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.models.frozen import FrozenModel
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.layout import neighbours_together
from rayrlhf.models.loading import DTYPES, check_output_head, load_causal_lm, prompt_sharing
from rayrlhf.models.packing import packs
from rayrlhf.models.residence import Level
from rayrlhf.models.skeleton import bare_causal_lm
from rayrlhf.models.world import World
from rayrlhf.models.zero import Partitioner

__all__ = ["ReferenceModel"]


class ReferenceModel:
    """A causal language model that nothing trains; each rank takes its share of the samples, and holds all of the model, or with
    ``zero_stage`` 3 its share.

    Args:
        world: this process's place in the group.
        config: the whole run; ``config.reference`` is given.
        model_path: folder or hub name.
    """

    def __init__(self, world: World, config: Config | PreferenceConfig, model_path: str):
        reference = config.reference
        assert reference is not None
        self.config, self.temperature = reference, config.rollout.temperature
        self.sharing = None

        def read(zero: Partitioner | None) -> PolicyModel:
            lm = load_causal_lm(model_path, reference, dtype=DTYPES[reference.dtype], zero=zero)
            check_output_head(lm)
            if isinstance(config, PreferenceConfig):
                self.sharing = prompt_sharing(lm.base_model, reference)
            return PolicyModel(lm, reference.logits_chunk_tokens)

        self.frozen = FrozenModel(
            "reference",
            world,
            read,
            zero_stage=reference.zero_stage,
            offload=reference.offload_parameters,
            dtype=reference.dtype,
        )

    @classmethod
    def check(cls, config: Config | PreferenceConfig, model_path: str) -> None:
        """Raise what the constructor would raise of the configuration; no weight is read.

        Raises:
            InputRefused: see `rayrlhf.models.skeleton`.
        """
        assert config.reference is not None
        # A comparison of models names no reference of a run: how all its models are run stands in its section measure.
        key = "reference" if isinstance(config, RunConfig) else "measure"
        bare_causal_lm(model_path, config.reference, key)

    def token_logprobs(self, batch: Batch, temperature: float | None = None) -> Batch:
        """Column ``reference_logprobs``: log-probabilities of the response tokens.

        Args:
            temperature: the logits are divided by it; None: the rollout temperature.
        """
        budget, packing = self.config.tokens_per_micro_batch, packs(self.config)
        inputs = neighbours_together(batch, budget, packing=packing, sharing=self.sharing)
        outputs = self.frozen.infer(inputs, temperature or self.temperature)
        return Batch(batch.offsets, {"reference_logprobs": scatter_tokens(batch, inputs, [o[0] for o in outputs])})

    def set_residence(self, level: Level) -> None:
        """Whether the parameters are on the device ("weights", "all") or in host memory ("none"). All ranks are called."""
        self.frozen.set_residence(level)
