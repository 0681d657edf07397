"""Loading: which models are taken, which are refused and why; heads; GGUF files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import (
    check_output_head,
    load_causal_lm,
    load_config,
    load_critic,
    load_reward_model,
    to_model_folder,
)
from tests.models.making import ragged_tokens

SETTINGS = ModelConfig(dtype="float32")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip


def random_lm(family: str, **keys: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("family", "keys"),
    [("Llama", {}), ("Qwen2", {}), ("Qwen3", {}), ("Mistral", {}), ("Gemma2", {"final_logit_softcapping": 2.0}),
     ("Granite", {"logits_scaling": 3.0}), ("Cohere", {"logit_scale": 0.25})],
)  # fmt: skip
def test_known_output_heads(family: str, keys: dict[str, Any]) -> None:
    check_output_head(random_lm(family, **keys))


@pytest.mark.parametrize("kind", ["scaled", "capped", "shifted"])
def test_an_unknown_output_head_is_refused(kind: str) -> None:
    from transformers import LlamaForCausalLM

    class Strange(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if kind == "scaled":
                output.logits = 1.1 * output.logits
            elif kind == "capped":
                output.logits = 50 * torch.tanh(output.logits / 50)
            else:
                output.logits = output.logits.roll(1, -1)
            return output

    lm = random_lm("Llama")
    lm.__class__ = Strange
    with pytest.raises(InputRefused, match="Strange computes its logits"):
        check_output_head(lm)


def test_missing_files_and_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="there is no such folder"):
        load_config(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="has no config.json"):
        load_config(str(tmp_path / "empty"))
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: load_causal_lm(str(broken), SETTINGS, dtype=torch.float32),
        lambda: load_critic(str(broken), SETTINGS, num_layers=None, dtype=torch.float32),
    ):
        with pytest.raises(InputRefused, match="no weights for .*layers.1.mlp.up_proj.weight"):
            load()
    load_critic(str(broken), SETTINGS, num_layers=1, dtype=torch.float32)  # the layer isn't needed


def test_a_reward_model_needs_its_trained_head(llama: Path, scorer: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="2 labels; a reward model has exactly 1"):
        load_reward_model(str(llama), SETTINGS, dtype=torch.float32)
    for name, source in (("never trained", llama), ("head cut off", scorer)):
        folder = Path(shutil.copytree(source, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        (folder / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / "model.safetensors")
        weights.pop("score.weight", None)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputRefused, match="no weights for score.weight"):
            load_reward_model(str(folder), SETTINGS, dtype=torch.float32)


def hidden_states(path: Path, layers: int) -> torch.Tensor:
    """After the first ``layers`` layers and the final norm, of one sample, by Hugging Face alone."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path).eval()
    model.layers = model.layers[:layers]
    with torch.no_grad():
        return model(input_ids=ragged_tokens()[0][1][None]).last_hidden_state[0]


@pytest.mark.parametrize("layers", [None, 1])
def test_a_critic_from_a_reward_model_has_its_head(scorer: Path, layers: int | None) -> None:
    critic = load_critic(str(scorer), SETTINGS, num_layers=layers, dtype=torch.float32)
    stored = load_file(scorer / "model.safetensors")["score.weight"]
    assert torch.equal(critic.head.weight, stored) and not critic.head.bias.any()
    assert critic.head.bias.requires_grad and len(critic.backbone.layers) == (layers or 2)
    with torch.no_grad():
        found = critic.backbone(input_ids=ragged_tokens()[0][1][None]).last_hidden_state[0]
        assert torch.equal(found, hidden_states(scorer, layers or 2))


def test_a_critic_from_a_reward_model_in_another_format(scorer: Path, tmp_path: Path) -> None:
    """Also where its weights are no safetensors file."""
    folder = Path(shutil.copytree(scorer, tmp_path / "bin"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    critic = load_critic(str(folder), SETTINGS, num_layers=None, dtype=torch.float32)
    assert torch.equal(critic.head.weight, weights["score.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_a_critic_from_a_language_model_begins_at_0(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    critic = load_critic(str(path), SETTINGS, num_layers=2, dtype=torch.float32)
    assert not critic.head.weight.any() and not critic.head.bias.any()
    assert critic.head.weight.requires_grad and critic.head.bias.requires_grad
    with torch.no_grad():
        found = critic.backbone(input_ids=ragged_tokens()[0][1][None]).last_hidden_state[0]
        assert torch.equal(found, hidden_states(path, 2))
    with pytest.raises(InputRefused, match="critic.num_layers is 9"):
        load_critic(str(path), SETTINGS, num_layers=9, dtype=torch.float32)


def test_first_layers_keep_their_kinds(tmp_path: Path) -> None:
    """Gemma 2 takes turns between two kinds of attention; the shortened list must match the layers."""
    model = random_lm("Gemma2", num_hidden_layers=4, sliding_window=4, attn_logit_softcapping=None)
    model.save_pretrained(tmp_path)
    critic = load_critic(str(tmp_path), SETTINGS, num_layers=3, dtype=torch.float32)
    assert critic.backbone.config.layer_types == model.config.layer_types[:3]
    with torch.no_grad():
        found = critic.backbone(input_ids=ragged_tokens()[0][1][None]).last_hidden_state[0]
        torch.testing.assert_close(found, hidden_states(tmp_path, 3), rtol=0, atol=1e-6)


# -- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(lm: Any, file: Path, words: list[str]) -> None:
    """A Llama as llama.cpp stores it: its own names, query and key rows in pairs, float32."""
    import gguf

    config = lm.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if w.startswith("<") else 1 for w in words])
    writer.add_token_merges([f"{a} {b}" for a, b in (("a", "b"), ("c", "d"))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}  # fmt: skip
    for name, weight in lm.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, *part, _ = name.split(".")
            short = ".".join(part)
            if short.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if "q_proj" in short else config.num_key_value_heads
                weight = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{names[short]}.weight", weight.contiguous().numpy())
        else:
            writer.add_tensor(whole[name], weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    pytest.importorskip("gguf")
    lm = random_lm("Llama", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    words = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", *(f"x{i}" for i in range(33))]
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(lm, file, words)
    return file, lm


def test_a_gguf_file_becomes_a_folder_once(gguf_file: tuple[Path, Any], tmp_path: Path) -> None:
    file, expected = gguf_file
    made = tmp_path / "made"
    assert to_model_folder(str(file), made) == str(made)
    lm = load_causal_lm(str(made), SETTINGS, dtype=torch.float32)
    ids = ragged_tokens()[0][1][None]
    with torch.no_grad():
        torch.testing.assert_close(lm(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0, atol=1e-4)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(made)("abcd")["input_ids"][-2:] == [29, 30]
    written = (made / "config.json").stat().st_mtime_ns
    to_model_folder(str(file), made)
    assert (made / "config.json").stat().st_mtime_ns == written, "it isn't converted a second time"
    (made / "converted_from.json").unlink()
    to_model_folder(str(file), made)
    assert (made / "config.json").stat().st_mtime_ns > written, "a conversion that was cut short is made again"


def test_a_gguf_file_in_a_package(gguf_file: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, count in (("with_none", 0), ("with_one", 1), ("with_two", 2)):
        package = tmp_path / name
        (package / "inside").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('a package is not run')\n")
        for k in range(count):
            shutil.copy(gguf_file[0], package / "inside" / f"model{k}.gguf")
    assert to_model_folder("package:with_one", tmp_path / "made") == str(tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").exists()
    for name, message in (
        ("with_none", "ships 0 .gguf files"),
        ("with_two", "ships 2"),
        ("without", "no Python package"),
    ):
        with pytest.raises(InputRefused, match=message):
            to_model_folder(f"package:{name}", tmp_path / "other")
    assert "with_one" not in sys.modules
    with pytest.raises(InputRefused, match="there is no such file"):
        to_model_folder(str(tmp_path / "nothing.gguf"), tmp_path / "other")
    assert to_model_folder("some/name", tmp_path / "other") == "some/name"


def test_a_folder_needs_no_tokenizer_to_be_a_model(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "bare"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    bare, whole = (load_causal_lm(str(f), SETTINGS, dtype=torch.float32) for f in (folder, llama))
    assert torch.equal(bare.get_input_embeddings().weight, whole.get_input_embeddings().weight)
