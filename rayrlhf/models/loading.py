"""Hugging Face models as the roles need them: policy, critic, reference, reward model."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from rayrlhf.batch import Batch
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.cpu import with_cpu_kernels
from rayrlhf.models.heads import HEADS, ScalarModel, check_one_label, hidden_states, linear_head, output_logits
from rayrlhf.models.layout import PromptSharing, pair_micro_batches
from rayrlhf.models.packing import packs
from rayrlhf.models.varlen import VARLEN
from rayrlhf.models.zero import Partitioner, callable_in_parts, whole

__all__ = [
    "check_output_head",
    "is_reward_model",
    "load_causal_lm",
    "load_config",
    "load_critic",
    "load_reward_model",
    "model_config",
    "prompt_sharing",
    "quiet_loading",
    "scorer_class",
    "to_model_folder",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SCORE_SHIFT = "rayrlhf_score"
"""Key of a reward model's configuration, {"shift": number}: what is added to its scores where its head has no bias."""

CHANCE = ("drop", "jitter")
"""What the rates are called with which models draw random numbers in training: dropout, layer drop, router jitter."""


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep progress bars and notes of transformers away from the user's terminal.

    What they would warn of, weights that are missing, is an error here (`_refuse_missing`).
    """
    from transformers.utils import logging as hf_logging

    was_on, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if was_on:
            hf_logging.enable_progress_bar()


def _refuse_missing(path: str, found: dict[str, Any]) -> None:
    """A weight that isn't in the folder would be made up at random."""
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:5])
        raise InputRefused(f"model {path!r} can't be used: it has no weights for {missing}")


# -- where a model lies ---------------------------------------------------------------------------------------------


def to_model_folder(path: str, made_folder: Path) -> str:
    """The folder or hub name that ``path`` stands for; a GGUF file is turned into ``made_folder`` once.

    Args:
        path: a folder or hub name (returned as it is), a ``.gguf`` file, or ``package:NAME`` for an installed Python
            package that ships exactly one ``.gguf`` file.
        made_folder: where the Hugging Face folder is made from a GGUF file: its weights are dequantised to float32.

    Raises:
        InputRefused: where there is no such file or package.
    """
    if path.startswith("package:"):
        gguf = _gguf_in_package(path.removeprefix("package:"))
    elif path.endswith(".gguf"):
        gguf = Path(path)
        if not gguf.is_file():
            raise InputRefused(f"{path}: there is no such file")
    else:
        return path
    done = made_folder / "converted_from.json"
    origin = {"file": gguf.name, "bytes": gguf.stat().st_size}
    if done.exists() and json.loads(done.read_text()) == origin:
        return str(made_folder)
    _convert_gguf(gguf, made_folder)
    done.write_text(json.dumps(origin) + "\n")
    return str(made_folder)


def _gguf_in_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputRefused(f"package:{name}: no Python package {name!r} is installed")
    found = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))
    if len(found) != 1:
        raise InputRefused(f"package:{name}: the package ships {len(found)} .gguf files, exactly one is needed")
    return found[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import GgufConfig

    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.config._name_or_path = gguf.stem
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# -- loading --------------------------------------------------------------------------------------------------------


def load_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration with every dropout (and its like) at 0: what a role computes must not depend on chance.

    Raises:
        InputRefused: where there is no model at ``path``.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputRefused(f"{path}: this folder has no config.json, so it is no Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        what = "there is no such folder" if looks_local and not folder.exists() else _first_line(error)
        raise InputRefused(f"model {path!r} can't be read: {what}") from error
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key, value in vars(part).items() if part is not None else ():
            if any(word in key for word in CHANCE) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _read(kind: Any, path: str, config: Any, model: ModelConfig, dtype: torch.dtype, zero: Partitioner | None) -> Any:
    """What ``kind.from_pretrained`` reads, without dropout; with ``zero`` all but scalar heads in parts."""
    with quiet_loading(), nullcontext() if zero is None else zero.reading(HEADS):
        loaded, found = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    _refuse_missing(path, found)
    if zero is not None:
        zero.finish(loaded if kind is AutoModelForCausalLM else loaded.base_model)
    return without_dropout(loaded)


def load_causal_lm(path: str, model: ModelConfig, *, dtype: torch.dtype, zero: Partitioner | None = None) -> Any:
    """A causal language model on the CPU, without dropout.

    Args:
        path: folder or hub name.
        model: how it is run.
        dtype: of its weights.
        zero: spreads them over the ranks while they are read; all ranks read together, and ``dtype`` is the partitioner's.
            None: this process holds the whole model.

    Raises:
        InputRefused: where weights are missing, or samples shall be packed which the model wouldn't keep apart.
    """
    config = model_config(path, model)
    lm = _read(AutoModelForCausalLM, path, config, model, dtype, zero)
    with callable_in_parts(lm):
        _refuse_leaks(path, lm.base_model, model)
        return with_cpu_kernels(lm)


def model_config(path: str, model: ModelConfig, num_layers: int | None = None) -> Any:
    """A model's configuration as it is read with; with ``num_layers`` of its first layers alone.

    Raises:
        InputRefused: where there is no model at ``path``, or it can't be run as ``model`` says.
    """
    config = load_config(path, trust_remote_code=model.trust_remote_code)
    _refuse_lost_softcap(path, config, model)
    if num_layers is not None:
        shorten(config, num_layers, path)
    return config


def _refuse_lost_softcap(path: str, config: Any, model: ModelConfig) -> None:
    """torch's attention knows no soft cap of attention logits (Gemma 2), and leaves it out in silence."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and model.attention in ("sdpa", VARLEN):
        raise InputRefused(
            f"model {path!r} caps its attention logits at {cap:g}, which the attention {model.attention} leaves out; set "
            "attention to eager or flash_attention_2, or attn_logit_softcapping to null in the model's config.json"
        )


def without_dropout(model: Any) -> Any:
    """Set every dropout layer's rate to 0, so that ``train()``, which checkpointing needs, changes no result."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _attention_of_this_device(model: Any) -> Iterator[None]:
    """Within it a model can be tried where it lies: on a CPU torch's attention stands in for flash attention."""
    name = model.config._attn_implementation
    if not name.startswith("flash") or _device(model).type != "cpu":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def check_output_head(lm: Any) -> None:
    """Refuse a model whose logits aren't its output layer's over the last hidden states, scaled in a known way.

    Raises:
        InputRefused: naming the model's class.
    """
    ids = (torch.arange(1, 5)[None] % lm.config.get_text_config().vocab_size).to(_device(lm))
    with torch.no_grad(), callable_in_parts(lm), _attention_of_this_device(lm):
        expected = lm(input_ids=ids, use_cache=False).logits[0].float()
        hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        with whole(lm.get_output_embeddings().parameters()):
            found = output_logits(lm, hidden).float()
    # Nearly the same operations: a cap far above these logits must still be seen.
    tolerance = 1e-3 if lm.dtype == torch.float32 else 2e-2
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise InputRefused(
            f"{type(lm).__name__} computes its logits in a way that isn't known here; "
            "its log-probabilities would be wrong"
        )


def _refuse_leaks(path: str, backbone: Any, model: ModelConfig) -> None:
    """Refuse to pack samples for a model that looks across their boundary: recurrent ones do, and some attention.

    Flash attention runs on a GPU only, and isn't tried here.
    """
    if not packs(model) or model.attention.startswith("flash"):
        return
    ids = (torch.arange(1, 9)[None] % backbone.config.get_text_config().vocab_size).to(_device(backbone))
    positions = torch.arange(4, device=ids.device).repeat(2)[None]
    with torch.no_grad():
        packed = backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, 4:].float()
        alone = backbone(input_ids=ids[:, 4:], use_cache=False).last_hidden_state[0].float()
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not torch.allclose(packed, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        raise InputRefused(
            f"model {path!r} ({type(backbone).__name__}) doesn't keep samples apart that are packed into one row; "
            "set packing to false"
        )


def prompt_sharing(backbone: Any, model: ModelConfig) -> PromptSharing | None:
    """How the two responses of a pair may share their prompt's computation in this model; None: they may not.

    They may where attention takes a mask (flash attention takes none, packed rows have one of their own), and a trial shows
    that the second response doesn't feel the first one: in a recurrent model, say, it does.
    """
    if packs(model) or model.attention.startswith("flash"):
        return None
    text = backbone.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = min([w for w in windows if w], default=2**62)
    sharing = PromptSharing(longest, text.hidden_size)
    tokens = torch.tensor([1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8]) % text.vocab_size
    trial = Batch(torch.tensor([0, 6, 11]), {"tokens": tokens}, {"prompt_length": torch.tensor([3, 3])})
    (shared,) = pair_micro_batches(trial, 11, sharing=PromptSharing(6, 2**20), mask=None)
    (apart,) = pair_micro_batches(trial, 12, mask=None)
    # With the masks, which every device can take; the grid that a CPU may have instead has a trial of its own.
    shared, apart = (replace(part, grid=None).to(_device(backbone)) for part in (shared, apart))
    with torch.no_grad(), callable_in_parts(backbone):
        try:
            found = hidden_states(backbone, shared, shared.last).float()
        except (TypeError, ValueError, RuntimeError, IndexError):  # a model whose attention takes no such mask
            return None
        expected = hidden_states(backbone, apart, apart.last).float()
    tolerance = 1e-4 if backbone.dtype == torch.float32 else 5e-2
    scale = float(expected.abs().max())
    return sharing if torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale) else None


def _backbone(
    path: str, model: ModelConfig, dtype: torch.dtype, num_layers: int | None, zero: Partitioner | None
) -> Any:
    backbone = _read(AutoModel, path, model_config(path, model, num_layers), model, dtype, zero)
    with callable_in_parts(backbone):
        _refuse_leaks(path, backbone, model)
        return with_cpu_kernels(backbone)


def shorten(config: PretrainedConfig, num_layers: int, path: str) -> None:
    """Keep the first layers only, in the configuration."""
    text = config.get_text_config()
    if num_layers > text.num_hidden_layers:
        raise InputRefused(f"critic.num_layers is {num_layers}, but {path} has {text.num_hidden_layers} layers")
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]


def load_critic(
    path: str, model: ModelConfig, *, num_layers: int | None, dtype: torch.dtype, zero: Partitioner | None = None
) -> ScalarModel:
    """A value model from any causal LM or reward model; ``zero`` as in `load_causal_lm`, but the head stays whole.

    The head is the reward model's, where it is one; else 0, so that every value begins at 0. Hidden states can be large, and
    a random head over them would drown the first advantages in noise.
    """
    scorer = None
    if is_reward_model(load_config(path, trust_remote_code=model.trust_remote_code)):
        scorer = load_reward_model(path, model, dtype=dtype, num_layers=num_layers, zero=zero)
    backbone: Any = scorer.backbone if scorer is not None else _backbone(path, model, dtype, num_layers, zero)
    size = backbone.config.get_text_config().hidden_size
    head = nn.Linear(size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if scorer is not None:
        with torch.no_grad():
            head.weight.copy_(scorer.head.weight)
            if scorer.head.bias is not None:
                head.bias.copy_(scorer.head.bias)
    return ScalarModel(backbone, head.to(dtype))


def is_reward_model(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a sequence-classification model with one label."""
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return classifies and config.num_labels == 1


def load_reward_model(
    path: str,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    num_layers: int | None = None,
    zero: Partitioner | None = None,
) -> ScalarModel:
    """A sequence-classification model with one label, read at the last real token; ``zero`` as in `load_critic`.

    Raises:
        InputRefused: where the model has no scalar head, or weights are missing.
    """
    from transformers import AutoModelForSequenceClassification

    config = model_config(path, model, num_layers)
    check_one_label(path, config)
    classifier = _read(AutoModelForSequenceClassification, path, config, model, dtype, zero)
    backbone = classifier.base_model
    with callable_in_parts(backbone):
        _refuse_bidirectional(path, backbone)
        _refuse_leaks(path, backbone, model)
    head = linear_head(path, classifier)
    shift = (getattr(config, SCORE_SHIFT, None) or {}).get("shift", 0.0)
    with callable_in_parts(backbone):
        return ScalarModel(with_cpu_kernels(backbone), _shifted(head, shift))


@torch.no_grad()
def _refuse_bidirectional(path: str, backbone: Any) -> None:
    """A model in which a token sees later ones (BERT, say) would see padding too, and has a pooler before its head."""
    ids = (torch.arange(1, 7) % backbone.config.get_text_config().vocab_size)[None].to(_device(backbone))
    was_training = backbone.training
    backbone.eval()
    with _attention_of_this_device(backbone):
        whole = backbone(input_ids=ids).last_hidden_state[0, :4].float()
        part = backbone(input_ids=ids[:, :4]).last_hidden_state[0].float()
    backbone.train(was_training)
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not torch.allclose(whole, part, rtol=tolerance, atol=tolerance * float(part.abs().max())):
        raise InputRefused(
            f"reward model {path!r} ({type(backbone).__name__}) lets a token see those behind it; a reward model is read at "
            "its last token, so only causal ones can be used"
        )


def _shifted(head: nn.Linear, shift: float) -> nn.Linear:
    """The head with a number added to what it reads."""
    if not shift:
        return head
    shifted = nn.Linear(head.in_features, 1, dtype=head.weight.dtype)
    with torch.no_grad():
        shifted.weight.copy_(head.weight)
        shifted.bias.copy_(torch.full((1,), shift) + (0.0 if head.bias is None else head.bias.float()))
    return shifted


def scorer_class(config: PretrainedConfig, path: str) -> tuple[type, str, str, bool]:
    """How a family writes a reward model down.

    Returns:
        Its sequence-classification class; in it the names of backbone and head; whether the head has a bias.

    Raises:
        InputRefused: where the family has none with a linear head.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with torch.device("meta"), quiet_loading():
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise InputRefused(f"model {path!r} can't become a reward model: {_first_line(error)}") from error
    name = next((n for n in HEADS if isinstance(getattr(classifier, n, None), nn.Linear)), None)
    if name is None:
        raise InputRefused(
            f"model {path!r} can't become a reward model: {type(classifier).__name__} has no linear head"
        )
    return type(classifier), classifier.base_model_prefix, name, getattr(classifier, name).bias is not None
