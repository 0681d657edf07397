"""Rules across keys: the arithmetic of batches, and the algorithm."""

from __future__ import annotations

from collections.abc import Iterator

from rayrlhf.config.derive import data_ranks, derive, ranks_in_words, uses_policy_as_reference
from rayrlhf.config.rulebook import Violation, rule
from rayrlhf.config.schema import Config

PPO = (Config,)

# -- batches ----------------------------------------------------------------------------------------------------


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = sorted({d for k in range(1, int(number**0.5) + 1) if number % k == 0 for d in (k, number // k)})
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    return " and ".join(str(d) for d in below + above)


@rule(of=PPO)
def _minibatch_divides(config: Config) -> Iterator[Violation]:
    """`ppo.minibatch_samples` divides `ppo.prompts_per_step` * `rollout.samples_per_prompt`."""
    found, prompts, each = config.ppo.minibatch_samples, config.ppo.prompts_per_step, config.rollout.samples_per_prompt
    if (prompts * each) % found:
        yield Violation(
            ("ppo.minibatch_samples", "ppo.prompts_per_step", "rollout.samples_per_prompt"),
            f"found {found}, which doesn't divide the {prompts * each} samples of a step (ppo.prompts_per_step"
            f" {prompts} x"
            f" rollout.samples_per_prompt {each}); legal: a divisor, the nearest:"
            f" {_nearest_divisors(prompts * each, found)}",
        )


@rule("policy", "critic", of=PPO)
def _minibatch_fills_ranks(config: Config, role: str) -> Iterator[Violation]:
    """`ppo.minibatch_samples` is at least `policy.ranks` and `critic.ranks`, of which those count once that share their samples
    (`sequence_parallel`, `tensor_parallel`): each rank trains on something."""
    section, found = getattr(config, role), config.ppo.minibatch_samples
    if section is not None and found < data_ranks(section):
        yield Violation(
            ("ppo.minibatch_samples", f"{role}.ranks"),
            f"found {found}, fewer than {ranks_in_words(section, role)}: some ranks would have nothing to train on; legal:"
            f" at least {data_ranks(section)}",
        )


@rule("reference", "reward", "rollout", of=PPO)
def _samples_fill_ranks(config: Config, role: str) -> Iterator[Violation]:
    """`reference.ranks`, `reward.ranks` and `rollout.engines` are at most the samples of a step."""
    section = getattr(config, role)
    name = "engines" if role == "rollout" else "ranks"
    if section is None:
        return
    found, samples = getattr(section, name), config.ppo.prompts_per_step * config.rollout.samples_per_prompt
    if found > samples:
        yield Violation(
            (f"{role}.{name}", "ppo.prompts_per_step"),
            f"found {found}, more than the {samples} samples of a step: some would have nothing to do; legal: at most"
            f" {samples}",
        )


@rule("policy", "critic", "reference", "reward", of=PPO)
def _longest_sample_fits(config: Config, role: str) -> Iterator[Violation]:
    """`tokens_per_micro_batch` of each role is at least `data.max_prompt_tokens` + `rollout.max_response_tokens`."""
    section = getattr(config, role)
    if section is None or (role == "reward" and all(source.model is None for source in section.sources)):
        return
    if role == "reference" and uses_policy_as_reference(config):
        return
    prompt, response, found = (
        config.data.max_prompt_tokens,
        config.rollout.max_response_tokens,
        section.tokens_per_micro_batch,
    )
    if found < prompt + response:
        yield Violation(
            (f"{role}.tokens_per_micro_batch", "data.max_prompt_tokens", "rollout.max_response_tokens"),
            f"found {found}, but one sample may have {prompt + response} tokens (data.max_prompt_tokens {prompt} +"
            f" rollout.max_response_tokens {response}); legal: at least {prompt + response}",
        )


@rule("policy", "critic", of=PPO)
def _warmup_ends(config: Config, role: str) -> Iterator[Violation]:
    """`optimizer.warmup_steps` is less than the optimizer steps of the run."""
    section = getattr(config, role)
    if section is None or section.optimizer.warmup_steps == 0:
        return
    found, total = section.optimizer.warmup_steps, derive(config).total_optimizer_steps
    if total and found >= total:
        yield Violation(
            (f"{role}.optimizer.warmup_steps", "ppo.steps"),
            f"found {found}, but the run has {total} optimizer steps (ppo.steps x minibatches x ppo.ppo_epochs), so"
            " the full"
            f" learning rate would never be reached; legal: at most {total - 1}",
        )


# -- the algorithm ----------------------------------------------------------------------------------------------


@rule(of=PPO)
def _gae_has_critic(config: Config) -> Iterator[Violation]:
    """The estimator `gae` needs a `critic`."""
    if config.ppo.advantage_estimator == "gae" and config.critic is None:
        yield Violation(
            ("critic", "ppo.advantage_estimator"),
            "found null, but ppo.advantage_estimator gae needs a critic; legal: a section ({} for its defaults), or"
            " the estimator"
            " rloo or grpo",
        )


@rule(of=PPO)
def _groups_have_no_critic(config: Config) -> Iterator[Violation]:
    """The estimators `rloo` and `grpo` need `critic: null`: they would never use it."""
    estimator = config.ppo.advantage_estimator
    if estimator != "gae" and config.critic is not None:
        yield Violation(
            ("critic", "ppo.advantage_estimator"),
            f"found a critic, by default or given, which ppo.advantage_estimator {estimator} would never use; legal:"
            " critic: null",
        )


@rule(of=PPO)
def _groups_have_members(config: Config) -> Iterator[Violation]:
    """The estimators `rloo` and `grpo` need `rollout.samples_per_prompt` of at least 2: they compare a prompt's
    samples."""
    estimator, found = config.ppo.advantage_estimator, config.rollout.samples_per_prompt
    if estimator != "gae" and found < 2:
        yield Violation(
            ("rollout.samples_per_prompt", "ppo.advantage_estimator"),
            f"found {found}, but ppo.advantage_estimator {estimator} compares the samples of a prompt; legal: at least"
            " 2",
        )


@rule(of=PPO)
def _groups_have_no_discount(config: Config) -> Iterator[Violation]:
    """The estimators `rloo` and `grpo` need `ppo.gamma` 1: they weigh whole responses."""
    if config.ppo.advantage_estimator != "gae" and config.ppo.gamma != 1:
        yield Violation(
            ("ppo.gamma", "ppo.advantage_estimator"),
            f"found {config.ppo.gamma:g}, but ppo.advantage_estimator {config.ppo.advantage_estimator} weighs whole"
            " responses, without"
            " a discount for each token; legal: 1",
        )


@rule(of=PPO)
def _bootstrap_has_values(config: Config) -> Iterator[Violation]:
    """`ppo.truncated_responses: bootstrap` needs the estimator `gae`: the value comes from the critic."""
    if config.ppo.truncated_responses == "bootstrap" and config.ppo.advantage_estimator != "gae":
        yield Violation(
            ("ppo.truncated_responses", "ppo.advantage_estimator"),
            "found bootstrap, which takes the critic's value, but ppo.advantage_estimator is"
            f" {config.ppo.advantage_estimator};"
            " legal: terminal or mask, or the estimator gae",
        )


@rule(of=PPO)
def _kl_has_reference(config: Config) -> Iterator[Violation]:
    """`ppo.kl_coef` or `ppo.kl_loss_coef` above 0, and the adaptive controller, need a `reference`."""
    if config.reference is not None:
        return
    for name in ("kl_coef", "kl_loss_coef"):
        found = getattr(config.ppo, name)
        if found > 0:
            yield Violation(
                (f"ppo.{name}", "reference"),
                f"found {found:g}, but without a reference (reference: null) there is no KL; legal: 0, or a reference",
            )
    if config.ppo.kl_controller == "adaptive":
        yield Violation(
            ("ppo.kl_controller", "reference"),
            "found adaptive, but without a reference (reference: null) there is no KL; legal: fixed, or a reference",
        )


@rule(of=PPO)
def _target_and_controller(config: Config) -> Iterator[Violation]:
    """`ppo.target_kl` and `ppo.kl_controller: adaptive` go together."""
    target, controller = config.ppo.target_kl, config.ppo.kl_controller
    if controller == "adaptive" and target is None:
        yield Violation(
            ("ppo.target_kl", "ppo.kl_controller"),
            "found null, but ppo.kl_controller adaptive needs a KL to aim at; legal: a number above 0, in nats a"
            " sequence",
        )
    if controller == "fixed" and target is not None:
        yield Violation(
            ("ppo.target_kl", "ppo.kl_controller"),
            f"found {target:g}, which ppo.kl_controller fixed would never use; legal: null, or the controller adaptive",
        )


@rule(of=PPO)
def _adaptive_can_move(config: Config) -> Iterator[Violation]:
    """`ppo.kl_controller: adaptive` needs `ppo.kl_coef` above 0: it multiplies it."""
    if config.ppo.kl_controller == "adaptive" and config.ppo.kl_coef == 0:
        yield Violation(
            ("ppo.kl_coef", "ppo.kl_controller"),
            "found 0, which the adaptive controller multiplies and so never changes; legal: above 0 (0.05, say)",
        )


@rule(of=PPO)
def _horizon_is_gentle(config: Config) -> Iterator[Violation]:
    """`ppo.kl_horizon` is above a fifth of a step's samples where the controller adapts: else `kl_coef` could fall to 0."""
    samples = config.ppo.prompts_per_step * config.rollout.samples_per_prompt
    if config.ppo.kl_controller == "adaptive" and config.ppo.kl_horizon <= 0.2 * samples:
        yield Violation(
            ("ppo.kl_horizon", "ppo.kl_controller", "ppo.prompts_per_step", "rollout.samples_per_prompt"),
            f"found {config.ppo.kl_horizon:g}, with which a step of {samples} samples could bring ppo.kl_coef to 0; legal: "
            f"above {0.2 * samples:g}",
        )


@rule(of=PPO)
def _whole_distribution(config: Config) -> Iterator[Violation]:
    """`rollout.top_p` below 1 and `rollout.top_k` above 0 need `ppo.importance_sampling_cap: null`."""
    if config.ppo.importance_sampling_cap is None:
        return
    why = (
        "cuts the distribution that is sampled from, so the importance weights of ppo.importance_sampling_cap"
        f" {config.ppo.importance_sampling_cap:g} would be wrong"
    )
    for name, off in (("top_p", 1), ("top_k", 0)):
        found = getattr(config.rollout, name)
        if found != off:
            yield Violation(
                (f"rollout.{name}", "ppo.importance_sampling_cap"),
                f"found {found:g}, which {why}; legal: {off}, or ppo.importance_sampling_cap: null",
            )


@rule(of=PPO)
def _denominator_and_aggregation(config: Config) -> Iterator[Violation]:
    """`ppo.loss_denominator` and `ppo.loss_aggregation: fixed_denominator` go together."""
    found, aggregation = config.ppo.loss_denominator, config.ppo.loss_aggregation
    if aggregation == "fixed_denominator" and found is None:
        tokens = config.ppo.minibatch_samples * config.rollout.max_response_tokens
        yield Violation(
            ("ppo.loss_denominator", "ppo.loss_aggregation"),
            "found null, but ppo.loss_aggregation fixed_denominator divides by it; legal: a number above 0"
            f" ({tokens}, say: minibatch_samples x max_response_tokens)",
        )
    if aggregation != "fixed_denominator" and found is not None:
        yield Violation(
            ("ppo.loss_denominator", "ppo.loss_aggregation"),
            f"found {found:g}, which ppo.loss_aggregation {aggregation} would never use; legal: null, or the"
            " aggregation"
            " fixed_denominator",
        )
