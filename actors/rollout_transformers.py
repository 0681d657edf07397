"""Generation with plain transformers: slow, and without vLLM.

Each sample is drawn with random numbers of its own, so that it doesn't depend on which others share its batch, but for
the rounding of the forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rayrlhf.actors.rollout_adapter import adapted_name, scale_of
from rayrlhf.actors.rollout_common import Finished, ModelFacts, Part, Request, unpartitioned
from rayrlhf.actors.rollout_intake import Intake
from rayrlhf.actors.rollout_parts import Comparison, WholeParts
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.config.trainers import LoraConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.distributed import device_of
from rayrlhf.models.world import World
from rayrlhf.weights import Address, Manifest, Receiver, open_receiver
from rayrlhf.weights.bucket import torch_dtype
from rayrlhf.weights.checksums import listed

__all__ = ["TransformersEngine", "draw", "processed_logprobs"]


def processed_logprobs(logits: Tensor, temperature: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities of the distribution that is sampled from.

    Args:
        logits: [B, V] of any floating type; computed in float32.
        temperature: float32 [B]; 0 counts as 1.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020).

    Returns:
        float32 [B, V]; -inf for the tokens that are left out.
    """
    logits = logits.float() / torch.where(temperature > 0, temperature, torch.ones_like(temperature))[:, None]
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        keep = before < top_p  # the likeliest token has nothing before it
        logits = logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)
    return logits.log_softmax(-1)


def draw(logprobs: Tensor, uniforms: Tensor, greedy: Tensor) -> Tensor:
    """One token a row, by inverting the cumulative distribution in float64.

    Args:
        logprobs: float32 [B, V].
        uniforms: float64 [B], in [0, 1).
        greedy: bool [B]; such a row takes its likeliest token.

    Returns:
        int64 [B].
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    # Just below 1, so that rounding can't lead behind the last token that has any probability.
    target = uniforms.clamp(max=1 - 1e-12)[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return torch.where(greedy, logprobs.argmax(-1), sampled)


@dataclass
class _Row:
    """A sample that is being generated."""

    request: Request
    uniforms: Tensor
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """See `rayrlhf.actors.rollout_common.Engine`."""

    def __init__(
        self,
        world: World,
        *,
        model_path: str,
        tokenizer_path: str,
        config: SamplerConfig,
        dtype: Literal["float32", "bfloat16"],
        max_model_tokens: int,
        facts: ModelFacts,
        trust_remote_code: bool,
        lora: LoraConfig | None,
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if config.tensor_parallel > 1:
            raise InputRefused(
                f"rollout.tensor_parallel is {config.tensor_parallel}; rollout.engine=transformers runs in one process: take "
                "rollout.engine=vllm, or rollout.tensor_parallel=1"
            )
        with unpartitioned(), _without_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=torch_dtype(dtype),
                trust_remote_code=trust_remote_code,
                attn_implementation=_attention(facts.config),
            )
        self._device = device_of(world)
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]
        self._model.requires_grad_(False)
        self._rank = world.rank
        self._receiver: Receiver | None = None
        self._base: dict[str, Tensor] = {}
        self._config = config
        self._facts = facts
        self._eos = frozenset(facts.eos_ids)
        self._tokenizer: Any = None
        if config.stop:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
        # A token stands for one byte at least, so that a stop string lies within so many tokens of the end.
        self._stop_tokens = max((len(stop.encode()) for stop in config.stop), default=0) + 4

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(self, intake: Intake) -> Iterator[Finished]:
        size = self._config.max_num_seqs
        while requests := intake.take(0):
            for start in range(0, len(requests), size):
                yield from self._generate_batch(requests[start : start + size])

    def _generate_batch(self, requests: Sequence[Request]) -> Iterator[Finished]:
        from transformers import DynamicCache

        rows = [_Row(request, _uniforms(request)) for request in requests]
        longest = max(len(request.prompt) for request in requests)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, request in enumerate(requests):
            ids[index, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[index, longest - len(request.prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        cache = DynamicCache(config=self._model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while rows:
            tokens = self._step(rows, ids, mask, positions, cache)
            alive = []
            for index, row in enumerate(rows):
                reason = self._end(row)
                if reason is None:
                    alive.append(index)
                else:
                    yield Finished(row.request.index, row.tokens, row.logprobs, reason)
            ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            positions = positions[:, -1:] + 1
            if len(alive) < len(rows):
                kept = torch.tensor(alive, dtype=torch.int64, device=self._device)
                rows = [rows[index] for index in alive]
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
                if rows:
                    cache.batch_select_indices(kept)

    @torch.no_grad()
    def _step(self, rows: list[_Row], ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Run the model over ``ids`` [B, N] and append one token to each row; the tokens, int64 [B]."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        temperature = torch.tensor([row.request.temperature for row in rows], device=self._device)
        logprobs = processed_logprobs(output.logits[:, -1], temperature, self._config.top_k, self._config.top_p)
        uniforms = torch.stack([row.uniforms[len(row.tokens)] for row in rows]).to(self._device)
        tokens = draw(logprobs, uniforms, temperature == 0)
        chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
        return tokens

    def _end(self, row: _Row) -> Literal["stop", "length"] | None:
        """Why the row is complete, None where it isn't."""
        if row.tokens[-1] in self._eos:
            return "stop"
        if self._tokenizer is not None:
            text = self._tokenizer.decode(row.tokens[-self._stop_tokens :], skip_special_tokens=False)
            if any(stop in text for stop in self._config.stop):
                return "stop"
        return "length" if len(row.tokens) >= row.request.max_tokens else None

    # -- weights ------------------------------------------------------------------------------------------------

    def connect(self, address: Address) -> None:
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = open_receiver(address, self._rank, self._device)
        self._receiver.connect()

    @torch.no_grad()
    def load(self, manifest: Manifest, verify: bool) -> None:
        if self._receiver is None:
            raise RunFailed("the rollout engine has not been connected to the policy: connect_weights comes first")
        named = self._receiver.receive(manifest)
        if manifest.kind == "adapter":
            self._apply_adapter(manifest, named)
            return
        comparison = Comparison(WholeParts(self._model, self._facts), self._facts)
        own = dict(self._model.named_parameters(remove_duplicate=False))
        self._base = {}
        named = comparison.watch(manifest, named) if verify else named
        if self._facts.shapes.keys() <= own.keys():
            left = self._copy(own, named)
        else:
            left = self._rebuild(named)
            comparison.parts = WholeParts(self._model, self._facts)
        if left:
            raise RunFailed(
                f"the transfer of version {manifest.version} left parameters of the model as they were: {listed(left)}"
            )
        if verify:
            comparison.check(manifest.version, "the rollout engine")

    def _copy(self, parameters: dict[str, Any], named_tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Copy tensors into the parameters; the names of those that none came for."""
        left = {id(parameter): name for name, parameter in reversed(parameters.items())}
        for name, tensor in named_tensors:
            parameters[name].copy_(tensor)
            left.pop(id(parameters[name]), None)
        return list(left.values())

    def _rebuild(self, named_tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
        """The same for a model whose parameters aren't a checkpoint's tensors: a new one is made of them."""
        state = {name: tensor.to("cpu", copy=True) for name, tensor in named_tensors}
        with unpartitioned(), _without_progress_bar():
            model, found = type(self._model).from_pretrained(
                None,
                config=self._model.config,
                state_dict=state,
                dtype=self._model.dtype,
                attn_implementation=_attention(self._model.config),
                output_loading_info=True,
            )
        self._model = model.to(self._device).eval().requires_grad_(False)
        return sorted(found["missing_keys"])

    def _apply_adapter(self, manifest: Manifest, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        """W + scale * B A in place of W (Hu et al. 2021, eq. 3), computed in float32."""
        assert manifest.adapter is not None
        scale = scale_of(manifest.adapter)
        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in named_tensors:
            weight, factor = adapted_name(name)
            factors.setdefault(weight, {})[factor] = tensor.to(self._device, torch.float32, copy=True)
        parameters = dict(self._model.named_parameters())
        for name in self._base.keys() - factors.keys():
            parameters[name].copy_(self._base[name])
        for name, pair in factors.items():
            base = self._base.setdefault(name, parameters[name].to("cpu", copy=True))
            change = scale * (pair["B"] @ pair["A"])
            parameters[name].copy_(base.to(self._device) + change.to(parameters[name].dtype))

    def checksums(self, manifest: Manifest) -> dict[str, int]:
        return WholeParts(self._model, self._facts).checksums(manifest.entries())

    def reset_prefix_cache(self) -> None:
        """Nothing is kept from one call to the next."""

    # -- memory -------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        if self._device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self, part: Part) -> None:
        """The weights come back with whatever part is woken first; there is nothing else."""
        if self._device.type == "cuda":
            self._model.to(self._device)

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        self.__dict__.pop("_model", None)


def _attention(config: Any) -> str | None:
    """torch's attention, which is transformers' choice (None), leaves out a soft cap of attention logits (Gemma 2)."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None else None


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _uniforms(request: Request) -> Tensor:
    """The sample's random numbers, float64 [max_tokens]: a function of its seed alone."""
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(request.max_tokens, generator=generator, dtype=torch.float64)
