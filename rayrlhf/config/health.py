"""The keys of the health rules: when a run's metrics are worth a warning, and when they end it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from rayrlhf.config.trainers import Positive, Section

__all__ = ["RULE_NAMES", "HealthConfig", "RuleName", "Severity"]

RuleName = Literal[
    "reward_hacking",
    "score_ceiling",
    "kl_too_high",
    "kl_too_low",
    "kl_flat",
    "collapse",
    "length_drift",
    "loss_spike",
    "value_not_learning",
    "oscillation",
    "clipfrac_high",
    "truncation",
    "rollout_mismatch",
    "skipped_steps",
    "margins_falling",
    "accuracy_at_chance",
    "chosen_sinking",
]
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)
Severity = Literal["note", "warning", "critical"]

Share = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]
Above1 = Annotated[float, Field(gt=1)]


class HealthConfig(Section):
    ignore: list[RuleName] = []
    """Rules that are not applied."""
    stop_at: Literal["never", "critical", "warning"] = "never"
    """The run ends at the first warning that is as severe as this, or more so."""
    stop_on: list[RuleName] = []
    """The run ends at the first warning of one of these rules, however severe."""
    window_steps: Positive = 5
    """Steps whose median counts as one observation. A trouble is over once it hasn't been seen for so many steps."""
    warmup_steps: Positive = 10
    """Steps, from a metric's first one on, before a rule may speak of it. The first ``window_steps`` are its beginning."""
    noise: Above0 = 4.0
    """A metric has changed only where it did by so many standard errors; the noise is taken from the differences between
    neighbouring steps."""

    max_kl_per_token: Above0 = 0.5
    """Highest KL to the reference, in nats a response token (``kl_too_high``; critical from twice of it on). With a score
    above its beginning and a KL that goes on growing, or is twice as high, it is ``reward_hacking``."""
    max_kl_per_sequence: Above0 = 30.0
    """The same in nats a response. It counts only where the metrics don't tell the KL a token, nor the lengths."""
    kl_growth: Above1 = 1.5
    """The KL goes on growing where it is so many times what it was in the middle of the run (``reward_hacking``)."""
    min_kl_per_token: Above0 = 1e-3
    """Lowest KL, in nats a response token, of a run whose score doesn't rise (``kl_too_low``)."""
    low_kl_after_steps: Positive = 30
    """Steps before the KL can be too low."""
    flat_kl_per_token: Above0 = 2e-5
    """Up to this KL, in nats a response token, the policy counts as unchanged (``kl_flat``)."""
    flat_kl_after_steps: Positive = 20
    """Steps before an unchanged policy is trouble: with a warm-up of the learning rate it starts slowly."""
    flat_grad_norm: Above0 = 1e-3
    """From this norm on, the gradients of an unchanged policy say that its updates are lost (``kl_flat``)."""

    max_score: float | None = None
    """Highest score that the reward can give; by default the highest one that was seen."""
    ceiling_distance: Share = 0.05
    """The mean score is at its ceiling from this distance on, as a share of the way from the lowest to the highest score
    (``score_ceiling``)."""
    entropy_fall: Share = 0.25
    """Entropy below this share of its beginning is ``collapse``."""
    distinct_fall: Share = 0.5
    """``distinct_2`` below this share of its beginning is ``collapse``."""
    max_repeated_fraction: Share = 0.5
    """More repeated responses than this share, where there were fewer at the beginning, are ``collapse``."""
    length_factor: Above1 = 1.5
    """Responses so many times longer, or shorter, than at the beginning are ``length_drift``."""
    max_truncated_fraction: Share = 0.5
    """Largest share of responses that are cut by the length limit (``truncation``)."""
    truncated_rise: Share = 0.25
    """``truncation`` counts where the share has risen by so much since the beginning. 0: also where it was so from the
    first step on, as with a model that doesn't end its responses."""

    loss_factor: Above1 = 3.0
    """A loss of so many times the median of the steps before it is a ``loss_spike``."""
    min_explained_variance: float = Field(default=0.05, lt=1)
    """Lowest explained variance of the values, unless it is rising (``value_not_learning``)."""
    value_after_steps: Positive = 25
    """Steps that the critic has to learn."""
    oscillation_share: Share = 0.7
    """Share of the variance, once the trend is off, that lies in one frequency of a score or loss that oscillates."""
    oscillation_swing: Above0 = 0.25
    """Smallest swing of an oscillation, from low to high, in multiples of the metric's usual size."""
    max_clipfrac: Share = 0.3
    """Largest share of tokens whose probability ratio is clipped (``clipfrac_high``)."""
    max_rollout_mismatch: Above0 = 0.1
    """Largest mean difference between the engine's and the trainer's log-probabilities, in nats (``rollout_mismatch``)."""
    max_skipped_fraction: Share = 0.0
    """Largest share of a step's optimizer steps that are skipped for a non-finite loss or gradient (``skipped_steps``)."""
    critical_skipped_fraction: Share = 0.5
    """From this share on, over ``window_steps``, skipped optimizer steps are critical."""

    margin_fall: Share = 0.25
    """Reward margins that have lost this share of their best, or are negative, are ``margins_falling``."""
    min_accuracy: Share = 0.53
    """Below this share of rightly ordered pairs, unless it is rising, accuracy is ``accuracy_at_chance``."""
    chance_after_steps: Positive = 40
    """Steps before the accuracy can be at chance."""
    chosen_fall: Share = 0.2
    """Chosen responses whose log-probability has sunk by this share of its beginning, together with that of the rejected
    ones, are ``chosen_sinking``."""
