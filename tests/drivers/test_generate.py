"""Text from a model's folder."""

from __future__ import annotations

import pytest
import torch

from rayrlhf.drivers.generate import generate
from rayrlhf.errors import InputRefused
from tests.drivers.runs import TinyWorld
from tests.test_house import command


def test_the_same_seed_gives_the_same_text_and_another_one_another(world: TinyWorld):
    model = str(world.folder / "model")
    say = lambda seed: generate(model, ["w1 w2", "w3"], max_tokens=8, temperature=1.0, seed=seed, chat=None)  # noqa: E731
    first = say(1)
    assert first == say(1) and first != say(2)
    assert all(text.strip() for text in first)


def test_nearly_no_temperature_is_the_likeliest_text(world: TinyWorld):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = world.folder / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w5 w6", add_special_tokens=False)["input_ids"]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[2:], skip_special_tokens=True)
    assert generate(str(folder), ["w5 w6"], max_tokens=6, temperature=0.01, seed=0, chat=False) == [expected]


def test_a_chat_needs_a_template_and_a_model_needs_a_folder(world: TinyWorld):
    with pytest.raises(InputRefused, match="no chat template"):
        generate(str(world.folder / "model"), ["w1"], max_tokens=4, temperature=1.0, seed=0, chat=True)
    refused = command("generate", "./no/such/model", "--prompt", "hello")
    assert refused.returncode == 2
    assert "there is no such folder" in refused.stderr and "Traceback" not in refused.stderr


def test_too_many_tokens_are_refused(world: TinyWorld):
    with pytest.raises(InputRefused, match="401 tokens; .* reads at most 256"):
        generate(str(world.folder / "model"), ["w1"], max_tokens=400, temperature=1.0, seed=0, chat=False)
