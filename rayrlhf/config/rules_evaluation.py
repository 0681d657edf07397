"""Rules across keys: models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rayrlhf.config.jobs import ComparedModel, ModelEvaluationConfig
from rayrlhf.config.rulebook import Violation, rule

__all__ = ["model_names"]

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OF = (ModelEvaluationConfig,)


def model_names(models: Sequence[ComparedModel]) -> list[str]:
    """The names of compared models: as given, or the last part of the path that isn't ``model``."""
    return [model.name or _last_part(model.path) for model in models]


def _last_part(path: str) -> str:
    parts = [part for part in path.removeprefix("package:").removesuffix(".gguf").split("/") if part not in ("", ".")]
    return next((part for part in reversed(parts) if part != "model"), path)


@rule(of=_OF)
def _unique_models(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """The names of `models` differ: they are columns of tables."""
    first: dict[str, int] = {}
    for index, name in enumerate(model_names(config.models)):
        if name in first:
            yield Violation(
                (f"models.{index}.name", f"models.{index}.path"),
                f"found {name!r}, the name of models.{first[name]} too (by default the last part of the path that isn't"
                f" model); legal: a name of its own, {name}_{index}, say",
            )
        first.setdefault(name, index)


@rule(of=_OF)
def _compared_path_is_model(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`path` of `models`, and `reference`, are folders, names or .gguf files, not other weight files."""
    paths = [(f"models.{i}.path", model.path) for i, model in enumerate(config.models)]
    for key, path in [*paths, ("reference", config.reference)]:
        if path is not None and path.endswith(_WEIGHT_FILES):
            folder = path.rpartition("/")[0] or "."
            yield Violation(
                (key,),
                f"found the weight file {path!r}; legal: the folder with config.json, the tokenizer and the weights"
                f" ({folder!r}?), a Hugging Face name, a .gguf file or package:NAME",
            )


@rule(of=_OF)
def _win_rate_has_two(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`judge` and `scores.tie` need two `models` or more: with one there is no win rate."""
    if len(config.models) > 1:
        return
    if config.judge is not None:
        yield Violation(
            ("judge", "models"),
            "found a judge, but with one model there is nothing to compare; legal: null, or two models",
        )
    if config.scores.tie > 0:
        yield Violation(
            ("scores.tie", "models"),
            f"found {config.scores.tie:g}, but with one model there is nothing to compare; legal: 0, or two models",
        )


@rule(of=_OF)
def _something_compares(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`scores.reward` or `judge` is given."""
    if config.scores.reward is None and config.judge is None:
        yield Violation(
            ("scores.reward", "judge"), "found null, and no judge; legal: what scores responses, or a judge, or both"
        )


@rule(of=_OF)
def _tie_is_of_rewards(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`scores.tie` needs `scores.reward`."""
    if config.scores.tie > 0 and config.scores.reward is None:
        yield Violation(
            ("scores.tie", "scores.reward"),
            f"found {config.scores.tie:g}, but there is no scores.reward whose differences it is about; legal: 0, or"
            " scores.reward",
        )


@rule(of=_OF)
def _judge_has_address(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`judge.url` begins with http:// or https://."""
    if config.judge is not None and not config.judge.url.startswith(("http://", "https://")):
        yield Violation(
            ("judge.url",), f"found {config.judge.url!r}; legal: an address that begins with http:// or https://"
        )


@rule(of=_OF)
def _templates_are_applied(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`data.system_prompt` and `chat_template` of `models` need `data.chat_template` `auto` or `always`."""
    if config.data.chat_template != "never":
        return
    given = [(f"models.{i}.chat_template", model.chat_template) for i, model in enumerate(config.models)]
    for key, found in [("data.system_prompt", config.data.system_prompt), *given]:
        if found is not None:
            yield Violation(
                (key, "data.chat_template"),
                f"found {found!r}, but with data.chat_template never no chat template is applied; legal: null, or"
                " data.chat_template auto or always",
            )


@rule("measure", "scores", of=_OF)
def _measuring_attention_runs(config: ModelEvaluationConfig, role: str) -> Iterator[Violation]:
    """`attention: flash_attention_2` of `measure` and `scores` needs `dtype: bfloat16` and `cluster.device: cuda`."""
    section = getattr(config, role)
    if section.attention != "flash_attention_2":
        return
    wrong = [f"{role}.dtype {section.dtype}"] if section.dtype != "bfloat16" else []
    wrong += [f"cluster.device {config.cluster.device}"] if config.cluster.device != "cuda" else []
    if wrong:
        yield Violation(
            (f"{role}.attention", f"{role}.dtype", "cluster.device"),
            f"found flash_attention_2 with {' and '.join(wrong)}; legal: sdpa or eager, or bfloat16 on cuda",
        )


@rule("measure", "scores", of=_OF)
def _measuring_varlen_has_a_kernel(config: ModelEvaluationConfig, role: str) -> Iterator[Violation]:
    """`attention: varlen` of `measure` and `scores` on `cluster.device: cuda` needs `dtype: bfloat16`."""
    section = getattr(config, role)
    if section.attention == "varlen" and config.cluster.device == "cuda" and section.dtype != "bfloat16":
        yield Violation(
            (f"{role}.attention", f"{role}.dtype", "cluster.device"),
            f"found varlen with {role}.dtype {section.dtype}, in which a GPU doesn't compute it; legal: sdpa or eager, or"
            " bfloat16",
        )


@rule(of=_OF)
def _measuring_packs_apart(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`measure.packing: true` needs the attention `sdpa`, `varlen` or `flash_attention_2`."""
    if config.measure.packing and config.measure.attention == "eager":
        yield Violation(
            ("measure.packing", "measure.attention"),
            "found true with measure.attention eager; legal: false, or the attention sdpa, varlen or flash_attention_2",
        )


@rule(of=_OF)
def _longest_response_is_measured(config: ModelEvaluationConfig) -> Iterator[Violation]:
    """`measure.tokens_per_micro_batch` is at least `data.max_prompt_tokens` + `rollout.max_response_tokens`."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.measure.tokens_per_micro_batch < longest:
        yield Violation(
            ("measure.tokens_per_micro_batch", "data.max_prompt_tokens", "rollout.max_response_tokens"),
            f"found {config.measure.tokens_per_micro_batch:,}, less than the longest sample (data.max_prompt_tokens +"
            f" rollout.max_response_tokens = {longest:,}); legal: at least {longest:,}",
        )
