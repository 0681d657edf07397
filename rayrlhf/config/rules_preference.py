"""Rules across keys: preference losses, their reference, and the guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rayrlhf.config.derive import needs_reference
from rayrlhf.config.offline import DPOConfig, KLRolloutConfig, PreferenceConfig
from rayrlhf.config.rulebook import Violation, rule
from rayrlhf.config.trainers import Section

DPO = (PreferenceConfig,)
_SMOOTHED = ("conservative", "robust")


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].default


# -- the reference ----------------------------------------------------------------------------------------------


@rule(of=DPO)
def _loss_has_reference(config: PreferenceConfig) -> Iterator[Violation]:
    """Every `dpo.loss` but `simpo` and `orpo` needs a `reference`."""
    if config.reference is None and needs_reference(config.dpo.loss):
        yield Violation(
            ("reference", "dpo.loss"),
            f"found null, but dpo.loss {config.dpo.loss} compares the policy with a reference; legal: a section ({{}}"
            " for its defaults), or the loss simpo or orpo",
        )


@rule(of=DPO)
def _reference_is_compared(config: PreferenceConfig) -> Iterator[Violation]:
    """With `dpo.loss` `simpo` or `orpo` a `reference` is for the guard's KL alone: without `guard.kl_prompts` it is
    null."""
    loss = config.dpo.loss
    if config.reference is not None and not needs_reference(loss) and config.guard.kl_prompts == 0:
        yield Violation(
            ("reference", "dpo.loss", "guard.kl_prompts"),
            f"found a reference, by default or given, which dpo.loss {loss} doesn't need and no KL is measured to"
            " (guard.kl_prompts 0); legal: reference: null, or guard.kl_prompts above 0",
        )


@rule(of=DPO)
def _live_reference_is_used(config: PreferenceConfig) -> Iterator[Violation]:
    """`dpo.reference: live` needs a loss that compares with the reference."""
    if config.dpo.reference == "live" and not needs_reference(config.dpo.loss):
        yield Violation(
            ("dpo.reference", "dpo.loss"),
            f"found live, but dpo.loss {config.dpo.loss} needs no reference's log-probabilities; legal: cached (leave it"
            " out)",
        )


# -- the loss ---------------------------------------------------------------------------------------------------


@rule(of=DPO)
def _smoothing_and_loss(config: PreferenceConfig) -> Iterator[Violation]:
    """`dpo.label_smoothing` above 0 and `dpo.loss` `conservative` or `robust` go together."""
    found, loss = config.dpo.label_smoothing, config.dpo.loss
    if loss in _SMOOTHED and found == 0:
        yield Violation(
            ("dpo.label_smoothing", "dpo.loss"),
            f"found 0, with which dpo.loss {loss} is sigmoid; legal: above 0 (0.1, say), or the loss sigmoid",
        )
    if loss not in _SMOOTHED and found > 0:
        yield Violation(
            ("dpo.label_smoothing", "dpo.loss"),
            f"found {found:g}, which dpo.loss {loss} would never use; legal: 0, or the loss conservative or robust",
        )


@rule(of=DPO)
def _settings_belong_to_loss(config: PreferenceConfig) -> Iterator[Violation]:
    """`dpo.simpo_margin` is for the loss `simpo`; `dpo.desirable_weight` and `dpo.undesirable_weight` for `kto`."""
    for name, loss in (("simpo_margin", "simpo"), ("desirable_weight", "kto"), ("undesirable_weight", "kto")):
        found, default = getattr(config.dpo, name), _default(DPOConfig, name)
        if found != default and config.dpo.loss != loss:
            yield Violation(
                (f"dpo.{name}", "dpo.loss"),
                f"found {found:g}, which dpo.loss {config.dpo.loss} would never use; legal: leave it out ({default:g}),"
                f" or the loss {loss}",
            )


@rule(of=DPO)
def _curriculum_has_gaps(config: PreferenceConfig) -> Iterator[Violation]:
    """`dpo.curriculum` needs pairs, and a loss with a reference, whose implicit reward orders them."""
    loss = config.dpo.loss
    if config.dpo.curriculum and (loss == "kto" or not needs_reference(loss)):
        why = "takes single completions, which have no gap" if loss == "kto" else "has no reference to order pairs by"
        yield Violation(
            ("dpo.curriculum", "dpo.loss"),
            f"found true, but dpo.loss {loss} {why}; legal: false, or a loss on pairs with a reference (sigmoid, say)",
        )


@rule(of=DPO)
def _kto_compares_examples(config: PreferenceConfig) -> Iterator[Violation]:
    """The loss `kto` needs `training.batch_examples` of at least 2: a prompt is put together with another one's
    completion."""
    if config.dpo.loss == "kto" and config.training.batch_examples < 2:
        yield Violation(
            ("training.batch_examples", "dpo.loss"),
            f"found {config.training.batch_examples}, but dpo.loss kto puts a prompt together with the completion of"
            " another example of the batch; legal: at least 2",
        )


@rule(of=DPO)
def _target_and_adaptive_beta(config: PreferenceConfig) -> Iterator[Violation]:
    """`dpo.adaptive_beta` and `dpo.target_kl` go together; the target is below `guard.max_kl`."""
    adaptive, target, bound = config.dpo.adaptive_beta, config.dpo.target_kl, config.guard.max_kl
    if adaptive and target is None:
        yield Violation(
            ("dpo.target_kl", "dpo.adaptive_beta"),
            "found null, but dpo.adaptive_beta needs a KL to aim at; legal: a number above 0, in nats a response token",
        )
    if not adaptive and target is not None:
        yield Violation(
            ("dpo.target_kl", "dpo.adaptive_beta"),
            f"found {target:g}, which without dpo.adaptive_beta is never used; legal: null, or dpo.adaptive_beta: true",
        )
    if adaptive and target is not None and bound is not None and target >= bound:
        yield Violation(
            ("dpo.target_kl", "guard.max_kl"),
            f"found {target:g}, so beta would let the KL grow beyond guard.max_kl {bound:g}; legal: below {bound:g}",
        )


@rule(of=DPO)
def _beta_pulls(config: PreferenceConfig) -> Iterator[Violation]:
    """`dpo.adaptive_beta`, and `raise_beta` among `guard.actions`, need a loss whose beta pulls to the reference: not
    `simpo` or `orpo`."""
    loss = config.dpo.loss
    if needs_reference(loss):
        return
    why = f"but beta of dpo.loss {loss} doesn't pull to a reference"
    if config.dpo.adaptive_beta:
        yield Violation(
            ("dpo.adaptive_beta", "dpo.loss"), f"found true, {why}; legal: false, or a loss with a reference"
        )
    if config.guard.max_kl is not None and "raise_beta" in list(config.guard.actions or []):
        yield Violation(
            ("guard.actions", "dpo.loss"),
            f"found raise_beta, {why}; legal: any of halve_lr, roll_back",
        )


# -- the KL -----------------------------------------------------------------------------------------------------


@rule(of=DPO)
def _kl_is_measured(config: PreferenceConfig) -> Iterator[Violation]:
    """`guard.max_kl` and `dpo.adaptive_beta` need `guard.kl_prompts` above 0: else the KL isn't known."""
    if config.guard.kl_prompts > 0:
        return
    if config.guard.max_kl is not None:
        yield Violation(
            ("guard.max_kl", "guard.kl_prompts"),
            f"found {config.guard.max_kl:g}, by default or given, but guard.kl_prompts is 0, so no KL is measured;"
            " legal: null, or guard.kl_prompts above 0",
        )
    if config.dpo.adaptive_beta:
        yield Violation(
            ("dpo.adaptive_beta", "guard.kl_prompts"),
            "found true, but guard.kl_prompts is 0, so no KL is measured; legal: false, or guard.kl_prompts above 0",
        )


@rule(of=DPO)
def _kl_is_to_reference(config: PreferenceConfig) -> Iterator[Violation]:
    """`guard.kl_prompts` above 0 needs a `reference`, and held-out examples for their prompts."""
    found = config.guard.kl_prompts
    if found > 0 and config.reference is None and not needs_reference(config.dpo.loss):
        yield Violation(
            ("guard.kl_prompts", "reference"),
            f"found {found}, by default or given, but without a reference (reference: null) there is no KL; legal: 0, or"
            " a reference",
        )
    if found > 0 and config.data.validation is None and config.data.validation_fraction == 0:
        yield Violation(
            ("guard.kl_prompts", "data.validation_fraction", "data.validation"),
            f"found {found}, by default or given, but no examples are held out (data.validation null,"
            " data.validation_fraction 0); legal: 0, or held-out examples",
        )


@rule(of=DPO)
def _kl_is_of_policy(config: PreferenceConfig) -> Iterator[Violation]:
    """`rollout.temperature` 1, `rollout.top_p` 1 and `rollout.top_k` 0: the KL is a mean over the policy's own
    distribution; and `rollout.samples_per_prompt` 1."""
    if config.guard.kl_prompts == 0:
        return
    for name, off in (("temperature", 1), ("top_p", 1), ("top_k", 0)):
        found = getattr(config.rollout, name)
        if found != off:
            yield Violation(
                (f"rollout.{name}", "guard.kl_prompts"),
                f"found {found:g}, but the KL is a mean over what the policy itself says, so nothing may change what is"
                f" sampled; legal: {off}",
            )
    if config.rollout.samples_per_prompt != 1:
        yield Violation(
            ("rollout.samples_per_prompt", "guard.kl_prompts"),
            f"found {config.rollout.samples_per_prompt}, but the KL is sampled with one response a prompt; legal: 1"
            " (guard.kl_prompts says how many)",
        )


@rule(of=DPO)
def _rollout_is_used(config: PreferenceConfig) -> Iterator[Violation]:
    """`rollout` is for the guard's KL: its keys need `guard.kl_prompts` above 0."""
    if config.guard.kl_prompts > 0:
        return
    for name, info in KLRolloutConfig.model_fields.items():
        value = getattr(config.rollout, name)
        found = list(value) if isinstance(info.default, list) else value
        if found != info.default:
            yield Violation(
                (f"rollout.{name}", "guard.kl_prompts"),
                f"found {found}, but guard.kl_prompts is 0, so nothing is sampled; legal: leave it out, or"
                " guard.kl_prompts above 0",
            )


@rule(of=DPO)
def _engines_have_prompts(config: PreferenceConfig) -> Iterator[Violation]:
    """`rollout.engines` is at most `guard.kl_prompts`."""
    engines, prompts = config.rollout.engines, config.guard.kl_prompts
    if 0 < prompts < engines:
        yield Violation(
            ("rollout.engines", "guard.kl_prompts"),
            f"found {engines}, more than the {prompts} prompts of guard.kl_prompts: some would have nothing to do;"
            f" legal: at most {prompts}",
        )


@rule(of=DPO)
def _actions_have_bound(config: PreferenceConfig) -> Iterator[Violation]:
    """`guard.actions` needs `guard.max_kl`."""
    found = list(config.guard.actions or [])
    if config.guard.max_kl is None and found:
        yield Violation(
            ("guard.actions", "guard.max_kl"),
            f"found {found}, but without guard.max_kl nothing is ever done; legal: leave it out, or a guard.max_kl",
        )
