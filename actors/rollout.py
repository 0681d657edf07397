"""The rollout role: it generates the responses that the policy is trained on.

`RolloutEngine` is the same around either engine: vLLM (`rollout_vllm`) or plain transformers (`rollout_transformers`).
It knows which version of the policy's weights the engine holds, and stamps each sample with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from rayrlhf.actors.rollout_adapter import adapter_problems
from rayrlhf.actors.rollout_common import (
    Engine,
    Finished,
    Part,
    Request,
    layout_problems,
    read_model_facts,
    rollout_environment,
)
from rayrlhf.actors.rollout_intake import Intake
from rayrlhf.batch import Batch
from rayrlhf.cluster.sharing import Share
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.config.trainers import LoraConfig
from rayrlhf.errors import RunFailed
from rayrlhf.models.world import World
from rayrlhf.weights import Address, Manifest

__all__ = ["RolloutEngine", "rollout_environment"]

ALL_PARTS: tuple[Part, ...] = ("weights", "kv_cache")


class RolloutEngine:
    """One engine with its weights.

    The engine starts with the weights of the folder, which are version 0. Each `receive_weights` raises the version.

    Args:
        world: this process; the engine uses ``world.device`` and ``world.threads``. With ``rollout.tensor_parallel`` above 1
            vLLM starts so many workers as children of it, on the GPUs that the process sees.
        model_path: Hugging Face folder of the policy's starting model.
        config: the run's ``rollout`` section.
        dtype: ``float32`` or ``bfloat16``, the type of the engine's weights.
        max_model_tokens: longest prompt and response together, in tokens.
        tokenizer_path: folder of the tokenizer; by default the model's.
        trust_remote_code: run code that comes with the model.
        lora: the policy's adapters, where they alone will be sent; None: all weights are sent.

    Raises:
        InputRefused: where vLLM is asked for and missing, the KV cache is too small for one sequence, or the model can't be
            spread over so many workers.
        RunFailed: where the engine doesn't come up.
    """

    def __init__(
        self,
        world: World,
        *,
        model_path: str,
        config: SamplerConfig,
        dtype: Literal["float32", "bfloat16"],
        max_model_tokens: int,
        tokenizer_path: str | None = None,
        trust_remote_code: bool = False,
        lora: LoraConfig | None = None,
    ):
        tokenizer_path = tokenizer_path or model_path
        if world.device == "cpu" and world.threads is not None:
            torch.set_num_threads(world.threads)
        self._config = config
        self._dtype = dtype
        self._max_model_tokens = max_model_tokens
        self._facts = read_model_facts(model_path, tokenizer_path, trust_remote_code=trust_remote_code)
        self._lora = lora
        self._manifest: Manifest | None = None
        self._received: tuple[int, bool] | None = None
        self._unusable: str | None = None
        self._no_base: str | None = None
        self._generating = False
        self._awake: set[Part] = set(ALL_PARTS)
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
            lora=lora,
        )

    @classmethod
    def check(
        cls,
        model_path: str,
        config: SamplerConfig,
        dtype: Literal["float32", "bfloat16"],
        max_model_tokens: int,
        tokenizer_path: str | None = None,
        trust_remote_code: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        """Raise what the constructor would raise of the configuration; no weight is read.

        Raises:
            InputRefused: where vLLM isn't installed, or can't run the model so.
        """
        facts = read_model_facts(model_path, tokenizer_path or model_path, trust_remote_code=trust_remote_code)
        if config.engine == "vllm":
            from rayrlhf.actors.rollout_vllm import check_engine

            check_engine(facts.config, config, dtype, max_model_tokens, lora)

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Batch,
        *,
        temperature: float | None = None,
        max_response_tokens: int | None = None,
        weight_version: int | None = None,
        share: Share | None = None,
    ) -> Iterator[Batch]:
        """One response for each sample of ``prompts``, in chunks of ``rollout.chunk_samples`` as they finish.

        Args:
            prompts: token column ``tokens`` (int64 [T], each sample's prompt); sample column ``seed`` (int64 [S], not
                negative). All other sample columns are passed through.
            temperature: instead of the configured one; 0 takes the likeliest token.
            max_response_tokens: instead of the configured number.
            weight_version: refuse to generate with any other weights.
            share: all engines have the same prompts, and each takes some of them through this when it has room: for
                ``rollout.max_num_seqs`` that are unfinished, and no more than an even part of all.

        Yields:
            Batches with ``tokens``, ``response_mask``, ``rollout_logprobs`` for each token of prompt and response, and
            ``prompt_length``, ``weight_version``, ``finish_reason`` for each sample.

        Raises:
            RunFailed: where a prompt can't be used, or the engine doesn't hold (those) weights.
        """
        self._check_ready(weight_version)
        temperature = self._config.temperature if temperature is None else temperature
        requests = self._requests(prompts, temperature, max_response_tokens or self._config.max_response_tokens)
        places = min(self._config.max_num_seqs, -(-len(prompts) // self._config.engines))
        yield from self._chunks(prompts, requests, Intake(requests, share, places))

    def _check_ready(self, weight_version: int | None) -> None:
        if len(self._awake) < len(ALL_PARTS):
            raise RunFailed("the rollout engine is asleep" + (": only its weights are awake" if self._awake else ""))
        if self._unusable:
            raise RunFailed(f"the rollout engine can't generate: {self._unusable}")
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

    def _chunks(self, prompts: Batch, requests: list[Request], intake: Intake) -> Iterator[Batch]:
        self._generating = True
        try:
            waiting: list[Finished] = []
            for finished in self._engine.generate(intake):
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

    def connect_weights(self, address: Address) -> None:
        """Join the group of the policy's sender; once, before the first `receive_weights`.

        Args:
            address: of the sender. Worker w of this engine is its receiver ``rank * tensor_parallel + w``.

        Raises:
            RunFailed: where the sender isn't there.
        """
        self._engine.connect(address)
        self._received = None  # its versions are counted anew

    def receive_weights(self, manifest: Manifest, verify: bool) -> None:
        """Take over a set of weights, or an adapter, while the policy sends it; the prefix cache is emptied, once.

        A set of weights replaces an adapter too. The engine's weights must be awake, its KV cache need not.

        Args:
            manifest: what is sent. Weights that are the base of an adapter are of no use until it comes.
            verify: read the engine's parameters back and compare them with what arrived; of an adapter, what vLLM does with
                it isn't read back.

        Raises:
            RunFailed: where the weights don't fit (nothing has changed then), don't come before the deadline, were damaged
                on their way, or are not what the engine holds afterwards; tensors are named. The engine generates nothing
                until it has received a whole set.
        """
        if self._generating or "weights" not in self._awake:
            doing = "generating" if self._generating else "asleep"
            raise RunFailed(f"weights can't change while the rollout engine is {doing}")
        if verify and not manifest.checksums:
            raise RunFailed("the weights can't be verified: they are sent without checksums")
        adapter = manifest.kind == "adapter"
        # An adapter may follow on the weights to which it belongs.
        if manifest.version < 0 or (self._received and (manifest.version, adapter) <= self._received):
            raise RunFailed(
                f"weights of version {manifest.version} are no newer than those of version {self.weight_version} which "
                "the rollout engine holds"
            )
        self._check_fit(manifest)
        what = "an adapter" if adapter else "weights"
        self._unusable = f"the transfer of {what} of version {manifest.version} did not finish"
        if not adapter:
            self._no_base = self._unusable
        self._engine.load(manifest, verify)
        self._engine.reset_prefix_cache()
        if not adapter:
            self._manifest, self._no_base = manifest, None
        self.weight_version, self._received, self._unusable = manifest.version, (manifest.version, adapter), None
        if not adapter and manifest.adapter is not None:
            self._unusable = f"of version {manifest.version} it has the base, and its adapter has not come"

    def _check_fit(self, manifest: Manifest) -> None:
        if manifest.adapter is not None and self._lora is None:
            raise RunFailed("an adapter comes to a rollout engine that was started for whole sets of weights")
        if manifest.kind == "adapter":
            assert self._lora is not None
            if self._no_base:
                raise RunFailed(f"an adapter comes to a rollout engine that has no base weights: {self._no_base}")
            problems = adapter_problems(self._facts, manifest, self._lora.rank)
        else:
            if manifest.dtype != self._dtype:
                raise RunFailed(f"weights are sent as {manifest.dtype}; the rollout engine's type is {self._dtype}")
            problems = layout_problems(self._facts, manifest)
        if problems:
            kind = "adapter doesn't" if manifest.kind == "adapter" else "weights don't"
            raise RunFailed(f"the {kind} fit the rollout engine's model: " + "; ".join(problems[:8]))

    def weight_checksums(self) -> dict[str, int]:
        """CRC-32 of each tensor of the last set of weights as the engine holds it, by Hugging Face name, in the type in
        which it was sent. A tied output layer is among them, under its own name.

        Raises:
            RunFailed: where no weights have been received yet, or each of the engine's workers holds a part of them.
        """
        if self._manifest is None:
            raise RunFailed("the rollout engine has received no weights yet, so there is nothing to compare them with")
        return self._engine.checksums(self._manifest)

    # -- memory -------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory to the trainer: level 1 keeps the weights in host memory, level 2 drops them.

        On a CPU no memory is freed: engine and trainer share it, and vLLM gives none of it back there. The rules are
        the same everywhere: asleep, it neither generates nor receives; after level 2 it needs a whole set of weights to
        generate.

        Raises:
            RunFailed: while samples are being generated.
        """
        if level not in (1, 2):
            raise ValueError(f"level is {level}; legal ones are 1 and 2")
        if self._generating:
            raise RunFailed("the rollout engine can't sleep while it is generating")
        if not self._awake:
            return
        # vLLM before 0.32 can only put all of it to sleep at once. So others leave the GPU first: see `drivers.turns`.
        self.wake()
        self._engine.sleep(level)
        self._awake = set()
        if level == 2:
            self._unusable = self._no_base = "sleep(level=2) dropped its weights, and it has received none since"

    def wake(self, part: Part = "all") -> None:
        """Take the device's memory again; what is awake already stays so.

        Args:
            part: ``weights``: enough to receive some. ``kv_cache``: what generating needs beside them. ``all``: both.

        Raises:
            ValueError: for another part.
        """
        if part not in (*ALL_PARTS, "all"):
            raise ValueError(f"part is {part!r}; legal ones are weights, kv_cache and all")
        missing = [p for p in ALL_PARTS if part in (p, "all") and p not in self._awake]
        if missing:
            self._engine.wake("all" if len(missing) == len(ALL_PARTS) else missing[0])
            self._awake |= set(missing)

    def close(self) -> None:
        """End the engine and free its memory."""
        self._engine.close()
