"""What keeps preference training near its reference: a KL bound, adaptive beta, and the gate at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rayrlhf.algorithms import adapted_beta
from rayrlhf.config.derive import guard_actions
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.drivers.offline import OfflineRun

__all__ = ["after_validation", "quality_gate"]

RAISE = 1.5
"""Factor of beta in ``raise_beta``."""


def after_validation(run: OfflineRun, result: Mapping[str, Any]) -> bool:
    """Compare a validation with the KL bound, act where it is passed, and let beta adapt.

    Returns:
        Whether the state is within the bound; True where there is none.
    """
    assert isinstance(run.config, PreferenceConfig)
    dpo, guard, kl = run.config.dpo, run.config.guard, result["kl_per_token"]
    # A KL that was measured and isn't finite is beyond every bound: NaN is not at most anything.
    within = guard.max_kl is None or kl is None or kl <= guard.max_kl
    if within:
        if "roll_back" in guard_actions(run.config) and guard.max_kl is not None:
            run.keep()
            run.state.good_step = run.state.step
    elif run.state.step < run.total_steps:
        act(run, kl)
    if dpo.adaptive_beta and dpo.target_kl is not None and kl is not None and math.isfinite(kl):
        beta = adapted_beta(run.state.beta, kl, dpo.target_kl)
        if beta != run.state.beta:
            run.progress.note(f"beta {run.state.beta:.4g} -> {beta:.4g}: KL {kl:.4f}, target {dpo.target_kl:g}")
            run.state.beta = beta
    return within


def act(run: OfflineRun, kl: float) -> None:
    """Take the next of the configured actions; the last one is repeated."""
    assert isinstance(run.config, PreferenceConfig)
    guard, state = run.config.guard, run.state
    passed = f"KL {kl:.4f} nats a token is above guard.max_kl {guard.max_kl:g}"
    actions = guard_actions(run.config)
    if not actions:
        run.progress.note(f"{passed}; no action is configured", warning=True)
        return
    action = actions[min(state.actions, len(actions) - 1)]
    state.actions += 1
    if action == "halve_lr":
        state.lr_scale /= 2
        done = f"the learning rate is now {state.lr_scale:g} of the schedule's"
    elif action == "raise_beta":
        state.beta *= RAISE
        done = f"beta is now {state.beta:.4g}"
    elif state.good_step is None:
        done = "there is no validated state within the bound to go back to"
    else:
        run.go_back_to(state.good_step)
        done = f"the weights are those of step {state.good_step} again"
    # A state that was loaded brings its own factor with it.
    run.policy.broadcast("set_lr_scale", factor=state.lr_scale)
    run.progress.note(f"{passed}: {action}: {done}", warning=True)


def quality_gate(run: OfflineRun) -> list[str]:
    """Judge the run by its validations, and write ``gates.json``.

    Returns:
        A sentence on each part that failed: KL of the chosen state within its bound, its margin positive, higher than at
        the start, and its loss lower than at the start.
    """
    assert isinstance(run.config, PreferenceConfig)
    results, bound = run.validations.results, run.config.guard.max_kl
    if len(results) < 2:
        run.progress.note("no quality gate: nothing was validated", warning=True)
        return []
    first, last = results[0], results[-1]
    chosen = last
    if run.config.training.keep_best:
        chosen = next((r for r in results if r["step"] == run.state.best_step), last)
        if run.state.best_step is None:
            run.progress.note(
                "no validated state was within the KL bound; the model is that of the last step", warning=True
            )
    kl = chosen["kl_per_token"]
    margin, before = chosen["rewards/margins"], first["rewards/margins"]
    gates: list[tuple[str, bool, str, str]] = [
        ("margin_positive", margin > 0, f"margin {margin:.4f}", "above 0"),
        ("margin_rising", margin > before, f"margin {before:.4f} -> {margin:.4f}", "rising"),
        (
            "validation_better",
            chosen["loss"] < first["loss"],
            f"validation loss {first['loss']:.4f} -> {chosen['loss']:.4f}",
            "falling",
        ),
    ]
    if bound is not None and kl is not None:
        gates.insert(0, ("kl", kl <= bound, f"KL {kl:.4f} nats a token", f"at most {bound:g}"))
    rows = [dict(zip(("name", "passed", "found", "wanted"), gate, strict=True)) for gate in gates]
    failed = [f"{name}: {found}, wanted {wanted}" for name, passed, found, wanted in gates if not passed]
    verdict = {"step": chosen["step"], "passed": not failed, "gates": rows}
    (run.folder / "gates.json").write_text(json.dumps(verdict, indent=1) + "\n")
    for name, passed, found, wanted in gates:
        run.progress.note(
            f"gate {name} {'passed' if passed else 'FAILED'}: {found}, wanted {wanted}", warning=not passed
        )
    return failed
