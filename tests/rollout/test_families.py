"""Names and shapes of several families of models: what a trainer exports is what each engine holds and computes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import rollout_models as models
import torch
from safetensors.torch import load_file
from test_engine_weights import Case

TIED = {"gemma2", "qwen3"}
CASES = [(engine, kind) for kind in models.KINDS for engine in ("vllm", "transformers")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    engine, kind = request.param
    case = Case(engine, models.make_model(tmp_path, kind=kind, tied=kind in TIED))
    yield case
    case.close()


def test_weights_of_this_family_arrive(case: Case, tmp_path: Path) -> None:
    prompts = models.prompts([5, 90, 9], samples=2)
    for seed in (1, 2):
        model = models.new_weights(case.path, seed)
        manifest = case.publish(model)
        model.save_pretrained(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert {e.name: e.shape for e in manifest.entries()} == {n: tuple(t.shape) for n, t in saved.items()}
        case.rollout.receive_weights(manifest, True)  # reads each parameter of the engine again
        assert case.rollout.weight_checksums().keys() >= saved.keys()
        batch = case.generate(prompts)
        assert models.largest_difference(model, batch, 1.0) <= 1e-5
        greedy = case.generate(prompts, temperature=0.0)
        for logprobs, tokens in models.plain_logprobs(model, greedy, 1.0):
            assert torch.equal(logprobs.argmax(-1), tokens)


def test_an_expert_that_was_not_taken_over_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrlhf.actors.rollout_parts import Comparison
    from rayrlhf.errors import RunFailed

    case = Case("vllm", models.make_model(tmp_path, kind="mixtral"))
    check = Comparison.check
    case.send(models.new_weights(tmp_path, 1))
    for number, matrix, where in ((2, "w1", (2, 10, 3)), (3, "w3", (3, 128 + 10, 3)), (1, "w2", (1, 10, 3))):
        name = f"model.layers.1.block_sparse_moe.experts.{number}.{matrix}.weight"
        stacked = "w2_weight" if matrix == "w2" else "w13_weight"

        def change(self: Comparison, *arguments: object, where: tuple[int, ...] = where, end: str = stacked) -> None:
            (held,) = [p for n, p in case.parameters().items() if n.startswith("model.layers.1.") and n.endswith(end)]
            held.data[where] += 1e-3
            check(self, *arguments)

        monkeypatch.setattr(Comparison, "check", change)
        with pytest.raises(RunFailed, match=f"other weights than the trainer sent: {name}$"):
            case.send(models.new_weights(tmp_path, 2))
    case.close()
