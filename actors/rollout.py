"""The rollout role: it generates the responses that the policy is trained on.

`RolloutEngine` is the same around either engine: vLLM (`rollout_vllm`) or plain transformers (`rollout_transformers`).
It knows which version of the policy's weights the engine holds, and stamps each sample with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from rayrlhf.actors.rollout_common import (
    Engine,
    Finished,
    Request,
    layout_problems,
    read_model_facts,
    rollout_environment,
)
from rayrlhf.batch import Batch
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.errors import RunFailed
from rayrlhf.models.world import World
from rayrlhf.weights import Entry, Manifest, checksum, differing, make_transport, receive
from rayrlhf.weights.bucket import torch_dtype
from rayrlhf.weights.checksums import listed

__all__ = ["RolloutEngine", "rollout_environment"]


class RolloutEngine:
    """One engine with its weights.

    The engine starts with the weights of the folder, which are version 0. Each `receive_weights` raises the version.

    Args:
        world: this process; the engine uses ``world.device`` and ``world.threads``.
        model_path: Hugging Face folder of the policy's starting model.
        config: the run's ``rollout`` section.
        dtype: ``float32`` or ``bfloat16``, the type of the engine's weights.
        max_model_tokens: longest prompt and response together, in tokens.
        transport_name: ``shared_memory`` or ``object_store``.
        tokenizer_path: folder of the tokenizer; by default the model's.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputRefused: where vLLM is asked for and missing, or the KV cache is too small for one sequence.
    """

    def __init__(
        self,
        world: World,
        *,
        model_path: str,
        config: SamplerConfig,
        dtype: Literal["float32", "bfloat16"],
        max_model_tokens: int,
        transport_name: str,
        tokenizer_path: str | None = None,
        trust_remote_code: bool = False,
    ):
        tokenizer_path = tokenizer_path or model_path
        if world.device == "cpu" and world.threads is not None:
            torch.set_num_threads(world.threads)
        self._config = config
        self._dtype = dtype
        self._max_model_tokens = max_model_tokens
        self._facts = read_model_facts(model_path, tokenizer_path, trust_remote_code=trust_remote_code)
        self._transport = make_transport(transport_name)
        self._manifest: Manifest | None = None
        self._received = False
        self._unusable: str | None = None
        self._generating = self._asleep = False
        self.weight_version = 0
        if config.engine == "vllm":
            from rayrlhf.actors.rollout_vllm import VllmEngine as EngineClass
        else:
            from rayrlhf.actors.rollout_transformers import TransformersEngine as EngineClass  # type: ignore[assignment]
        self._engine: Engine = EngineClass(
            world,
            model_path=model_path,
            tokenizer_path=tokenizer_path,
            config=config,
            dtype=dtype,
            max_model_tokens=max_model_tokens,
            facts=self._facts,
            trust_remote_code=trust_remote_code,
        )

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Batch,
        *,
        temperature: float | None = None,
        max_response_tokens: int | None = None,
        weight_version: int | None = None,
    ) -> Iterator[Batch]:
        """One response for each sample of ``prompts``, in chunks of ``rollout.chunk_samples`` as they finish.

        Args:
            prompts: token column ``tokens`` (int64 [T], each sample's prompt); sample column ``seed`` (int64 [S], not
                negative). All other sample columns are passed through.
            temperature: instead of the configured one; 0 takes the likeliest token.
            max_response_tokens: instead of the configured number.
            weight_version: refuse to generate with any other weights.

        Yields:
            Batches with ``tokens``, ``response_mask``, ``rollout_logprobs`` for each token of prompt and response, and
            ``prompt_length``, ``weight_version``, ``finish_reason`` for each sample.

        Raises:
            RunFailed: where a prompt can't be used, or the engine doesn't hold (those) weights.
        """
        self._check_ready(weight_version)
        temperature = self._config.temperature if temperature is None else temperature
        requests = self._requests(prompts, temperature, max_response_tokens or self._config.max_response_tokens)
        yield from self._chunks(prompts, requests)

    def _check_ready(self, weight_version: int | None) -> None:
        if self._unusable:
            raise RunFailed(f"the rollout engine can't generate: {self._unusable}")
        if self._asleep:
            raise RunFailed("the rollout engine is asleep")
        if self._generating:
            raise RunFailed("the rollout engine is still generating: its chunks have not all been taken")
        if weight_version is not None and weight_version != self.weight_version:
            raise RunFailed(
                f"the rollout engine holds the weights of version {self.weight_version} where version {weight_version} "
                "is asked for"
            )

    def _requests(self, prompts: Batch, temperature: float, max_tokens: int) -> list[Request]:
        tokens, seeds = prompts["tokens"].tolist(), prompts["seed"].tolist()
        requests = []
        for index, (start, end) in enumerate(prompts.spans()):
            prompt = tokens[start:end]
            where = f"prompt {index} of {len(prompts)}"
            if not prompt:
                raise RunFailed(f"{where} has no tokens; the engines need at least one")
            if len(prompt) + max_tokens > self._max_model_tokens:
                raise RunFailed(
                    f"{where} has {len(prompt)} tokens; with {max_tokens} for the response that is more than the "
                    f"{self._max_model_tokens} which the engine was built for"
                )
            if min(prompt) < 0 or max(prompt) >= self._facts.vocab_size:
                raise RunFailed(
                    f"{where} has the token {min(prompt) if min(prompt) < 0 else max(prompt)}, outside the model's "
                    f"vocabulary of {self._facts.vocab_size}: tokenizer and model don't belong together"
                )
            if seeds[index] < 0:
                raise RunFailed(f"{where} has the seed {seeds[index]}; seeds are 0 or more")
            requests.append(Request(index, prompt, seeds[index], temperature, max_tokens))
        return requests

    def _chunks(self, prompts: Batch, requests: list[Request]) -> Iterator[Batch]:
        self._generating = True
        try:
            waiting: list[Finished] = []
            for finished in self._engine.generate(requests):
                waiting.append(finished)
                if len(waiting) == self._config.chunk_samples:
                    yield self._chunk(prompts, requests, waiting)
                    waiting = []
            if waiting:
                yield self._chunk(prompts, requests, waiting)
        finally:
            self._generating = False

    def _chunk(self, prompts: Batch, requests: list[Request], finished: list[Finished]) -> Batch:
        own = prompts.select([f.index for f in finished])
        _, sample = own.columns()
        lengths = own.lengths
        token: dict[str, list[torch.Tensor]] = {"tokens": [], "response_mask": [], "rollout_logprobs": []}
        for response, length in zip(finished, lengths.tolist(), strict=True):
            ids = requests[response.index].prompt + response.tokens
            token["tokens"].append(torch.tensor(ids, dtype=torch.int64))
            mask = torch.ones(len(ids), dtype=torch.bool)
            mask[:length] = False
            token["response_mask"].append(mask)
            logprobs = torch.zeros(len(ids), dtype=torch.float32)
            logprobs[length:] = torch.tensor(response.logprobs, dtype=torch.float32)
            token["rollout_logprobs"].append(logprobs)
        sample |= {
            "prompt_length": lengths,
            "weight_version": torch.full((len(finished),), self.weight_version, dtype=torch.int64),
            "finish_reason": [response.reason for response in finished],
        }
        return Batch.from_samples(token, sample)

    # -- weights ------------------------------------------------------------------------------------------------

    def receive_weights(self, manifest: Manifest, verify: bool) -> None:
        """Take over a published set of weights; the prefix cache is emptied, once.

        Args:
            manifest: what the trainer's `publish` returned.
            verify: read the engine's parameters back and compare them with the manifest's checksums.

        Raises:
            RunFailed: where the weights don't fit (nothing has changed then), were damaged on their way, or are not
                what the engine holds afterwards; tensors are named. The engine generates nothing until it has received
                a whole set.
        """
        if self._generating or self._asleep:
            doing = "generating" if self._generating else "asleep"
            raise RunFailed(f"weights can't change while the rollout engine is {doing}")
        if verify and manifest.checksums is None:
            raise RunFailed("the weights can't be verified: they were published without checksums")
        if manifest.version < 0 or (self._received and manifest.version <= self.weight_version):
            raise RunFailed(
                f"weights of version {manifest.version} are no newer than those of version {self.weight_version} which "
                "the rollout engine holds"
            )
        if manifest.dtype != self._dtype:
            raise RunFailed(f"weights were published as {manifest.dtype}; the rollout engine's type is {self._dtype}")
        problems = layout_problems(self._facts, manifest)
        if problems:
            raise RunFailed("the weights don't fit the rollout engine's model: " + "; ".join(problems[:8]))
        self._unusable = f"the transfer of weights of version {manifest.version} did not finish"
        self._engine.load(manifest, receive(manifest, self._transport))
        self._engine.reset_prefix_cache()
        self._manifest = manifest
        if verify:
            self._verify(manifest)
        self.weight_version, self._received, self._unusable = manifest.version, True, None

    def weight_checksums(self) -> dict[str, int]:
        """CRC-32 of each parameter as the engine holds it, by Hugging Face name, in the type in which it was published.

        A tied output layer is among them, under its own name.

        Raises:
            RunFailed: where no weights have been received yet.
        """
        if self._manifest is None:
            raise RunFailed("the rollout engine has received no weights yet, so there is nothing to compare them with")
        found = {}
        embedding = None
        for entry in self._manifest.entries():
            parameter = self._engine.parameter(entry)
            if parameter is not None:
                found[entry.name] = checksum(parameter.to(torch_dtype(entry.dtype)))
            if entry.name == self._facts.embedding:
                embedding = entry
        if self._facts.tied and embedding:
            output = self._engine.output_layer()
            if output is not None:
                found[self._facts.tied] = checksum(_rows(output, embedding))
        return found

    def _verify(self, manifest: Manifest) -> None:
        expected = dict(manifest.checksums or {})
        if self._facts.tied:
            expected[self._facts.tied] = expected[self._facts.embedding]
        found = self.weight_checksums()
        unread = [name for name in expected if name not in found]
        if unread:
            raise RunFailed(
                f"the rollout engine's weights can't be verified: {self._config.engine} doesn't tell where it keeps "
                f"{listed(unread)}"
            )
        wrong = differing(expected, found)
        if wrong:
            raise RunFailed(
                f"after the transfer of version {manifest.version} the rollout engine holds other weights than the "
                f"trainer published: {listed(wrong)}"
            )

    # -- memory -------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory to the trainer: level 1 keeps the weights in host memory, level 2 drops them.

        On a CPU no memory is freed: engine and trainer share it, and vLLM gives none of it back there. The rules are
        the same everywhere: asleep, it neither generates nor receives; after level 2 it needs weights to generate.

        Raises:
            RunFailed: while samples are being generated.
        """
        if level not in (1, 2):
            raise ValueError(f"level is {level}; legal ones are 1 and 2")
        if self._generating:
            raise RunFailed("the rollout engine can't sleep while it is generating")
        if self._asleep:
            return
        self._engine.sleep(level)
        self._asleep = True
        if level == 2:
            self._unusable = "sleep(level=2) dropped its weights, and it has received none since"

    def wake(self) -> None:
        """Take the device's memory again. Awake already, it does nothing."""
        if self._asleep:
            self._engine.wake()
            self._asleep = False

    def close(self) -> None:
        """End the engine and free its memory."""
        self._engine.close()
        self._transport.close()


def _rows(weight: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The first rows of a weight that is padded, in the entry's type."""
    return weight[: entry.shape[0]].to(torch_dtype(entry.dtype))
