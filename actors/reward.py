"""Rewards: Python functions, sequence-classification models, and their weighted sum."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rayrlhf.actors.reward_function import import_function
from rayrlhf.batch import Batch
from rayrlhf.config.schema import ScorerProcesses, ScoreSource, ScoringConfig
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.data.conversation import Message
from rayrlhf.data.tokens import PromptTokenizer
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.frozen import FrozenModel
from rayrlhf.models.layout import micro_batches
from rayrlhf.models.loading import DTYPES, load_reward_model
from rayrlhf.models.packing import packs
from rayrlhf.models.residence import Level
from rayrlhf.models.skeleton import bare_reward_model
from rayrlhf.models.tokenizer import load_tokenizer, plain_prompts_are_chats
from rayrlhf.models.world import World

__all__ = [
    "NamedSource",
    "RewardFunction",
    "RewardModel",
    "RewardScorer",
    "as_trained",
]


class Source(Protocol):
    """Something that scores the samples of a batch."""

    def score(self, batch: Batch) -> Tensor:
        """float32 [S], one number a sample."""


@runtime_checkable
class Service(Protocol):
    """A source that may fail for some samples."""

    def score_each(self, batch: Batch) -> tuple[Tensor, list[str | None]]:
        """float32 [S], NaN where it failed; and why, None where it didn't."""


def response_tokens(batch: Batch) -> list[Tensor]:
    """The tokens of each response, those masked out of training included."""
    tokens, prompts = batch["tokens"], batch["prompt_length"].tolist()
    return [tokens[start + prompt : end] for (start, end), prompt in zip(batch.spans(), prompts, strict=True)]


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


def model_settings(config: ScorerProcesses) -> ModelConfig:
    """How reward models are run."""
    return ModelConfig(
        dtype=config.dtype,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


class RewardModel:
    """A sequence-classification model, read at the last real token of prompt and response.

    Where its tokenizer is the policy's, it reads the very tokens of the sample. Where it is another one, the response is
    decoded, and prompt and response are tokenized for it as in its training (`as_trained`): with a chat template of its own
    the whole conversation, and a plain prompt as a user's message where it was trained so (`plain_prompts_are_chats`);
    without one the prompt's text, of a conversation the last message.

    Args:
        path: folder or hub name.
        name: its name in metrics and messages.
        config: how it is run.
        tokenizer: the policy's.
        world: this process's place in the group.
    """

    def __init__(self, path: str, name: str, config: ScorerProcesses, tokenizer: Any, world: World):
        self.name, self.path = name, path
        self.settings = model_settings(config)
        dtype = DTYPES[config.dtype]
        self.frozen = FrozenModel(
            "reward",
            world,
            lambda zero: load_reward_model(path, self.settings, dtype=dtype, zero=zero),
            zero_stage=config.zero_stage,
            offload=config.offload_parameters,
            dtype=config.dtype,
        )
        own = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
        self.policy_tokenizer = tokenizer
        self.encoder = None if own.get_vocab() == tokenizer.get_vocab() else PromptTokenizer(own)
        self.chats = plain_prompts_are_chats(path, bool(own.chat_template))

    def score(self, batch: Batch) -> Tensor:
        """One forward over the samples; with ``zero_stage`` 3 all ranks call it, with their samples or with none.

        Raises:
            RunFailed: where a score isn't finite, or the model isn't on its device (`set_residence`).
        """
        if self.encoder is not None and len(batch):
            batch = self._tokenized_again(batch, self.encoder)
        scores = torch.zeros(len(batch), dtype=torch.float32)
        inputs = micro_batches(batch, self.settings.tokens_per_micro_batch, packs(self.settings), mask=None)
        for micro, (_, last) in zip(inputs, self.frozen.infer(inputs), strict=True):
            scores[micro.samples] = last
        if not bool(torch.isfinite(scores).all()):
            raise RunFailed(f"reward model {self.path} gave a score that is not finite")
        return scores

    def _tokenized_again(self, batch: Batch, encoder: PromptTokenizer) -> Batch:
        responses = self.policy_tokenizer.batch_decode(
            [t.tolist() for t in response_tokens(batch)], skip_special_tokens=True
        )
        asked: list[str | list[Message]] = list(batch["prompt_text"])
        if encoder.has_template:
            conversations = batch["messages"] if "messages" in batch else [None] * len(batch)
            asked = [
                messages or ([{"role": "user", "content": text}] if self.chats else text)
                for messages, text in zip(conversations, batch["prompt_text"], strict=True)
            ]
        samples = []
        for prompt, response in zip(asked, responses, strict=True):
            try:
                samples.append(as_trained(encoder, prompt, response))
            # a template is a program, and can raise anything
            except Exception as error:
                raise RunFailed(
                    f"reward model {self.path}: its chat template can't write the prompt {str(prompt)[:200]!r} and its "
                    f"response: {type(error).__name__}: {error}"
                ) from error
        return Batch.from_samples({"tokens": samples})


def as_trained(encoder: PromptTokenizer, prompt: str | Sequence[Message], response: str) -> Tensor:
    """The tokens of a prompt and its response as a reward model reads them in its training.

    Args:
        encoder: of the reward model's tokenizer.
        prompt: a plain text, or a conversation for the chat template.
        response: as if it were complete: with EOS, or the template's end of turn, and nothing behind it. A tokenizer
            without EOS (BERT's, say) writes a plain prompt and its response as one text of its own.

    Returns:
        int64 [tokens].

    Raises what the template raises.
    """
    if isinstance(prompt, str):
        if encoder.tokenizer.eos_token_id is None:
            return torch.tensor(encoder.tokenizer(prompt + response)["input_ids"], dtype=torch.int64)
        ids = encoder.encode_plain([prompt])[0] + encoder.with_eos(encoder.encode_rendered([response])[0])
    else:
        written = encoder.render(prompt)
        # Of a blank response only its end is left.
        behind = encoder.response(written, prompt, response) if response.strip() else None
        ids = encoder.encode_rendered([written])[0]
        ids += encoder.with_eos([]) if behind is None else encoder.encode_rendered([behind])[0]
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class NamedSource:
    """One source of scores, and what its scores are for."""

    name: str
    source: ScoreSource
    weight: float | None = 1.0
    """Factor in the weighted sum; None: it is no part of it, and has a column under its name."""


class RewardScorer:
    """All sources of scores of a run, and their weighted sum.

    Args:
        world: this process's place in the group.
        config: how reward models are run.
        tokenizer_path: the policy's tokenizer.
        sources: what scores. Their names differ.
        mark_failures: a service that fails for good gives NaN for the samples concerned, and says why, instead of
            raising. What scores in this process raises all the same.

    Raises:
        InputRefused: where a function, a model or a service's settings can't be used, or two sources have one name.
    """

    def __init__(
        self,
        world: World,
        config: ScorerProcesses,
        tokenizer_path: str,
        sources: Sequence[NamedSource],
        mark_failures: bool = False,
    ):
        _refuse_twice(sources)
        if world.threads is not None:
            torch.set_num_threads(world.threads)
        tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=config.trust_remote_code)
        self.mark_failures = mark_failures
        self.sources = [(named, _made(named, config, tokenizer, world)) for named in sources]

    @classmethod
    def check(
        cls,
        config: ScorerProcesses,
        tokenizer_path: str,
        sources: Sequence[NamedSource],
        mark_failures: bool = False,
    ) -> None:
        """Raise what the constructor would raise of its arguments; no weight is read, and no service is asked.

        Raises:
            InputRefused: see the class, and `rayrlhf.models.skeleton`.
        """
        _refuse_twice(sources)
        load_tokenizer(tokenizer_path, trust_remote_code=config.trust_remote_code)
        key = "reward" if isinstance(config, ScoringConfig) else "scores"
        for source in (named.source for named in sources):
            if source.function is not None:
                import_function(source.function)
            elif source.model is not None:
                bare_reward_model(source.model, model_settings(config), key)
                load_tokenizer(source.model, trust_remote_code=config.trust_remote_code)

    def score(self, batch: Batch) -> Batch:
        """Score all samples with all sources.

        Returns:
            The sample columns ``score``, the weighted sum; ``score/NAME`` of each of its sources where there are several;
            and ``NAME`` of each source that is no part of it. Where failures are marked, ``NAME/failure`` of each service
            too: why a sample has no score (its score is NaN), None where it has one.

        Raises:
            RunFailed: a source fails.
        """
        scores: dict[str, Tensor] = {}
        columns: dict[str, Tensor | list] = {}
        for named, made in self.sources:
            if self.mark_failures and isinstance(made, Service):
                found, columns[f"{named.name}/failure"] = made.score_each(batch) if len(batch) else (torch.zeros(0), [])
            else:
                # A model may be spread over the ranks, and those with samples need the others.
                found = made.score(batch) if len(batch) or isinstance(made, RewardModel) else torch.zeros(0)
            scores[named.name] = found
        summed = {n.name: n.weight for n, _ in self.sources if n.weight is not None}
        total = sum((weight * scores[name] for name, weight in summed.items()), torch.zeros(len(batch)))
        columns |= {name: values for name, values in scores.items() if name not in summed}
        columns["score"] = total
        if len(summed) > 1:
            columns |= {f"score/{name}": scores[name] for name in summed}
        return Batch(batch.offsets, {}, columns)

    def set_residence(self, level: Level) -> None:
        """Whether reward models are on the device ("weights", "all") or in host memory ("none"). All ranks are called."""
        for _, made in self.sources:
            if isinstance(made, RewardModel):
                made.frozen.set_residence(level)


def _refuse_twice(sources: Sequence[NamedSource]) -> None:
    names = [named.name for named in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputRefused(f"{', '.join(twice)}: the name of several sources of scores; legal: one name each")


def _made(named: NamedSource, config: ScorerProcesses, tokenizer: Any, world: World) -> Source:
    source = named.source
    if source.function is not None:
        return RewardFunction(source.function, named.name, tokenizer)
    if source.url is not None:
        # It imports this module.
        from rayrlhf.actors.reward_http import RemoteReward, RemoteRewardSource

        remote = RemoteReward(source.url, source.token_env, source.timeout_s, source.retries)
        return RemoteRewardSource(remote, named.name, tokenizer)
    assert source.model is not None
    return RewardModel(source.model, named.name, config, tokenizer, world)
