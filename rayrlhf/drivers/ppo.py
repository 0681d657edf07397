"""Proximal policy optimisation from a reward (Ziegler et al. 2019; Ouyang et al. 2022), as one loop."""

from __future__ import annotations

from rayrlhf.drivers.advantages import add_advantages, next_kl_coef, rollout_metrics, scores_to_learn_from
from rayrlhf.drivers.run import Run

__all__ = ["train"]


def train(run: Run) -> None:
    """The whole run: evaluate, then steps of rollout and update, then evaluate again and write the model."""
    config, state = run.config, run.state
    if config.evaluation.prompts and not run.evaluations.results:
        run.evaluate()

    for _ in run.steps():
        prompts = run.next_prompts()
        batch = run.collect(prompts)  # generate, then score, reference, values and log-probabilities as samples finish
        if state.moments is not None:
            state.moments.update(scores_to_learn_from(config, batch))
        batch = add_advantages(config, batch, state.kl_coef, state.moments)
        metrics = rollout_metrics(batch, state.weight_version) | {"kl_coef": state.kl_coef}
        metrics |= run.update(batch)
        metrics |= run.publish_weights()
        state.kl_coef = next_kl_coef(config, state.kl_coef, metrics.get("kl", 0.0), len(batch))
        run.finish_step(metrics, batch)

    run.save_model()
    if config.evaluation.prompts:
        run.evaluate()
