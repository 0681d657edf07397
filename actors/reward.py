"""Rewards: Python functions, sequence-classification models, and their weighted sum."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.config import Config, source_name
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.distributed import device_of
from rayrlhf.models.layout import micro_batches
from rayrlhf.models.loading import DTYPES, load_reward_model
from rayrlhf.models.packing import packs
from rayrlhf.models.tokenizer import load_tokenizer
from rayrlhf.models.world import World

__all__ = ["RewardFunction", "RewardModel", "RewardScorer", "check_signature", "import_function"]


class Source(Protocol):
    """Something that scores the samples of a batch."""

    def score(self, batch: Batch) -> Tensor:
        """float32 [S], one number a sample."""


def import_function(path: str) -> Callable[..., Any]:
    """The function at ``package.module:name``.

    Raises:
        InputRefused: where the module can't be imported, or has no such function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputRefused(
            f"reward function {path!r}: importing {module_name} fails: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        near = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise InputRefused(
            f"reward function {path!r}: {module_name} has no function {name!r}; it has: {near or 'none'}"
        )
    return function


def response_tokens(batch: Batch) -> list[Tensor]:
    """The tokens of each response, those masked out of training included."""
    tokens, prompts = batch["tokens"], batch["prompt_length"].tolist()
    return [tokens[start + prompt : end] for (start, end), prompt in zip(batch.spans(), prompts, strict=True)]


def check_signature(path: str, columns: Collection[str]) -> None:
    """Whether the data has every column that a reward function can't do without.

    Raises:
        InputRefused: naming the columns that are missing, and those that are there.
    """
    wanted = [
        p.name
        for p in inspect.signature(import_function(path)).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in wanted if name not in ("prompts", "responses") and name not in columns]
    if missing:
        raise InputRefused(
            f"reward function {path!r} wants {', '.join(missing)}, which the data has no column for; "
            f"its columns are: {', '.join(sorted(columns)) or 'none besides the prompt'}"
        )


class RewardFunction:
    """A Python function of prompts and responses.

    Args:
        path: ``package.module:function``; called with the keywords ``prompts`` and ``responses`` (lists of strings)
            and with those further columns of the data that its signature names.
        name: its name in metrics and messages.
        tokenizer: decodes the responses, without special tokens.
    """

    def __init__(self, path: str, name: str, tokenizer: Any):
        self.function, self.name, self.path, self.tokenizer = import_function(path), name, path, tokenizer
        parameters = inspect.signature(self.function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}

    def score(self, batch: Batch) -> Tensor:
        """Call the function once with all samples.

        Raises:
            RunFailed: where it raises, or doesn't return one finite number for each response.
        """
        responses = self.tokenizer.batch_decode([t.tolist() for t in response_tokens(batch)], skip_special_tokens=True)
        rows = batch["row"] if "row" in batch else [{} for _ in responses]
        names = {name for row in rows for name in row} - {"prompts", "responses"}
        further = {n: [row.get(n) for row in rows] for n in names if self.takes_all or n in self.takes}
        try:
            returned = self.function(prompts=list(batch["prompt_text"]), responses=responses, **further)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RunFailed(
                f"reward function {self.path} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
            ) from error
        return self._checked(returned, responses)

    def _checked(self, returned: Any, responses: list[str]) -> Tensor:
        try:
            numbers = [float(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise RunFailed(
                f"reward function {self.path} must return one number for each response, "
                f"not {type(returned).__name__}: {error}"
            ) from error
        if len(numbers) != len(responses):
            raise RunFailed(
                f"reward function {self.path} returned {len(numbers)} numbers for {len(responses)} responses"
            )
        scores = torch.tensor(numbers, dtype=torch.float32)
        for number, finite, response in zip(numbers, torch.isfinite(scores).tolist(), responses, strict=True):
            if not finite:
                raise RunFailed(f"reward function {self.path} returned {number} for the response {response[:200]!r}")
        return scores


class RewardModel:
    """A sequence-classification model, read at the last real token of prompt and response.

    Where its tokenizer is the policy's, it reads the very tokens of the sample. Where it is another one, prompt and
    response are decoded and tokenized again for it, with its own chat template if it has one.

    Args:
        path: folder or hub name.
        name: its name in metrics and messages.
        config: the whole run.
        tokenizer: the policy's.
        world: this process's place in the group.
    """

    def __init__(self, path: str, name: str, config: Config, tokenizer: Any, world: World):
        reward = config.reward
        self.name, self.path, self.device = name, path, device_of(world)
        self.settings = ModelConfig(
            dtype=reward.dtype,
            tokens_per_micro_batch=reward.tokens_per_micro_batch,
            attention=config.policy.attention,
            packing=config.policy.packing,
            trust_remote_code=config.policy.trust_remote_code,
        )
        self.model = load_reward_model(path, self.settings, dtype=DTYPES[reward.dtype]).to(self.device).eval()
        own = load_tokenizer(path, trust_remote_code=config.policy.trust_remote_code)
        self.policy_tokenizer = tokenizer
        self.own_tokenizer = None if own.get_vocab() == tokenizer.get_vocab() else own

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """One forward over the samples.

        Raises:
            RunFailed: where a score isn't finite.
        """
        if self.own_tokenizer is not None:
            batch = self._tokenized_again(batch, self.own_tokenizer)
        scores = torch.zeros(len(batch), dtype=torch.float32)
        for micro in micro_batches(batch, self.settings.tokens_per_micro_batch, packs(self.settings), mask=None):
            _, last = self.model(micro.to(self.device))
            scores[micro.samples] = last.cpu()
        if not bool(torch.isfinite(scores).all()):
            raise RunFailed(f"reward model {self.path} gave a score that is not finite")
        return scores

    def _tokenized_again(self, batch: Batch, own: Any) -> Batch:
        responses = self.policy_tokenizer.batch_decode(
            [t.tolist() for t in response_tokens(batch)], skip_special_tokens=True
        )
        samples = []
        for prompt, response in zip(batch["prompt_text"], responses, strict=True):
            if own.chat_template:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
                ids = own.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
            else:
                ids = own(prompt + response)["input_ids"]
            samples.append(torch.tensor(ids, dtype=torch.int64))
        return Batch.from_samples({"tokens": samples})


class RewardScorer:
    """All sources of reward of a run: their scores, and the weighted sum.

    Args:
        world: this process's place in the group.
        config: the whole run.
        tokenizer_path: the policy's tokenizer.
    """

    def __init__(self, world: World, config: Config, tokenizer_path: str):
        if world.threads is not None:
            torch.set_num_threads(world.threads)
        tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=config.policy.trust_remote_code)
        self.sources: list[tuple[str, float, Source]] = []
        for source in config.reward.sources:
            name = source_name(source.name, source.function, source.model)
            made: Source
            if source.function is not None:
                made = RewardFunction(source.function, name, tokenizer)
            else:
                assert source.model is not None
                made = RewardModel(source.model, name, config, tokenizer, world)
            self.sources.append((name, source.weight, made))

    def score(self, batch: Batch) -> Batch:
        """Sample columns ``score``, the weighted sum, and ``score/NAME`` of each source where there are several."""
        scores = {name: source.score(batch) if len(batch) else torch.zeros(0) for name, _, source in self.sources}
        total = sum((weight * scores[name] for name, weight, _ in self.sources), torch.zeros(len(batch)))
        columns = {"score": total}
        if len(scores) > 1:
            columns |= {f"score/{name}": values for name, values in scores.items()}
        return Batch(batch.offsets, {}, columns)
