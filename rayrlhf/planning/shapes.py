"""The dimensions of a model and the parameters that follow from them, without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from rayrlhf.config.trainers import LoraConfig

__all__ = ["FAMILIES", "Shape", "UnknownFamilyError", "Weight", "numel"]

_HEADS = "num_attention_heads"
_EXPERTS, _GATE, _EMBEDDING = ".mlp.experts.", ".mlp.gate.weight", "embed_tokens."
"""Parts of names."""


@dataclass(frozen=True)
class _Family:
    """What the models of one architecture have in common, as transformers builds them."""

    tied: bool = False
    """Where config.json doesn't say so."""
    kv_heads: int | None = None
    """Where config.json doesn't say so; None: as many as heads."""
    head_dim: int | None = None
    """Where config.json doesn't say so; None: the hidden size over the heads."""
    qkv_bias: bool = False
    """Always; other families may have one by ``attention_bias``."""
    biases: bool = False
    """Whether ``attention_bias`` (on all four projections) and ``mlp_bias`` are read."""
    head_norms: bool = False
    """Normalisation of each query and key."""
    norms: int = 2
    """Of each layer."""
    experts: bool = False


FAMILIES = {
    "llama": _Family(biases=True),
    "mistral": _Family(kv_heads=8),
    "qwen2": _Family(kv_heads=32, qkv_bias=True),
    "qwen3": _Family(kv_heads=32, head_dim=128, biases=True, head_norms=True),
    "gemma": _Family(tied=True, kv_heads=16, head_dim=256, biases=True),
    "gemma2": _Family(tied=True, kv_heads=4, head_dim=256, biases=True, norms=4),
    "mixtral": _Family(kv_heads=8, experts=True),
}
"""By the ``model_type`` of config.json."""


class UnknownFamilyError(ValueError):
    """A model of an architecture whose parameters aren't known here."""


class Weight(NamedTuple):
    """One parameter tensor."""

    name: str
    shape: tuple[int, ...]
    linear: bool = False
    """Whether it is the weight of a linear layer (out, in)."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder-only transformer."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output layer shares the embedding's weight."""
    attention_bias: bool
    """On queries, keys and values; on the output projection too unless the family has it there never."""
    mlp_bias: bool
    experts: int
    """Of each layer; 0: there are none."""
    experts_per_token: int
    longest: int | None
    """Tokens that the model reads at most."""
    source: str
    """Where this is known from."""

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> Shape:
        """The dimensions in a config.json.

        Raises:
            UnknownFamilyError: naming the ``model_type``.
            KeyError: naming the key that is missing.
        """
        name = str(config.get("model_type"))
        family = FAMILIES.get(name)
        if family is None:
            raise UnknownFamilyError(name)
        heads = int(config[_HEADS])
        # Absent and null differ: where the key is absent, transformers has a number for it.
        kv_heads = config.get("num_key_value_heads", family.kv_heads) or heads
        head_dim = config.get("head_dim", family.head_dim) or int(config["hidden_size"]) // heads
        return cls(
            family=name,
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(kv_heads),
            head_dim=int(head_dim),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            attention_bias=family.qkv_bias or family.biases and bool(config.get("attention_bias", False)),
            mlp_bias=name == "llama" and bool(config.get("mlp_bias", False)),
            experts=int(config.get("num_local_experts", 8)) if family.experts else 0,
            experts_per_token=int(config.get("num_experts_per_tok", 2)) if family.experts else 0,
            longest=config.get("max_position_embeddings"),
            source=source,
        )

    # -- parameters -------------------------------------------------------------------------------------------------

    def layer_weights(self) -> list[Weight]:
        """The parameters of one layer, in transformers' names and shapes."""
        family = FAMILIES[self.family]
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = []
        for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            found.append(Weight(f"self_attn.{name}.weight", (out, self.hidden), True))
            if self.attention_bias:
                found.append(Weight(f"self_attn.{name}.bias", (out,)))
        found.append(Weight("self_attn.o_proj.weight", (self.hidden, queries), True))
        if self.attention_bias and family.biases:
            found.append(Weight("self_attn.o_proj.bias", (self.hidden,)))
        if family.head_norms:
            found += [Weight(f"self_attn.{name}.weight", (self.head_dim,)) for name in ("q_norm", "k_norm")]
        found += self._mlp_weights()
        return [*found, *(Weight(f"norm_{k}.weight", (self.hidden,)) for k in range(family.norms))]

    def _mlp_weights(self) -> list[Weight]:
        if self.experts:
            return [
                Weight("mlp.gate.weight", (self.experts, self.hidden)),
                Weight("mlp.experts.gate_up_proj", (self.experts, 2 * self.intermediate, self.hidden)),
                Weight("mlp.experts.down_proj", (self.experts, self.hidden, self.intermediate)),
            ]
        found = []
        for name, out, into in (
            ("gate_proj", self.intermediate, self.hidden),
            ("up_proj", self.intermediate, self.hidden),
            ("down_proj", self.hidden, self.intermediate),
        ):
            found.append(Weight(f"mlp.{name}.weight", (out, into), True))
            if self.mlp_bias:
                found.append(Weight(f"mlp.{name}.bias", (out,)))
        return found

    def weights(self, *, head: str = "vocabulary", layers: int | None = None) -> list[Weight]:
        """All parameters, each once.

        Args:
            head: ``vocabulary`` for a causal language model, ``scalar`` for a critic's head with its bias, ``score`` for a
                reward model's without.
            layers: keep only the first so many.
        """
        count = self.layers if layers is None else min(layers, self.layers)
        found = [Weight("embed_tokens.weight", (self.vocabulary, self.hidden))]
        for k in range(count):
            found += [weight._replace(name=f"layers.{k}.{weight.name}") for weight in self.layer_weights()]
        found.append(Weight("norm.weight", (self.hidden,)))
        if head == "vocabulary" and not self.tied:
            found.append(Weight("lm_head.weight", (self.vocabulary, self.hidden), True))
        if head != "vocabulary":
            found.append(Weight("head.weight", (1, self.hidden)))
        if head == "scalar":
            found.append(Weight("head.bias", (1,)))
        return found

    def parameters(self, *, head: str = "vocabulary", layers: int | None = None) -> int:
        """How many numbers `weights` hold."""
        return numel(self.weights(head=head, layers=layers))

    def adapters(self, lora: LoraConfig, *, head: str = "vocabulary", layers: int | None = None) -> list[Weight]:
        """The parameters of LoRA adapters: two of rank r for each module that is named.

        ``all-linear`` leaves out the output layer, as peft does. Experts, whose weights transformers keeps in one tensor, have
        adapters of their own then: one for each, of twice the rank where gate and up are one tensor.
        """
        found = []
        for weight in self._adaptable(head, layers):
            module, rank = weight.name.removesuffix(".weight"), lora.rank
            if not _adapted(weight, lora, head):
                continue
            if _EXPERTS in module:
                rank *= weight.shape[0] * (2 if module.endswith("gate_up_proj") else 1)
            out, into = weight.shape[-2:]
            found += [Weight(f"{module}.lora_A.weight", (rank, into)), Weight(f"{module}.lora_B.weight", (out, rank))]
        return found

    def misnamed(self, lora: LoraConfig, *, head: str = "vocabulary", layers: int | None = None) -> list[str]:
        """Names among ``target_modules`` that no module has which can have an adapter (`rayrlhf.models.adapters`)."""
        if lora.target_modules == "all-linear":
            return []
        names = [_full_name(weight, head) for weight in self._adaptable(head, layers) if _EXPERTS not in weight.name]
        return [target for target in lora.target_modules if not any(_fits(name, target) for name in names)]

    def adaptable(self, *, head: str = "vocabulary") -> list[str]:
        """The last parts of the names of modules that can have an adapter, each once."""
        names = [weight.name for weight in self._adaptable(head, 1) if _EXPERTS not in weight.name]
        return list(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in names))

    def _adaptable(self, head: str, layers: int | None) -> list[Weight]:
        """What can have an adapter: linear layers, experts and their gate, the embedding unless it is the output layer too."""
        tied = self.tied and head == "vocabulary"
        return [
            weight
            for weight in self.weights(head=head, layers=layers)
            if weight.linear
            or _EXPERTS in weight.name
            or weight.name.endswith(_GATE)
            or (weight.name.startswith(_EMBEDDING) and not tied)
        ]

    # -- engines ----------------------------------------------------------------------------------------------------

    def engine_sizes(self, most: int) -> list[int]:
        """The tensor-parallel sizes up to ``most`` that an engine can have.

        The heads are dealt out evenly, and so are the columns of the MLP; key-value heads are dealt out or, where there are
        fewer of them than GPUs, repeated.
        """
        return [
            size
            for size in range(1, most + 1)
            if self.heads % size == 0
            and (self.kv_heads % size == 0 or size % self.kv_heads == 0)
            and self.intermediate % size == 0
        ]

    def kv_bytes_per_token(self, itemsize: int, tensor_parallel: int = 1) -> int:
        """Bytes of keys and values of one token in one GPU of an engine: 2 * layers * kv heads * head dimension * itemsize.

        Key-value heads are dealt out over the GPUs, at least one for each.
        """
        heads = max(1, self.kv_heads // tensor_parallel)
        return 2 * self.layers * heads * self.head_dim * itemsize


def numel(weights: Iterable[Weight]) -> int:
    """Numbers in all of them."""
    return sum(weight.numel for weight in weights)


def _adapted(weight: Weight, lora: LoraConfig, head: str) -> bool:
    if lora.target_modules == "all-linear":
        return not weight.name.startswith((_EMBEDDING, "lm_head"))
    # Experts are parameters, and no modules: no name fits them.
    return _EXPERTS not in weight.name and any(_fits(_full_name(weight, head), t) for t in lora.target_modules)


def _full_name(weight: Weight, head: str) -> str:
    """A module's name in transformers: in a language model all but the output layer is within ``model``."""
    module = weight.name.removesuffix(".weight")
    return module if head != "vocabulary" or module == "lm_head" else f"model.{module}"


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
