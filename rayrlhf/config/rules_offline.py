"""Rules across keys: training on a fixed set of examples."""

from __future__ import annotations

from collections.abc import Iterator

from rayrlhf.config.derive import data_ranks, longest_of, ranks_in_words, takes, uses_policy_as_reference
from rayrlhf.config.offline import ExamplesConfig, ExampleSource, RewardModelConfig
from rayrlhf.config.roots import OFFLINE, OfflineConfig
from rayrlhf.config.rulebook import Violation, rule
from rayrlhf.config.rules_roles import DATA_FILES

_COLUMNS = {
    "prompt_column": ("examples", "pairs", "labelled"),
    "completion_column": ("examples", "labelled"),
    "messages_column": ("examples",),
    "chosen_column": ("pairs",),
    "rejected_column": ("pairs",),
    "margin_column": ("pairs",),
    "label_column": ("labelled",),
}
"""The kinds of data in which each column is read."""


def _held_out(config: OfflineConfig) -> bool:
    return config.data.validation is not None or config.data.validation_fraction > 0


def _sources(config: OfflineConfig) -> Iterator[tuple[str, ExampleSource]]:
    """The sources that have sections of their own, by their keys."""
    for name in ("train", "validation"):
        named = getattr(config.data, name)
        for index in range(len(named) if named is not None and not isinstance(named, str) else 0):
            yield f"data.{name}.{index}", named[index]


# -- lengths and batches ----------------------------------------------------------------------------------------


@rule("policy", "reference", of=OFFLINE)
def _longest_example_fits(config: OfflineConfig, role: str) -> Iterator[Violation]:
    """`tokens_per_micro_batch` holds the longest example: `data.max_tokens`; twice of it for the policy's pairs; for
    `kto`, and for responses that are sampled for the KL, what a prompt and a response can have together."""
    section = getattr(config, role)
    if section is None or (role == "reference" and config.algorithm == "dpo" and uses_policy_as_reference(config)):
        return
    longest, how = longest_of(config, role)
    if section.tokens_per_micro_batch < longest:
        yield Violation(
            (f"{role}.tokens_per_micro_batch", "data.max_tokens", "data.max_prompt_tokens"),
            f"found {section.tokens_per_micro_batch}, but there may be {longest} tokens that stay together ({how});"
            f" legal: at least {longest}",
        )


@rule(of=OFFLINE)
def _prompt_leaves_room(config: OfflineConfig) -> Iterator[Violation]:
    """`data.max_prompt_tokens` is less than `data.max_tokens`: something is left for the response."""
    found, longest = config.data.max_prompt_tokens, config.data.max_tokens
    if found >= longest:
        yield Violation(
            ("data.max_prompt_tokens", "data.max_tokens"),
            f"found {found}, which leaves no room for a response within data.max_tokens {longest}; legal: less than"
            f" {longest}",
        )


@rule(of=OFFLINE)
def _batch_fills_ranks(config: OfflineConfig) -> Iterator[Violation]:
    """`training.batch_examples` is at least `policy.ranks`, of which those count once that share their samples
    (`sequence_parallel`, `tensor_parallel`): each rank trains on something."""
    found, ranks = config.training.batch_examples, data_ranks(config.policy)
    given = ranks_in_words(config.policy, "policy")
    if found < ranks:
        yield Violation(
            ("training.batch_examples", "policy.ranks"),
            f"found {found}, fewer than {given}: some ranks would have nothing to train on; legal: at least {ranks}",
        )


@rule(of=OFFLINE)
def _warmup_ends_before_last_step(config: OfflineConfig) -> Iterator[Violation]:
    """`policy.optimizer.warmup_steps` is less than `training.max_steps`."""
    found, last = config.policy.optimizer.warmup_steps, config.training.max_steps
    if last is not None and found > 0 and found >= last:
        yield Violation(
            ("policy.optimizer.warmup_steps", "training.max_steps"),
            f"found {found}, but the run has at most {last} optimizer steps (training.max_steps), so the full learning"
            f" rate would never be reached; legal: at most {last - 1}",
        )


@rule(of=(RewardModelConfig,))
def _reward_model_is_merged(config: RewardModelConfig) -> Iterator[Violation]:
    """A reward model is saved whole: `policy.lora.save` is `merged`."""
    if config.policy.lora is not None and config.policy.lora.save != "merged":
        yield Violation(
            ("policy.lora.save", "algorithm"),
            f"found {config.policy.lora.save}, but a reward model is saved with its head, as one model; legal: merged",
        )


# -- data -------------------------------------------------------------------------------------------------------


@rule(of=OFFLINE)
def _fraction_is_used(config: OfflineConfig) -> Iterator[Violation]:
    """`data.validation_fraction` is for runs without `data.validation`."""
    default = ExamplesConfig.model_fields["validation_fraction"].default
    found = config.data.validation_fraction
    if config.data.validation is not None and found != default:
        yield Violation(
            ("data.validation_fraction", "data.validation"),
            f"found {found:g}, but with data.validation nothing is taken out of data.train; legal: leave it out, or"
            " data.validation: null",
        )


@rule(of=OFFLINE)
def _example_files_have_no_splits(config: OfflineConfig) -> Iterator[Violation]:
    """`split` and `subset` of a source of examples are for Hugging Face datasets: files have neither."""
    for key, source in _sources(config):
        if not source.path.endswith(DATA_FILES):
            continue
        for name, off, shown in (("split", "train", "leave it out"), ("subset", None, "null")):
            found = getattr(source, name)
            if found != off:
                yield Violation(
                    (f"{key}.{name}", f"{key}.path"),
                    f"found {found!r}, but {source.path} is a file and has no {name}s; legal: {shown}",
                )


@rule(of=OFFLINE)
def _columns_are_read(config: OfflineConfig) -> Iterator[Violation]:
    """Of a source's columns, only those may be named that the algorithm reads."""
    kind = takes(config)
    for key, source in _sources(config):
        for name, readers in _COLUMNS.items():
            found, default = getattr(source, name), ExampleSource.model_fields[name].default
            if found != default and kind not in readers:
                legal = ", ".join(column for column, readers in _COLUMNS.items() if kind in readers)
                yield Violation(
                    (f"{key}.{name}", "algorithm", "dpo.loss"),
                    f"found {found!r}, a column that this algorithm never reads: it takes {kind}; legal: leave it out"
                    f" (read are {legal})",
                )


@rule(of=OFFLINE)
def _mixture_has_several(config: OfflineConfig) -> Iterator[Violation]:
    """`weight` is for mixtures of several sources: it is relative to the others'."""
    for name in ("train", "validation"):
        named = getattr(config.data, name)
        if named is not None and not isinstance(named, str) and len(named) == 1 and named[0].weight != 1:
            yield Violation(
                (f"data.{name}.0.weight",),
                f"found {named[0].weight:g}, which is relative to other sources' weights, but there is no other; legal:"
                " 1 (leave it out)",
            )


# -- validation -------------------------------------------------------------------------------------------------


@rule(of=OFFLINE)
def _validation_has_examples(config: OfflineConfig) -> Iterator[Violation]:
    """`training.keep_best`, `training.patience` and `training.validate_every_steps`, and `reward_model.normalize` and
    `reward_model.failures_shown`, need held-out examples."""
    if _held_out(config):
        return
    training = config.training
    found = [
        ("training.keep_best", "true" if training.keep_best else None, "false"),
        ("training.patience", training.patience, "null"),
        ("training.validate_every_steps", training.validate_every_steps or None, "0"),
    ]
    if config.algorithm == "reward_model":
        found.append(("reward_model.normalize", "true" if config.reward_model.normalize else None, "false"))
        found.append(("reward_model.failures_shown", config.reward_model.failures_shown or None, "0"))
    for key, value, off in found:
        if value is not None:
            yield Violation(
                (key, "data.validation_fraction", "data.validation"),
                f"found {value}, but no examples are held out (data.validation null, data.validation_fraction 0);"
                f" legal: {off}, or held-out examples",
            )
