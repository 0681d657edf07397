"""The health rules of preference pairs: reward models, DPO and its kin."""

from __future__ import annotations

import math
from statistics import fmean

from rayrlhf.monitoring.health_history import View
from rayrlhf.monitoring.health_rules import Finding, Rule

__all__ = ["PREFERENCE_RULES"]

MARGINS = ("rewards/margins", "margin")
ACCURACIES = ("rewards/accuracies", "accuracy")
_WIDE = 3  # windows of steps: single batches of pairs differ a lot


def margins_falling(view: View) -> Finding | None:
    name = view.first_of(*MARGINS)
    if name is None or not view.warm(name, 2 * _WIDE * view.config.window_steps):
        return None
    now, best, luck = view.now(name, _WIDE), *_best(view, name)
    share = 1 - view.config.margin_fall
    fallen = best > 0 and now <= share * best and view.clear(best - luck - now, name, _WIDE)
    if not fallen and not view.clear(-now, name, _WIDE):
        return None
    return Finding("warning", f"{name} {now:.3g}, at best {best:.3g}")


def _best(view: View, name: str) -> tuple[float, float]:
    """Highest median of the windows that lie before the present one, side by side; and what of it may be luck.

    The highest of k normal values is above their mean by at most sqrt(2 ln k) deviations in expectation (Boucheron et al. 2013,
    theorem 2.5).
    """
    width = _WIDE * view.config.window_steps
    first = view.history.column(name).rows[0]
    ends = range(view.row - width, first + width - 2, -width)
    luck = math.sqrt(2 * math.log(len(ends))) * view.error(name, _WIDE) / math.sqrt(2)
    return max(View(view.history, end, view.config).now(name, _WIDE) for end in ends), luck


def accuracy_at_chance(view: View) -> Finding | None:
    name = view.first_of(*ACCURACIES)
    if name is None or not view.warm(name, view.config.chance_after_steps):
        return None
    # Means, not medians: a small batch has few values of accuracy to choose from.
    now = fmean(view.window(name, 2 * _WIDE))
    if now >= view.config.min_accuracy or view.rising(name):
        return None
    return Finding("warning", f"{name} {now:.3g} after {view.age(name)} steps, and not rising")


def chosen_sinking(view: View) -> Finding | None:
    chosen, rejected = "logps/chosen", "logps/rejected"
    # The beginning and the present must not overlap.
    if any(not view.warm(name, 2 * _WIDE * view.config.window_steps) for name in (chosen, rejected)):
        return None
    falls = {name: view.beginning(name, _WIDE) - view.now(name, _WIDE) for name in (chosen, rejected)}
    before = view.beginning(chosen, _WIDE)
    if falls[chosen] <= view.config.chosen_fall * abs(before):
        return None
    if any(not view.clear(fall, name, _WIDE) for name, fall in falls.items()):
        return None
    # The reward compares with the reference on the same pairs: it knows whether these pairs are just longer ones.
    if view.age("rewards/chosen") and view.now("rewards/chosen", _WIDE) >= 0:
        return None
    return Finding(
        "warning",
        f"{chosen} sank from {before:.4g} to {view.now(chosen, _WIDE):.4g} nats, {rejected} by {falls[rejected]:.4g}",
    )


PREFERENCE_RULES: dict[str, Rule] = {
    "margins_falling": Rule(margins_falling, MARGINS),
    "accuracy_at_chance": Rule(accuracy_at_chance, ACCURACIES),
    "chosen_sinking": Rule(chosen_sinking, ("logps/chosen",)),
}
