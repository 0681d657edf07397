"""The health rules of every run: what each of them looks for. `rayrlhf.monitoring.health_preferences` has those of pairs."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np

from rayrlhf.config.health import Severity
from rayrlhf.monitoring.health_history import View, spread

__all__ = ["GENERAL_RULES", "Check", "Finding", "Rule"]

SCORES = ("score/mean", "reward/mean", "rewards/margins")
"""What is maximised: the first of these that a run has."""
LOSSES = ("loss", "policy_loss", "value_loss")
_LOSS_WINDOWS = 4  # windows of steps that a loss is compared with
_LEAST_OF_BEGINNING = 0.2  # share of its first size below which a loss is too small to be trouble
_OSCILLATION_WINDOWS = 6  # windows of steps in which a frequency is looked for
_FINER = 8  # frequencies that are tried, in multiples of those that the data tell apart
_SLOWEST = 3  # fewest cycles in them: slower ones are trends


class Finding(NamedTuple):
    """That a rule speaks at a row: how severe it is, and what was seen, with the numbers."""

    severity: Severity
    seen: str


Check = Callable[[View], Finding | None]


class Rule(NamedTuple):
    """A check, and the metrics of which at least one must be in a row for the check to look at it."""

    check: Check
    columns: tuple[str, ...]
    non_finite: bool = False
    """Whether it looks at values that are no finite numbers, too."""


def kl_limit(view: View) -> tuple[str, float, str] | None:
    """The metric that says the KL, its upper limit, and its unit; None where there is none yet."""
    if view.age("kl_per_token"):
        return "kl_per_token", view.config.max_kl_per_token, "nats a token"
    if view.age("kl"):
        return "kl", view.config.max_kl_per_sequence, "nats a response"
    return None


def gain(view: View, score: str) -> tuple[float, float, bool]:
    """A score at its beginning, now, and whether it has clearly risen: over two windows each, once these don't overlap."""
    windows = 2 if view.age(score) >= 4 * view.config.window_steps else 1
    before, after = view.beginning(score, windows), view.now(score, windows)
    return before, after, view.clear(after - before, score, windows)


def reward_hacking(view: View) -> Finding | None:
    kl, score = kl_limit(view), view.first_of(*SCORES)
    if kl is None or score is None or not view.warm(kl[0]):
        return None
    name, limit, unit = kl
    now, middle = view.now(name), view.middle(name)
    before, after, better = gain(view, score)
    explodes = now >= 2 * limit or now >= view.config.kl_growth * middle
    if now <= limit or not explodes or not better:
        return None
    seen = f"{score} went from {before:.4g} to {after:.4g} while the KL reached {now:.3g} {unit}"
    return Finding("critical", f"{seen} (limit {limit:g}; {middle:.3g} in the middle of the run)")


def kl_too_high(view: View) -> Finding | None:
    kl = kl_limit(view)
    if kl is None or not view.warm(kl[0]):
        return None
    name, limit, unit = kl
    now = view.now(name)
    if now <= limit:
        return None
    return Finding("critical" if now >= 2 * limit else "warning", f"KL {now:.3g} {unit} (limit {limit:g})")


def kl_flat(view: View) -> Finding | None:
    kl = kl_limit(view)
    if kl is None or not view.warm(kl[0], view.config.flat_kl_after_steps) or not view.warm("grad_norm"):
        return None
    now, gradient, config = view.now(kl[0], 2), view.now("grad_norm"), view.config
    if abs(now) > config.flat_kl_per_token or gradient < config.flat_grad_norm:
        return None
    return Finding(
        "warning", f"KL {now:.2g} {kl[2]} after {view.age(kl[0])} steps, with a gradient norm of {gradient:.3g}"
    )


def kl_too_low(view: View) -> Finding | None:
    kl = kl_limit(view)
    if kl is None or not view.warm(kl[0], view.config.low_kl_after_steps) or kl_flat(view) is not None:
        return None
    # A KL a response is an upper bound of that a token.
    now, score = view.now(kl[0], 2), view.first_of(*SCORES)
    if abs(now) >= view.config.min_kl_per_token:
        return None
    seen = f"KL {now:.2g} {kl[2]} after {view.age(kl[0])} steps (at least {view.config.min_kl_per_token:g} expected)"
    if score is None:
        return Finding("note", seen)
    before, after, better = gain(view, score)
    if better:
        return None
    return Finding("note", f"{seen}, and {score} went from {before:.4g} to {after:.4g}, which is within its noise")


def score_ceiling(view: View) -> Finding | None:
    if not view.warm("score/mean"):
        return None
    highest, lowest = (view.history.column(f"score/{end}").until(view.row) for end in ("max", "min"))
    if view.config.max_score is None and not highest:
        return None
    top = max(highest) if view.config.max_score is None else view.config.max_score
    low = min(lowest or view.history.column("score/mean").until(view.row))
    now = view.now("score/mean")
    if top <= low or top - now > view.config.ceiling_distance * (top - low):
        return None
    return Finding("warning", f"score/mean {now:.4g}, with scores from {low:.4g} to {top:.4g}")


def collapse(view: View) -> Finding | None:
    config, parts = view.config, []
    for name, fall in (("distinct_2", config.distinct_fall), ("entropy", config.entropy_fall)):
        if view.warm(name):
            before, now = view.beginning(name), view.now(name)
            if before > 0 and now < fall * before and view.clear(before - now, name):
                parts.append(f"{name} fell from {before:.3g} to {now:.3g}")
    if view.warm("repeated_fraction"):
        before, now = view.beginning("repeated_fraction"), view.now("repeated_fraction")
        if now > config.max_repeated_fraction and view.clear(now - before, "repeated_fraction"):
            parts.append(f"{now:.0%} of the responses repeat others, {before:.0%} at the beginning")
    return Finding("critical", "; ".join(parts)) if parts else None


def length_drift(view: View) -> Finding | None:
    name = "response_length/mean"
    if not view.warm(name):
        return None
    before, now = view.beginning(name), view.now(name)
    factor = view.config.length_factor
    if before <= 0 or before / factor < now < before * factor or not view.clear(abs(now - before), name):
        return None
    return Finding(
        "warning", f"{name} went from {before:.4g} to {now:.4g} tokens ({now / before:.2f} times the beginning)"
    )


def loss_spike(view: View) -> Finding | None:
    parts: list[str] = []
    for name in LOSSES:
        strange = view.history.non_finite(name, view.row)
        if strange is not None:
            return Finding("critical", f"{name} is {strange}")
        value = view.history.column(name).between(view.row, view.row)
        previous = view.before(name, _LOSS_WINDOWS)
        if not value or not view.warm(name) or len(previous) < view.config.window_steps:
            continue
        usual = median(previous)
        if min(previous) > 0:
            # Losses have long tails: a single one must stand out twice as far as a median.
            high = max(view.config.loss_factor * usual, usual + 2 * view.config.noise * spread(previous))
            # Small losses vary by more than themselves without harm, such as that of pairs which are learnt already.
            high = max(high, _LEAST_OF_BEGINNING * view.beginning(name))
        elif len(previous) < _LOSS_WINDOWS * view.config.window_steps:
            continue  # too few to know how far it usually goes
        else:
            # A policy's loss is around 0: there is no multiple of its median.
            high = view.config.loss_factor * max(abs(x) for x in previous)
        if value[0] >= high > 0:
            parts.append(f"{name} {value[0]:.3g}, with a median of {usual:.3g} over the {len(previous)} steps before")
    return Finding("warning", "; ".join(parts)) if parts else None


def value_not_learning(view: View) -> Finding | None:
    name = "explained_variance"
    if not view.warm(name, view.config.value_after_steps):
        return None
    now = view.now(name, 2)
    if now >= view.config.min_explained_variance or view.rising(name):
        return None
    return Finding("warning", f"{name} {now:.3g} after {view.age(name)} steps, and not rising")


def oscillation(view: View) -> Finding | None:
    parts: list[str] = []
    for name in (view.first_of(*SCORES), "loss", "value_loss"):
        count = _OSCILLATION_WINDOWS * view.config.window_steps
        values = view.history.column(name).until(view.row)[-count:] if name is not None else []
        if len(values) == count:
            share, period, swing = _frequency(values)
            large = swing >= view.config.oscillation_swing * median([abs(x) for x in values])
            if share >= view.config.oscillation_share and large:
                part = f"{name} swings by {swing:.3g} about every {period:.1f} values ({share:.0%} of its variance)"
                parts.append(part)
    return Finding("warning", "; ".join(parts)) if parts else None


def _frequency(values: list[float]) -> tuple[float, float, float]:
    """The strongest frequency of values in time.

    The parabola that fits best is taken off: it holds the trend. Shares are those of the periodogram, on a grid that is eight
    times finer than the data's own (Lomb 1976): white noise of 30 values has more than 70 % in one of these frequencies about
    once in 100,000 times (a Dirichlet distribution; Fisher 1929).

    Returns:
        Its share of the variance; its period, in values; and the distance of the values' 10th and 90th percentile. Zeros
        where there is no variance, or where the strongest frequency is a trend.
    """
    count = len(values)
    x, times = np.array(values, dtype=np.float64), np.linspace(-1, 1, count)
    scale = float(np.abs(x).max())
    if scale == 0:
        return 0.0, 0.0, 0.0
    x /= scale  # so that squares can't overflow
    residual = x - np.polynomial.polynomial.polyval(times, np.polynomial.polynomial.polyfit(times, x, 2))
    variance = float(residual @ residual)
    power = np.abs(np.fft.rfft(residual, n=_FINER * count)) ** 2 * (2 / count)
    # Near Nyquist's frequency sine and cosine are one and the same.
    power[len(power) - _FINER // 2 :] /= 2
    peak = int(power.argmax())
    if variance < 1e-18 * count or peak < _SLOWEST * _FINER:
        return 0.0, 0.0, 0.0
    low, high = np.percentile(residual, [10, 90])
    return min(1.0, float(power[peak]) / variance), _FINER * count / peak, float(high - low) * scale


def clipfrac_high(view: View) -> Finding | None:
    if not view.warm("clipfrac") or view.now("clipfrac") <= view.config.max_clipfrac:
        return None
    return Finding("warning", f"clipfrac {view.now('clipfrac'):.3g} (limit {view.config.max_clipfrac:g})")


def truncation(view: View) -> Finding | None:
    name = "truncated_fraction"
    if not view.warm(name):
        return None
    before, now = view.beginning(name), view.now(name)
    if now <= view.config.max_truncated_fraction or now - before < view.config.truncated_rise:
        return None
    return Finding("warning", f"{now:.0%} of the responses are cut by the length limit, {before:.0%} at the beginning")


def rollout_mismatch(view: View) -> Finding | None:
    name, limit = "rollout_mismatch/mean_abs", view.config.max_rollout_mismatch
    if not view.warm(name) or view.now(name) <= limit:
        return None
    return Finding("warning", f"{name} {view.now(name):.3g} nats (limit {limit:g})")


def skipped_steps(view: View) -> Finding | None:
    severity: Severity = "warning"
    parts: list[str] = []
    for role in ("", "critic/"):
        skipped, applied = (view.history.column(role + name) for name in ("skipped_steps", "optimizer_steps"))
        here = sum(skipped.between(view.row, view.row))
        of = here + sum(applied.between(view.row, view.row))
        if here <= 0 or here <= view.config.max_skipped_fraction * of:
            continue
        first = view.row - view.config.window_steps + 1
        lately = sum(skipped.between(first, view.row))
        if lately >= view.config.critical_skipped_fraction * (lately + sum(applied.between(first, view.row))):
            severity = "critical"
        parts.append(f"{here:g} of {of:g} optimizer steps of the {role.rstrip('/') or 'policy'} were skipped")
    return Finding(severity, "; ".join(parts)) if parts else None


KL = ("kl_per_token", "kl")
GENERAL_RULES: dict[str, Rule] = {
    "reward_hacking": Rule(reward_hacking, KL),
    "score_ceiling": Rule(score_ceiling, ("score/mean",)),
    "kl_too_high": Rule(kl_too_high, KL),
    "kl_too_low": Rule(kl_too_low, KL),
    "kl_flat": Rule(kl_flat, KL),
    "collapse": Rule(collapse, ("distinct_2", "entropy", "repeated_fraction")),
    "length_drift": Rule(length_drift, ("response_length/mean",)),
    "loss_spike": Rule(loss_spike, LOSSES, non_finite=True),
    "value_not_learning": Rule(value_not_learning, ("explained_variance",)),
    "oscillation": Rule(oscillation, (*SCORES, "loss", "value_loss")),
    "clipfrac_high": Rule(clipfrac_high, ("clipfrac",)),
    "truncation": Rule(truncation, ("truncated_fraction",)),
    "rollout_mismatch": Rule(rollout_mismatch, ("rollout_mismatch/mean_abs",)),
    "skipped_steps": Rule(skipped_steps, ("skipped_steps", "critic/skipped_steps")),
}
