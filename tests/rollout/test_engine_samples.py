"""What the engines generate: log-probabilities, ends, seeds, chunks. Both engines, the same tests."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rollout_models as models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.actors.rollout import RolloutEngine, rollout_environment
from rayrlhf.actors.rollout_transformers import draw, processed_logprobs
from rayrlhf.batch import Batch
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.planning.known import shape_of

LETTERS = {"stop": ["ab", "hg"], "top_k": 5, "top_p": 0.8, "max_response_tokens": 20, "chunk_samples": 1000}


def build(engine: str, path: Path, **settings: object) -> RolloutEngine:
    config = RolloutConfig(engine=engine, max_num_seqs=5, **settings)
    return RolloutEngine(
        models.CPU,
        model_path=str(path),
        config=config,
        dtype="float32",
        max_model_tokens=200,
    )


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def rollout(request: pytest.FixtureRequest, untied: Path) -> Iterator[RolloutEngine]:
    engine = build(request.param, untied, max_response_tokens=16, chunk_samples=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def speller(request: pytest.FixtureRequest, few_letters: Path) -> Iterator[RolloutEngine]:
    """An engine of eight letters with stop strings, top-k and top-p."""
    engine = build(request.param, few_letters, **LETTERS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(untied: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).eval()


def all_of(rollout: RolloutEngine, prompts: Batch, **kwargs: object) -> Batch:
    return Batch.concat(list(rollout.generate(prompts, **kwargs)))


def cache_of(worker: object) -> list[int]:
    """Bytes of a vLLM worker's KV cache, its blocks and the tokens of each."""
    storages = [tensor.untyped_storage() for tensor in worker.model_runner.kv_caches]  # type: ignore[attr-defined]
    config = worker.vllm_config.cache_config  # type: ignore[attr-defined]
    nbytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return [nbytes, config.num_gpu_blocks, config.block_size]


@pytest.mark.parametrize("rollout", ["vllm"], indirect=True)
def test_vllm_keeps_what_is_planned_for_a_token(rollout: RolloutEngine, untied: Path) -> None:
    ((nbytes, blocks, block_size),) = rollout._engine._engine.collective_rpc(cache_of)
    # By hand: keys and values x 2 layers x 1 key-value head x 32 x 4 bytes.
    assert nbytes / (blocks * block_size) == shape_of(str(untied)).kv_bytes_per_token(4) == 512


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward(
    rollout: RolloutEngine, plain: torch.nn.Module, temperature: float
) -> None:
    batch = all_of(rollout, models.prompts([3, 150, 8, 1], samples=3), temperature=temperature)
    assert models.largest_difference(plain, batch, temperature) <= 1e-5
    assert models.largest_difference(plain, batch, 1.7 - temperature) > 0.1  # the comparison tells temperatures apart


def test_temperature_zero_takes_the_likeliest_token(rollout: RolloutEngine, plain: torch.nn.Module) -> None:
    batch = all_of(rollout, models.prompts([5, 9]), temperature=0.0)
    for logprobs, tokens in models.plain_logprobs(plain, batch, 1.0):
        assert torch.equal(logprobs.argmax(-1), tokens)
    assert models.largest_difference(plain, batch, 1.0) <= 1e-5


def test_a_response_ends_at_any_eos_token_or_at_the_limit(rollout: RolloutEngine) -> None:
    ends = {1, *models.EOS_OF_GENERATION}
    batch = all_of(rollout, models.prompts([4] * 20, samples=2))
    seen = set()
    for reason, (key, tokens) in zip(batch["finish_reason"], models.responses(batch).items(), strict=True):
        assert not ends & set(tokens[:-1]), key
        assert reason == ("stop" if tokens[-1] in ends else "length")
        assert len(tokens) == 16 or reason == "stop"
        seen |= {reason, tokens[-1] if reason == "stop" else None}
    assert {"stop", "length"} < seen and len(seen) > 5  # several of the EOS tokens came up
    shorter = all_of(rollout, models.prompts([4] * 5), max_response_tokens=2)
    assert max(map(len, models.responses(shorter).values())) == 2


def test_the_last_token_allowed_can_be_an_eos(rollout: RolloutEngine) -> None:
    batch = all_of(rollout, models.prompts([4] * 40), max_response_tokens=1)
    ended = [tokens[0] in {1, *models.EOS_OF_GENERATION} for tokens in models.responses(batch).values()]
    assert any(ended) and not all(ended)
    assert batch["finish_reason"] == ["stop" if end else "length" for end in ended]


def test_columns_of_a_sample(rollout: RolloutEngine) -> None:
    given = models.prompts([3, 7, 150], samples=4)
    batch = all_of(rollout, given)
    place = {
        key: i for i, key in enumerate(zip(given["prompt_id"].tolist(), given["sample_index"].tolist(), strict=True))
    }
    spans = given.spans()
    for row, (start, end) in enumerate(batch.spans()):
        origin = place[int(batch["prompt_id"][row]), int(batch["sample_index"][row])]
        first, last = spans[origin]
        length = last - first
        assert batch["prompt_length"][row] == length
        assert torch.equal(batch["tokens"][start : start + length], given["tokens"][first:last])
        assert batch["response_mask"][start:end].tolist() == [False] * length + [True] * (end - start - length)
        assert not batch["rollout_logprobs"][start : start + length].any()
        assert (batch["rollout_logprobs"][start + length : end] < 0).all()
        assert batch["seed"][row] == given["seed"][origin] and batch["note"][row] == f"note {origin}"
    types = {
        name: batch[name].dtype
        for name in ("tokens", "response_mask", "rollout_logprobs", "prompt_length", "weight_version")
    }
    assert types == {
        "tokens": torch.int64,
        "response_mask": torch.bool,
        "rollout_logprobs": torch.float32,
        "prompt_length": torch.int64,
        "weight_version": torch.int64,
    }
    assert (batch["weight_version"] == rollout.weight_version).all()


def test_chunks_lose_nothing_and_come_in_the_same_order_each_time(rollout: RolloutEngine) -> None:
    given = models.prompts([3, 7, 150, 20, 9], samples=3)
    first, second = list(rollout.generate(given)), list(rollout.generate(given))
    assert [len(chunk) for chunk in first] == [4, 4, 4, 3]
    both = [
        [list(zip(c["prompt_id"].tolist(), c["sample_index"].tolist(), strict=True)) for c in run]
        for run in (first, second)
    ]
    assert both[0] == both[1]
    flat = [key for chunk in both[0] for key in chunk]
    assert sorted(flat) == [(p, s) for p in range(5) for s in range(3)]
    assert flat != sorted(flat)  # in the order of finishing: the engine has five places for fifteen samples
    assert not list(rollout.generate(given.select([])))


def test_same_seeds_same_tokens_and_other_seeds_other_tokens(rollout: RolloutEngine) -> None:
    given = models.prompts([6, 6], samples=4)
    first, second = all_of(rollout, given), all_of(rollout, given)
    assert torch.equal(first["tokens"], second["tokens"])
    assert torch.equal(first["rollout_logprobs"], second["rollout_logprobs"])
    for prompt in (0, 1):
        own = [tuple(v) for k, v in models.responses(first).items() if k[0] == prompt]
        assert len(set(own)) >= 3  # two responses may be one and the same EOS token
    other = all_of(rollout, given.with_columns(sample={"seed": given["seed"] + 1}))
    assert models.responses(other) != models.responses(first)


def test_a_sample_does_not_depend_on_its_company(rollout: RolloutEngine) -> None:
    given = models.prompts([6, 30, 3, 12], samples=3)
    whole = models.responses(all_of(rollout, given))
    for indices in ([4], [11, 0, 7]):
        part = models.responses(all_of(rollout, given.select(indices)))
        assert part == {key: whole[key] for key in part} and len(part) == len(indices)


def test_stopping_early_leaves_nothing_behind(rollout: RolloutEngine) -> None:
    given = models.prompts([6, 30, 3, 12], samples=3)
    expected = models.responses(all_of(rollout, given))
    stream = rollout.generate(given)
    next(stream)
    with pytest.raises(RunFailed, match="still generating"):
        next(rollout.generate(given))
    stream.close()
    assert models.responses(all_of(rollout, given)) == expected


def test_prompts_that_can_not_be_used_are_named(rollout: RolloutEngine) -> None:
    good = models.prompts([3, 3, 3])

    def refused(**columns: list) -> str:
        tokens = columns.pop("tokens", [torch.tensor([60, 61])] * 3)
        batch = Batch.from_samples({"tokens": tokens}, {**good.columns()[1], **columns})
        with pytest.raises(RunFailed) as caught:
            list(rollout.generate(batch))
        return str(caught.value)

    two = torch.tensor([60, 61])
    assert "prompt 1 of 3 has the token 260, outside the model's vocabulary of 260" in refused(
        tokens=[two, torch.tensor([260]), two]
    )
    assert "has the token -100" in refused(tokens=[two, two, torch.tensor([5, -100])])
    assert "prompt 2 of 3 has no tokens" in refused(tokens=[two, two, two[:0]])
    assert "has 185 tokens; with 16 for the response that is more than the 200" in refused(
        tokens=[two, torch.full((185,), 60), two]
    )
    assert "has the seed -1" in refused(seed=torch.tensor([1, -1, 2]))
    assert len(all_of(rollout, good)) == 3


def test_stop_strings_end_a_response_and_stay_in_it(speller: RolloutEngine, few_letters: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(few_letters)
    batch = all_of(speller, models.prompts([3] * 30, samples=2, vocab=11))
    kinds: dict[str, int] = {}
    for reason, tokens in zip(batch["finish_reason"], models.responses(batch).values(), strict=True):
        text = tokenizer.decode(tokens)
        assert not any(stop in tokenizer.decode(tokens[:-1]) for stop in LETTERS["stop"])
        string = next((stop for stop in LETTERS["stop"] if text.endswith(stop)), None)
        assert reason == ("stop" if string or tokens[-1] == 1 else "length")
        kind = string or ("eos" if tokens[-1] == 1 else "length")
        kinds[kind] = kinds.get(kind, 0) + 1
    assert set(kinds) >= {"ab", "hg", "length"}, kinds


def independent_logprobs(logprobs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k, then top-p among what is left, token by token in float64 Python."""
    rows = []
    for row in logprobs.double().exp().tolist():
        order = sorted(range(len(row)), key=lambda token: -row[token])[: top_k or None]
        total, kept, mass = sum(row[token] for token in order), [], 0.0
        for token in order:
            if mass / total >= top_p:
                break
            kept.append(token)
            mass += row[token]
        rows.append([math.log(row[token] / mass) if token in kept else -math.inf for token in range(len(row))])
    return torch.tensor(rows)


def test_top_k_and_top_p_are_part_of_the_logprobs(speller: RolloutEngine, few_letters: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(few_letters, dtype=torch.float32).eval()
    batch = all_of(speller, models.prompts([4] * 10, vocab=11), temperature=0.9)
    spans = zip(batch.spans(), batch["prompt_length"].tolist(), strict=True)
    for ((start, end), prompt), (logprobs, tokens) in zip(spans, models.plain_logprobs(model, batch, 0.9), strict=True):
        expected = independent_logprobs(logprobs, 5, 0.8).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(
            batch["rollout_logprobs"][start + prompt : end].double(), expected.double(), atol=1e-5, rtol=0
        )


def test_processed_logprobs_against_the_definition() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) * 3
    for top_k, top_p in ((0, 1.0), (7, 1.0), (0, 0.6), (9, 0.5), (1, 1.0), (30, 0.999)):
        found = processed_logprobs(logits, torch.full((40,), 0.7), top_k, top_p)
        expected = independent_logprobs(torch.log_softmax(logits.double() / 0.7, -1), top_k, top_p)
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 20000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = draw(probabilities.log().expand(n, -1), uniforms, torch.zeros(n, dtype=torch.bool))
    counts = torch.bincount(tokens, minlength=6)
    assert counts[1] == counts[5] == 0
    expected = probabilities[[0, 2, 3, 4]] * n
    assert float(((counts[[0, 2, 3, 4]] - expected) ** 2 / expected).sum()) < 16.3  # 0.1 % of chi-square, 3 degrees
    edges = torch.tensor([0.0, 0.500001, 0.999999999, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.log().expand(4, -1), edges, torch.zeros(4, dtype=torch.bool)).tolist() == [0, 2, 4, 4]
    assert draw(probabilities.log()[None], edges[-1:], torch.ones(1, dtype=torch.bool)).tolist() == [0]


def test_without_vllm_one_message_names_the_way_out(monkeypatch: pytest.MonkeyPatch, untied: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputRefused, match=r"vLLM can't be imported here .*rollout.engine=transformers"):
        build("vllm", untied)


def test_the_environment_is_for_the_device() -> None:
    cpu, cuda = rollout_environment("cpu"), rollout_environment("cuda")
    assert cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and cpu["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in cuda  # CUDA graphs need it
    assert cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == cuda["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
