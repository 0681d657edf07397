"""Rules across keys: reward sources, models, data, evaluation, and where roles run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rayrlhf.config.derive import uses_policy_as_reference
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.roots import EVERY, JOBS, TRAINED, AnyConfig, TrainedRoot
from rayrlhf.config.rulebook import Violation, rule
from rayrlhf.config.schema import Config, ScoreSource
from rayrlhf.config.trainers import ReferenceConfig

__all__ = ["source_name"]

DATA_FILES = (".jsonl", ".json", ".parquet", ".csv")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MODEL_ROLES = ("policy", "critic", "reference")


def source_name(source: ScoreSource) -> str:
    """A source's name in the metrics: as given, or the function's name, the model's last path component or the host."""
    if source.name or source.function:
        return source.name or (source.function or "").rpartition(":")[2]
    if source.model:
        return source.model.rstrip("/").rpartition("/")[2]
    return (source.url or "").partition("://")[2].partition("/")[0].replace(":", "_")


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# -- reward -----------------------------------------------------------------------------------------------------


SCORING = (Config, *JOBS)
_KINDS = ("function", "model", "url")


@rule(of=SCORING, sources=True)
def _one_kind_of_source(source: ScoreSource, key: str) -> Iterator[Violation]:
    """What scores (each of `reward.sources`, `reward.gold`, `scores.reward`, `scores.safety`, `scores.helpfulness`) has
    exactly one of `function`, `model` and `url`."""
    given = [(kind, getattr(source, kind)) for kind in _KINDS if getattr(source, kind) is not None]
    if not given:
        yield Violation((key,), "found neither function nor model nor url; legal: exactly one of them")
    if len(given) > 1:
        found = " and ".join(f"the {kind} {value}" for kind, value in given)
        yield Violation((key,), f"found {found}; legal: one of them (several sources add up)")


@rule(of=SCORING, sources=True)
def _service_settings_are_used(source: ScoreSource, key: str) -> Iterator[Violation]:
    """`token_env`, `timeout_s` and `retries` of what scores need a `url`, which begins with http:// or https://."""
    if source.url is not None and not source.url.startswith(("http://", "https://")):
        yield Violation(
            (f"{key}.url",), f"found {source.url!r}; legal: an address that begins with http:// or https://"
        )
    for name in ("token_env", "timeout_s", "retries"):
        found, default = getattr(source, name), ScoreSource.model_fields[name].default
        if source.url is None and found != default:
            yield Violation(
                (f"{key}.{name}", f"{key}.url"),
                f"found {found!r}, which is for a service, and there is no url; legal: leave it out, or a url",
            )


@rule(of=SCORING, sources=True)
def _function_is_import_path(source: ScoreSource, key: str) -> Iterator[Violation]:
    """`function` of what scores is `package.module:function`."""
    found = source.function
    if found is None:
        return
    module, colon, function = found.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        return
    module, _, function = found.rpartition(":") if colon else found.rpartition(".")
    guess = f"{module.removesuffix('.py').strip('./').replace('/', '.')}:{function}"
    fits = all(part.isidentifier() for part in [*guess.partition(":")[0].split("."), function]) and function != "py"
    yield Violation(
        (f"{key}.function",),
        f"found {found!r}; legal: package.module:function" + (f", so {guess}" if fits else ", as in my_rewards:score"),
    )


@rule(of=(Config, SamplingConfig))
def _unique_sources(config: Config | SamplingConfig) -> Iterator[Violation]:
    """The names of `reward.sources` differ, and none is `gold` where there is a `reward.gold`: they are names of metrics."""
    first: dict[str, int] = {}
    for index, source in enumerate(config.reward.sources):
        name = source_name(source)
        if name and name in first:
            yield Violation(
                (f"reward.sources.{index}.name", f"reward.sources.{index}.function", f"reward.sources.{index}.model"),
                f"found {name!r}, the name of reward.sources.{first[name]} too (by default the function's or the"
                " model's); legal: a name"
                f" of its own, {name}_{index}, say",
            )
        first.setdefault(name, index)
        if name == "gold" and getattr(config.reward, "gold", None) is not None:
            yield Violation(
                (f"reward.sources.{index}.name", f"reward.sources.{index}.function", f"reward.sources.{index}.model"),
                "found 'gold', which is the name of reward.gold in the metrics; legal: another name",
            )


@rule(of=(Config,))
def _length_penalty_applies(config: Config) -> Iterator[Violation]:
    """`reward.length_penalty_from` needs `reward.length_penalty`, and is less than `rollout.max_response_tokens`."""
    start, penalty, longest = (
        config.reward.length_penalty_from,
        config.reward.length_penalty,
        config.rollout.max_response_tokens,
    )
    if penalty == 0 and start > 0:
        yield Violation(
            ("reward.length_penalty_from", "reward.length_penalty"),
            f"found {start}, but reward.length_penalty is 0, so nothing is subtracted; legal: 0, or a"
            " reward.length_penalty above 0",
        )
    if penalty > 0 and start >= longest:
        yield Violation(
            ("reward.length_penalty_from", "rollout.max_response_tokens"),
            f"found {start}, but no response has more than {longest} tokens (rollout.max_response_tokens), so nothing"
            " is ever"
            f" subtracted; legal: at most {longest - 1}",
        )


# -- models -----------------------------------------------------------------------------------------------------


@rule(*_MODEL_ROLES, "reward", of=(*TRAINED, SamplingConfig))
def _flash_attention_runs(config: TrainedRoot | SamplingConfig, role: str) -> Iterator[Violation]:
    """`attention: flash_attention_2` needs `dtype: bfloat16` and `cluster.device: cuda`."""
    section = getattr(config, role)
    if getattr(section, "attention", None) != "flash_attention_2":
        return
    wrong = [f"{role}.dtype {section.dtype}"] if section.dtype != "bfloat16" else []
    wrong += [f"cluster.device {config.cluster.device}"] if config.cluster.device != "cuda" else []
    if wrong:
        yield Violation(
            (f"{role}.attention", f"{role}.dtype", "cluster.device"),
            f"found flash_attention_2 with {' and '.join(wrong)}; legal: sdpa or eager, or bfloat16 on cuda",
        )


@rule(*_MODEL_ROLES, "reward", of=(*TRAINED, SamplingConfig))
def _varlen_has_a_kernel(config: TrainedRoot | SamplingConfig, role: str) -> Iterator[Violation]:
    """`attention: varlen` on `cluster.device: cuda` needs `dtype: bfloat16`."""
    section = getattr(config, role)
    if getattr(section, "attention", None) != "varlen":
        return
    if config.cluster.device == "cuda" and section.dtype != "bfloat16":
        yield Violation(
            (f"{role}.attention", f"{role}.dtype", "cluster.device"),
            f"found varlen with {role}.dtype {section.dtype}, in which a GPU doesn't compute it; legal: sdpa or eager, or"
            " bfloat16",
        )


@rule("policy", "critic", of=TRAINED)
def _shared_rows_have_attention(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`sequence_parallel` above 1 needs the attention `sdpa`, `varlen` or `flash_attention_2`."""
    section = getattr(config, role)
    if section is not None and section.sequence_parallel > 1 and section.attention == "eager":
        yield Violation(
            (f"{role}.attention", f"{role}.sequence_parallel"),
            f"found eager with {role}.sequence_parallel {section.sequence_parallel}; legal: sdpa, varlen or"
            " flash_attention_2, or sequence_parallel 1",
        )


@rule(*_MODEL_ROLES, of=TRAINED)
def _packing_has_boundaries(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`packing: true` needs the attention `sdpa`, `varlen` or `flash_attention_2`."""
    section = getattr(config, role)
    if section is not None and section.packing and section.attention == "eager":
        yield Violation(
            (f"{role}.packing", f"{role}.attention"),
            f"found true with {role}.attention eager; legal: false, or the attention sdpa, varlen or flash_attention_2",
        )


@rule(of=(Config, PreferenceConfig))
def _shared_reference_has_policy_settings(config: Config | PreferenceConfig) -> Iterator[Violation]:
    """A `reference` that is the policy without its LoRA adapters leaves everything to the policy."""
    if not uses_policy_as_reference(config):
        return
    for name, info in ReferenceConfig.model_fields.items():
        found, default = getattr(config.reference, name), info.default
        if found != default:
            yield Violation(
                (f"reference.{name}", "policy.lora", "reference.path"),
                f"found {_yaml(found)}, which would never be used: with policy.lora and no reference.path the"
                " reference is the policy with"
                f" its adapters off; legal: {_yaml(default)} (leave it out), or a reference.path",
            )


@rule(*_MODEL_ROLES, of=(*TRAINED, SamplingConfig, CritiqueConfig))
def _path_is_model(config: AnyConfig, role: str) -> Iterator[Violation]:
    """`path` of a model is a folder, a name or a .gguf file, not another weight file."""
    section = getattr(config, role)
    if section is not None and section.path is not None and section.path.endswith(_WEIGHT_FILES):
        folder = section.path.rpartition("/")[0] or "."
        yield Violation(
            (f"{role}.path",),
            f"found the weight file {section.path!r}; legal: the folder with config.json, the tokenizer and the"
            f" weights ({folder!r}?),"
            " a Hugging Face name, a .gguf file or package:NAME",
        )


@rule("policy", "critic", of=TRAINED)
def _lr_falls(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`optimizer.min_lr_ratio` above 0 needs the schedule `linear` or `cosine`."""
    section = getattr(config, role)
    if section is not None and section.optimizer.schedule == "constant" and section.optimizer.min_lr_ratio > 0:
        yield Violation(
            (f"{role}.optimizer.min_lr_ratio", f"{role}.optimizer.schedule"),
            f"found {section.optimizer.min_lr_ratio:g} with {role}.optimizer.schedule constant, where the learning"
            " rate doesn't fall;"
            " legal: 0, or the schedule linear or cosine",
        )


# -- data and evaluation ----------------------------------------------------------------------------------------


@rule(of=(*TRAINED, SamplingConfig, CritiqueConfig))
def _template_for_system_prompt(config: TrainedRoot | SamplingConfig | CritiqueConfig) -> Iterator[Violation]:
    """`data.system_prompt` and `policy.chat_template` need `data.chat_template` `auto` or `always`."""
    if config.data.chat_template != "never":
        return
    for key, found in (
        ("data.system_prompt", config.data.system_prompt),
        ("policy.chat_template", config.policy.chat_template),
    ):
        if found is not None:
            yield Violation(
                (key, "data.chat_template"),
                f"found {found!r}, but with data.chat_template never no chat template is applied; legal: null, or"
                " data.chat_template"
                " auto or always",
            )


@rule(of=(Config, *JOBS))
def _files_have_no_splits(
    config: Config | SamplingConfig | CritiqueConfig | ModelEvaluationConfig,
) -> Iterator[Violation]:
    """`data.split` and `data.subset` are for Hugging Face datasets: files have neither."""
    paths = [path for path in (config.data.prompts, getattr(config.data, "eval_prompts", None)) if path is not None]
    if not all(path.endswith(DATA_FILES) for path in paths):
        return
    if config.data.split != "train":
        yield Violation(
            ("data.split", "data.prompts"),
            f"found {config.data.split!r}, but {config.data.prompts} is a file and has no splits; legal: leave it out",
        )
    if config.data.subset is not None:
        yield Violation(
            ("data.subset", "data.prompts"),
            f"found {config.data.subset!r}, but {config.data.prompts} is a file and has no subsets; legal: null",
        )


@rule(of=(Config,))
def _prompts_are_left(config: Config) -> Iterator[Violation]:
    """`data.limit` is more than `evaluation.prompts`, where those are taken out of `data.prompts`."""
    limit, held_out = config.data.limit, config.evaluation.prompts
    if limit is not None and config.data.eval_prompts is None and limit <= held_out:
        yield Violation(
            ("data.limit", "evaluation.prompts"),
            f"found {limit}, of which evaluation.prompts {held_out} are held out, so none is left to train on; legal:"
            " at least"
            f" {held_out + 1}, or data.eval_prompts",
        )


@rule(of=(Config,))
def _evaluation_has_prompts(config: Config) -> Iterator[Violation]:
    """`evaluation.every_steps` and `data.eval_prompts` need `evaluation.prompts` above 0."""
    if config.evaluation.prompts > 0:
        return
    if config.evaluation.every_steps > 0:
        yield Violation(
            ("evaluation.every_steps", "evaluation.prompts"),
            f"found {config.evaluation.every_steps}, but evaluation.prompts is 0, so nothing is evaluated; legal: 0, or"
            " evaluation.prompts above 0",
        )
    if config.data.eval_prompts is not None:
        yield Violation(
            ("data.eval_prompts", "evaluation.prompts"),
            f"found {config.data.eval_prompts!r}, but evaluation.prompts is 0, so nothing is evaluated; legal: null, or"
            " evaluation.prompts above 0",
        )


# -- where it runs ----------------------------------------------------------------------------------------------


@rule("policy", "critic", "reference", "reward", "rollout", "scores", "measure", of=EVERY)
def _inline_is_one_process(config: AnyConfig, role: str) -> Iterator[Violation]:
    """`cluster.executor: inline` needs all `ranks` and `rollout.engines` to be 1."""
    section = getattr(config, role)
    name = "engines" if role == "rollout" else "ranks"
    if config.cluster.executor == "inline" and section is not None and getattr(section, name, 1) > 1:
        yield Violation(
            (f"{role}.{name}", "cluster.executor"),
            f"found {getattr(section, name)}, but cluster.executor inline runs every role in the driver's one process;"
            " legal: 1, or the"
            " executor ray",
        )


@rule(of=EVERY)
def _inline_has_no_ray(config: AnyConfig) -> Iterator[Violation]:
    """`cluster.address` needs `cluster.executor: ray`."""
    if config.cluster.executor == "inline" and config.cluster.address is not None:
        yield Violation(
            ("cluster.address", "cluster.executor"),
            f"found {config.cluster.address!r}, but cluster.executor inline uses no Ray; legal: null, or the executor"
            " ray",
        )


@rule(of=(Config, PreferenceConfig, *JOBS))
def _cache_is_vllms(config: Any) -> Iterator[Violation]:
    """`rollout.kv_cache_gib` needs `rollout.engine: vllm`."""
    if config.rollout.engine != "vllm" and config.rollout.kv_cache_gib is not None:
        yield Violation(
            ("rollout.kv_cache_gib", "rollout.engine"),
            f"found {config.rollout.kv_cache_gib:g}, but rollout.engine {config.rollout.engine} has no cache of a"
            " fixed size; legal: null,"
            " or the engine vllm",
        )


@rule(of=TRAINED)
def _stopping_rules_apply(config: TrainedRoot) -> Iterator[Violation]:
    """No rule stands in both `health.ignore` and `health.stop_on`."""
    both = [name for name in config.health.stop_on if name in list(config.health.ignore)]
    if both:
        yield Violation(
            ("health.stop_on", "health.ignore"),
            f"found {', '.join(both)}, which health.ignore leaves out; legal: in one of the two",
        )
