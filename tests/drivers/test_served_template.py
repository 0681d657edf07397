"""serve-reward of a model with ChatML, whose template ends a turn with a token and a line break."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayrlhf.drivers.serve import scorer
from tests.support.tiny import save_reward_model, save_tiny_model

CHATML = "{% for m in messages %}{{ 'w0 ' + m.content + ' <eos> w60 ' }}{% endfor %}{% if add_generation_prompt %}w0 {% endif %}"


@pytest.fixture
def folder(tmp_path):
    """The model of a run, RUN/model, with a template of its own; the run's configuration isn't there yet."""
    save_tiny_model(tmp_path / "model")
    folder = save_reward_model(tmp_path / "run" / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def read(folder, texts):
    """Scores by transformers' own class."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.tensor([float(model(**tokenizer(t, return_tensors="pt")).logits[0, 0]) for t in texts])


def test_it_reads_up_to_the_end_of_the_turn(folder):
    expected = read(
        folder, ("w0 w1 <eos> w60 w0 w2 w3 <eos>", "w0 w4 <eos> w60 w0 w5 <eos>", "w0 w6 <eos> w60 w0 <eos>")
    )
    found = scorer(str(folder))(["w1", "w4", "w6"], ["w2 w3", "w5", ""])
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("chat_template", "text"), [("auto", "w1 w2 w3 <eos>"), ("always", "w0 w1 <eos> w60 w0 w2 w3 <eos>")]
)
def test_a_plain_prompt_is_read_as_in_the_runs_training(folder, chat_template, text):
    """`auto` leaves plain strings plain, whatever template the tokenizer has."""
    data = f"{{train: d.jsonl, chat_template: {chat_template}}}"
    config = f"{{algorithm: reward_model, run_dir: r, policy: {{path: m}}, data: {data}}}"
    (folder.parent / "config.yaml").write_text(config)
    found = scorer(str(folder))(["w1"], [" w2 w3"])
    torch.testing.assert_close(torch.tensor(found), read(folder, [text]), rtol=0, atol=1e-5)
