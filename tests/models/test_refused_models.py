"""Models that would be read wrongly, and are refused when they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import load_causal_lm, load_reward_model


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
