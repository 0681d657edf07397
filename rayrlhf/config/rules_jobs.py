"""Rules across keys: sampling, critique and revision."""

from __future__ import annotations

from collections.abc import Iterator

from rayrlhf.config.jobs import CritiqueConfig, SamplingConfig
from rayrlhf.config.rulebook import Violation, rule

__all__: list[str] = []


@rule(of=(SamplingConfig,))
def _pair_has_two_responses(config: SamplingConfig) -> Iterator[Violation]:
    """`sampling.form: pairs` needs `rollout.samples_per_prompt` of at least 2."""
    if config.sampling.form == "pairs" and config.rollout.samples_per_prompt < 2:
        yield Violation(
            ("rollout.samples_per_prompt", "sampling.form"),
            f"found {config.rollout.samples_per_prompt}, but a pair (sampling.form pairs) is of two responses to a prompt;"
            " legal: at least 2, or the form best or all",
        )


@rule(of=(SamplingConfig,))
def _pairs_have_responses(config: SamplingConfig) -> Iterator[Violation]:
    """`sampling.pairs_per_prompt` above 1 needs `sampling.form: pairs`, and two responses a pair
    (`rollout.samples_per_prompt`)."""
    found, responses = config.sampling.pairs_per_prompt, config.rollout.samples_per_prompt
    if found > 1 and config.sampling.form != "pairs":
        yield Violation(
            ("sampling.pairs_per_prompt", "sampling.form"),
            f"found {found}, which is for pairs, but sampling.form is {config.sampling.form}; legal: 1, or the form pairs",
        )
    elif found > 1 and responses < 2 * found:
        yield Violation(
            ("sampling.pairs_per_prompt", "rollout.samples_per_prompt"),
            f"found {found}, for which {2 * found} responses to a prompt are needed (rollout.samples_per_prompt is"
            f" {responses}); legal: at most {max(1, responses // 2)}",
        )


@rule(of=(SamplingConfig,))
def _gap_is_of_pairs(config: SamplingConfig) -> Iterator[Violation]:
    """`sampling.least_gap` above 0 needs `sampling.form: pairs`."""
    if config.sampling.form != "pairs" and config.sampling.least_gap > 0:
        yield Violation(
            ("sampling.least_gap", "sampling.form"),
            f"found {config.sampling.least_gap:g}, which is for pairs, but sampling.form is {config.sampling.form}; legal:"
            " 0, or the form pairs",
        )


@rule(of=(SamplingConfig,))
def _scored_sample_fits(config: SamplingConfig) -> Iterator[Violation]:
    """`reward.tokens_per_micro_batch`, where a reward model scores samples, is at least `data.max_prompt_tokens` +
    `rollout.max_response_tokens`."""
    if all(source.model is None for source in config.reward.sources):
        return
    found, prompt, response = (
        config.reward.tokens_per_micro_batch,
        config.data.max_prompt_tokens,
        config.rollout.max_response_tokens,
    )
    if found < prompt + response:
        yield Violation(
            ("reward.tokens_per_micro_batch", "data.max_prompt_tokens", "rollout.max_response_tokens"),
            f"found {found}, but one sample may have {prompt + response} tokens (data.max_prompt_tokens {prompt} +"
            f" rollout.max_response_tokens {response}); legal: at least {prompt + response}",
        )


@rule(of=(SamplingConfig,))
def _sampling_engines_have_prompts(config: SamplingConfig) -> Iterator[Violation]:
    """`rollout.engines` is at most `sampling.prompts_at_once`, and at most `data.limit`, when sampling."""
    limits = {"sampling.prompts_at_once": config.sampling.prompts_at_once, "data.limit": config.data.limit}
    key, most = min(((k, v) for k, v in limits.items() if v is not None), key=lambda one: one[1])
    if config.rollout.engines > most:
        yield Violation(
            ("rollout.engines", key),
            f"found {config.rollout.engines}, more than the {most} prompts of {key}: some would have nothing to do; legal:"
            f" at most {most}",
        )


@rule(of=(CritiqueConfig,))
def _critique_engines_have_prompts(config: CritiqueConfig) -> Iterator[Violation]:
    """`rollout.engines` is at most `data.limit`, when criticising."""
    limit = config.data.limit
    if limit is not None and config.rollout.engines > limit:
        yield Violation(
            ("rollout.engines", "data.limit"),
            f"found {config.rollout.engines}, more than the {limit} prompts of data.limit: some would have nothing to do;"
            f" legal: at most {limit}",
        )


@rule(of=(CritiqueConfig,))
def _response_is_no_prompt(config: CritiqueConfig) -> Iterator[Violation]:
    """`data.response_column` isn't `data.prompt_column`."""
    if config.data.response_column == config.data.prompt_column:
        yield Violation(
            ("data.response_column", "data.prompt_column"),
            f"found {config.data.response_column!r}, which is the column of the prompts (data.prompt_column); legal:"
            " another column, or null: the model's own responses",
        )
