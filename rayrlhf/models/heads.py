"""The three models that roles run: token log-probabilities, values, scores, each over a Hugging Face backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.errors import InputRefused
from rayrlhf.models.cpu import longest_unpadded, run_unpadded
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.logprobs import token_logprobs_and_entropy
from rayrlhf.models.sequence import SequenceSharing
from rayrlhf.models.varlen import VARLEN

__all__ = [
    "HEADS",
    "PolicyModel",
    "ScalarModel",
    "check_one_label",
    "hidden_states",
    "linear_head",
    "output_logits",
]

HEADS = ("score", "classifier")
"""What the linear heads of sequence-classification models are called."""


def output_logits(lm: Any, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H], as the model's own forward makes them.

    Some families scale or cap their logits; the three ways that are known are named in the model's configuration.
    `rayrlhf.models.loading.check_output_head` refuses a model for which this isn't the whole story.
    """
    # `forward`, not a call: DeepSpeed's hooks would gather the weight under ZeRO-3 for each chunk, and ranks with different
    # numbers of chunks would wait for each other for ever. `TrainEngine` sees to it that the weight is there.
    logits = lm.get_output_embeddings().forward(hidden)
    config = lm.config.get_text_config()
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits


def hidden_states(backbone: Any, inputs: ModelInput, places: Tensor) -> Tensor:
    """Last hidden states [N, H] at ``places``, int64 [N], positions in the flat rows of the input."""
    grid = inputs.grid
    if grid is not None and inputs.input_ids.device.type == "cpu" and grid.width <= longest_unpadded(backbone):
        return run_unpadded(backbone, grid).index_select(0, grid.token_at[places])
    how: dict[str, Any] = {} if inputs.position_ids is None else {"position_ids": inputs.position_ids}
    how |= _sample_bounds(backbone, inputs)
    mask = inputs.attention_mask
    if mask is not None and backbone.config._attn_implementation == "eager":
        # It is added to the products there; the others take truth values.
        lowest = torch.finfo(backbone.dtype).min
        mask = torch.zeros(mask.shape, dtype=backbone.dtype, device=mask.device).masked_fill(~mask, lowest)
    if mask is not None:
        how["attention_mask"] = mask
    output = backbone(input_ids=inputs.input_ids, use_cache=False, **how)
    return output.last_hidden_state.flatten(0, 1).index_select(0, places)


def _sample_bounds(backbone: Any, inputs: ModelInput) -> dict[str, Any]:
    """Where the samples lie in the rows, under the names by which transformers hands it to attention of variable lengths.

    Such attention would find it out from the positions too, but in each layer, and a GPU would be waited for each time.
    """
    name = backbone.config._attn_implementation
    if inputs.bounds is not None and name in (VARLEN, "flash_attention_2"):
        bounds, longest = inputs.bounds, inputs.longest
    elif inputs.attention_mask is None and name == VARLEN:
        rows, longest = inputs.input_ids.shape
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=inputs.input_ids.device) * longest
    else:
        return {}
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


class PolicyModel(nn.Module):
    """A causal language model (with or without adapters) as a function from tokens to their log-probabilities."""

    sharing: SequenceSharing | None = None
    """The ranks that share rows; None: each has rows of its own."""

    def __init__(self, lm: nn.Module, chunk_tokens: int):
        super().__init__()
        self.lm: Any = lm
        self.chunk_tokens = chunk_tokens

    @property
    def transformer(self) -> Any:
        """The model without its output layer."""
        return self.lm.base_model

    def forward(self, inputs: ModelInput, temperature: float, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, float32 [N] each, of ``inputs.targets``."""
        targets = inputs.targets
        if self.sharing is None:
            hidden = hidden_states(self.transformer, inputs, inputs.predict)
        else:
            hidden, which = self.sharing.states_at(self.transformer, inputs, inputs.predict)
            targets = targets[which]
        logprobs, entropies = token_logprobs_and_entropy(
            lambda states: output_logits(self.lm, states),
            hidden,
            targets,
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
            with_entropy=with_entropy,
        )
        if self.sharing is None:
            return logprobs, entropies
        count = len(inputs.targets)
        together = self.sharing.put_together(logprobs, which, count)
        return together, self.sharing.put_together(entropies, which, count) if with_entropy else together.new_zeros(
            count
        )


class ScalarModel(nn.Module):
    """A backbone with a linear head that reads one number from a hidden state: the critic, or a reward model."""

    sharing: SequenceSharing | None = None
    """The ranks that share rows; None: each has rows of its own."""

    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.backbone: Any = backbone
        self.head = head

    @property
    def transformer(self) -> Any:
        """The model without its head."""
        return self.backbone

    def read(self, hidden: Tensor) -> Tensor:
        """[N, H] -> float32 [N]. The product is in float32: rounded values would blur small differences."""
        bias = None if self.head.bias is None else self.head.bias.float()
        return nn.functional.linear(hidden.float(), self.head.weight.float(), bias)[:, 0]

    def forward(self, inputs: ModelInput) -> tuple[Tensor, Tensor]:
        """Values before each of ``inputs.targets`` [N], and after the last token of each sample [S]."""
        places = torch.cat([inputs.predict, inputs.last])
        if self.sharing is None:
            both = self.read(hidden_states(self.backbone, inputs, places))
        else:
            hidden, which = self.sharing.states_at(self.backbone, inputs, places)
            both = self.sharing.put_together(self.read(hidden), which, len(places))
        return both[: len(inputs.predict)], both[len(inputs.predict) :]


def check_one_label(path: str, config: Any) -> None:
    if getattr(config, "num_labels", 1) != 1:
        raise InputRefused(f"reward model {path!r} has {config.num_labels} labels; a reward model has exactly 1")


def linear_head(path: str, classifier: Any) -> nn.Linear:
    """What a sequence-classification model reads its score with."""
    head = next((getattr(classifier, n) for n in HEADS if hasattr(classifier, n)), None)
    if not isinstance(head, nn.Linear):
        raise InputRefused(
            f"reward model {path!r} ({type(classifier).__name__}) has no linear head named score or classifier"
        )
    return head
