"""The claims of a configuration, and the roles that its driver starts: the same names, ranks and GPUs, in the same order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.cluster import RoleSpec
from rayrlhf.config import load_config
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.pipeline import is_pipeline, load_pipeline
from rayrlhf.config.schema import Config
from rayrlhf.drivers.evaluate_preflight import PreparedEvaluation, PreparedModel, _sources
from rayrlhf.drivers.evaluate_roles import model_specs, shared_specs
from rayrlhf.drivers.jobs import PreparedJob
from rayrlhf.drivers.offline_preflight import PreparedExamples, _reference_path
from rayrlhf.drivers.preflight import Prepared
from rayrlhf.drivers.preflight import _reference_path as reference_path
from rayrlhf.drivers.roles import job_specs, offline_specs, role_specs
from rayrlhf.errors import InputRefused
from rayrlhf.planning.claims import claims_of, started_roles, starts_of
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))


class Tokens:
    """A tokenizer, as far as roles are chosen by it."""

    def __init__(self, name: str | None):
        self.name = name

    def get_vocab(self) -> dict[str, int]:
        return {str(self.name): 0}


def starts(config: Any) -> list[list[RoleSpec]]:
    """What the driver starts, with prepared inputs that hold nothing but what roles are chosen by."""
    if isinstance(config, Config):
        critic = None if config.critic is None else config.critic.path or "m"
        prepared = Prepared(config, "m", critic, reference_path(config, "m"), "m", None, None)  # type: ignore[arg-type]
        return [role_specs(prepared)]
    if isinstance(config, SamplingConfig | CritiqueConfig):
        return [job_specs(PreparedJob(config, "m", "m", None, [], []))]
    if isinstance(config, ModelEvaluationConfig):
        return evaluation(config)
    # As the data is read: held-out examples where there is something that they can come from.
    held_out = config.data.validation is not None or config.data.validation_fraction > 0
    data: Any = SimpleNamespace(train=[0] * 8, validation=[0] if held_out else [])
    return [offline_specs(PreparedExamples(config, "m", _reference_path(config, "m"), "m", None, data))]


def evaluation(config: ModelEvaluationConfig) -> list[list[RoleSpec]]:
    reference = config.reference or config.models[0].path
    its = next((model.tokenizer for model in config.models if model.path == reference), None)
    models = [
        # Tokens differ where a tokenizer is named that isn't the reference's.
        PreparedModel(str(k), m.path, m.path, Tokens(m.tokenizer), [], None if m.tokenizer == its else "other tokens")
        for k, m in enumerate(config.models)
    ]
    prepared = PreparedEvaluation(config, models, reference, _sources(config), None, [])
    own = max((model_specs(prepared, model) for model in models), key=len)
    return [shared_specs(prepared), own]


def check(config: Any) -> None:
    found = [[(s.name, s.ranks, s.gpus_per_rank) for s in specs] for specs in starts(config)]
    claimed = [(claim.role, claim.processes, claim.gpus) for claim in claims_of(config)]
    assert sorted(claimed) == sorted(one for specs in found for one in specs)
    if not isinstance(config, ModelEvaluationConfig) or not any(model.tokenizer for model in config.models):
        assert [[name for name, _, _ in specs] for specs in found] == starts_of(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_of_every_shipped_configuration(file):
    for config in [stage.config for stage in load_pipeline(file).stages] if is_pipeline(file) else [load_config(file)]:
        check(config)


UNSAMPLED = ["guard.kl_prompts=0", "guard.max_kl=null"]
ALONE = [*UNSAMPLED, "reference=null"]


EVALUATION = ["rollout", "model", "reference", "scores"]


@pytest.mark.parametrize(
    ("base", "overrides", "roles"),
    [
        ("base", [], ["policy", "critic", "reference", "reward", "rollout"]),
        ("base", ["policy.lora={}"], ["policy", "critic", "reward", "rollout"]),
        ("base", ["policy.lora={}", "reference.path=m"], ["policy", "critic", "reference", "reward", "rollout"]),
        ("base", ["reference=null", "ppo.kl_coef=0"], ["policy", "critic", "reward", "rollout"]),
        ("base", ["rollout.tensor_parallel=2"], ["policy", "critic", "reference", "reward", "rollout"]),
        ("base_sft", [], ["policy"]),
        ("base_reward_model", [], ["policy"]),
        ("base_dpo", [], ["policy", "reference", "rollout"]),
        ("base_dpo", UNSAMPLED, ["policy", "reference"]),
        ("base_dpo", ["dpo.loss=simpo"], ["policy", "reference", "rollout"]),
        ("base_dpo", ["dpo.loss=simpo", *ALONE], ["policy"]),
        ("base_dpo", ["dpo.loss=orpo", *ALONE], ["policy"]),
        ("base_dpo", ["policy.lora={}"], ["policy", "rollout"]),
        ("base_sampling", [], ["rollout", "reward"]),
        ("base_critique", [], ["rollout"]),
        ("base_evaluation", [], EVALUATION),
        ("base_evaluation", ["models=[{path: a}]"], ["rollout", "reference", "scores"]),
        ("base_evaluation", ["models=[{path: a}, {path: b}]"], EVALUATION),
        ("base_evaluation", ["models=[{path: a}]", "reference=b"], EVALUATION),
        ("base_evaluation", ["models=[{path: a}, {path: a, name: b, tokenizer: t}]"], EVALUATION),
        ("base_evaluation", ["models=[{path: a}]", "scores.reward={model: r}"], ["rollout", "reference", "scores"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_of_every_algorithm(load, base, overrides, roles, device):
    config = load(f"cluster.device={device}", *overrides, base=base)
    assert list(started_roles(config)) == roles
    check(config)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_reference_that_nobody_asks_is_refused_before_it_is_claimed(load, loss):
    """So that what is claimed is what is started: the driver would leave it out."""
    with pytest.raises(InputRefused, match="legal: reference: null"):
        load(f"dpo.loss={loss}", *UNSAMPLED, base="base_dpo")


def test_engines_for_held_out_prompts_of_which_there_are_none_are_refused(load):
    with pytest.raises(InputRefused, match="guard.kl_prompts: found 64"):
        load("data.validation=null", "data.validation_fraction=0", "training.keep_best=false", base="base_dpo")
    check(load("data.validation_fraction=0", "training.keep_best=false", *UNSAMPLED, base="base_dpo"))
