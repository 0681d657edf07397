"""Models that would be read wrongly, and are refused when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import _refuse_bidirectional, check_output_head, load_causal_lm, load_reward_model


def test_a_bidirectional_reward_model(tmp_path: Path) -> None:
    """Read at its last token, without its pooler, it would give other numbers than transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(vocab_size=97, num_labels=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputRefused, match="lets a token see those behind it"):
        load_reward_model(str(tmp_path), ModelConfig(), dtype=torch.float32)


@pytest.mark.parametrize(("cap", "attention"), [(50.0, "sdpa"), (50.0, "eager"), (None, "sdpa")])
def test_a_soft_cap_that_the_attention_leaves_out(tmp_path: Path, cap: float | None, attention: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        vocab_size=97,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=cap,
        final_logit_softcapping=None,
        **sizes,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    settings = ModelConfig(attention=attention)  # type: ignore[arg-type]
    if cap is None or attention == "eager":
        load_causal_lm(str(tmp_path), settings, dtype=torch.float32)
        return
    with pytest.raises(InputRefused, match="caps its attention logits at 50, which the attention sdpa leaves out"):
        load_causal_lm(str(tmp_path), settings, dtype=torch.float32)


def test_trials_on_a_cpu_need_no_flash_attention(llama: Path, scorer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are read on a CPU and tried there, also those that will run with flash attention, which needs a GPU."""
    lm = load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32)
    backbone = load_reward_model(str(scorer), ModelConfig(), dtype=torch.float32).backbone
    for model, trial in ((lm, check_output_head), (backbone, lambda b: _refuse_bidirectional("x", b))):
        asked: list[str] = []

        # Without the check whether it is installed, which it isn't on a machine without a GPU.
        def choose(name: str, config: Any = model.config, asked: list[str] = asked) -> None:
            asked.append(name)
            config._attn_implementation = name

        monkeypatch.setattr(model, "set_attn_implementation", choose)
        choose("flash_attention_2")
        with pytest.raises((ImportError, TypeError)):
            model(input_ids=torch.tensor([[1, 2]]))
        trial(model)
        assert asked == ["flash_attention_2", "sdpa", "flash_attention_2"]
