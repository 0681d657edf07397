"""Direct preference optimisation (Rafailov et al. 2023) and its kin, as one loop with guards."""

from __future__ import annotations

from typing import Any

from rayrlhf.drivers.guard import after_validation, quality_gate
from rayrlhf.drivers.offline import OfflineRun
from rayrlhf.drivers.preference_data import PreferenceData
from rayrlhf.drivers.preference_validation import measure
from rayrlhf.errors import RunFailed

__all__ = ["train"]


def train(run: OfflineRun) -> None:
    """The whole run: validate, then steps with a validation now and then, then the gate, and the model.

    Raises:
        RunFailed: where the quality gate isn't passed, after everything was written.
    """
    data = PreferenceData(run)
    run.first_epoch = data.curriculum()
    if run.validation_due():
        validate(run, data)

    for _ in run.steps():
        batch = data.batch(run.next_examples())
        metrics = run.update(batch, data.parts(batch), beta=run.state.beta)
        run.finish_step(metrics | {"beta": run.state.beta} | measured_before(run), batch)
        if run.validation_due():
            validate(run, data)

    run.restore_best()
    run.save_model()
    failed = quality_gate(run)
    if failed:
        raise RunFailed(f"the quality gate isn't passed: {'; '.join(failed)}. The model is in {run.folder / 'model'}")


def validate(run: OfflineRun, data: PreferenceData) -> None:
    """Loss, margins, and the KL on sampled responses; then what the guard does about them."""
    run.progress.phase("validation")
    result = measure(run, data)
    within = after_validation(run, result)
    run.record(result, result["rewards/margins"] if within else None, validation_line(result))


def measured_before(run: OfflineRun) -> dict[str, float]:
    """The KL that was measured just before this step, and the transfer for it, for its row of metrics."""
    last = run.validations.results[-1] if run.validations.results else None
    if last is None or last["step"] != run.state.step or last["kl_per_token"] is None:
        return {}
    return {name: value for name, value in last.items() if name == "kl_per_token" or name.startswith("sync/")}


def validation_line(result: dict[str, Any]) -> str:
    """A validation as the terminal shows it."""
    line = f"validation on {result['examples']} examples: loss {result['loss']:.4f}, "
    line += f"margin {result['rewards/margins']:.4f} ± {result['rewards/margins/stderr']:.4f}, "
    line += f"accuracy {result['rewards/accuracies']:.3f}"
    if result["kl_per_token"] is not None:
        line += f", KL {result['kl_per_token']:.4f} nats a token"
    return line
