"""The keys of what works with finished models: sampling, critique and revision, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from rayrlhf.config.base import JobConfig
from rayrlhf.config.schema import PromptsConfig, SamplerConfig, ScorerProcesses, ScoreSource, ScoringConfig
from rayrlhf.config.trainers import FrozenConfig, Positive, Section, Text

__all__ = [
    "ComparedModel",
    "ComparedPromptsConfig",
    "CritiqueConfig",
    "CritiqueSettings",
    "CritiquedPromptsConfig",
    "GeneratorConfig",
    "JudgeConfig",
    "ModelEvaluationConfig",
    "SamplesConfig",
    "SamplingConfig",
    "SamplingSettings",
    "ScoresConfig",
]


class GeneratorConfig(Section):
    """A model that answers and isn't trained."""

    path: Text
    """Model folder, Hugging Face name, .gguf file, or ``package:NAME`` for a Python package that ships one .gguf
    file."""
    tokenizer: Text | None = None
    """Folder or name of the tokenizer; by default the model's."""
    chat_template: Text | None = None
    """File with a Jinja chat template, for a model without one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights, unless ``rollout.dtype`` names another."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


# -- sampling ---------------------------------------------------------------------------------------------------


class SamplesConfig(SamplerConfig):
    samples_per_prompt: Positive = 4
    """Responses that are sampled for each prompt."""


class SamplingSettings(Section):
    form: Literal["pairs", "best", "all"] = "pairs"
    """What is written. ``pairs``: the best response of a prompt over its worst, for reward models and preferences;
    ``best``: the best one, for fine-tuning (best of n); ``all``: every response with its score."""
    pairs_per_prompt: Positive = 1
    """Pairs of one prompt, at most: the best response over the worst, the second best over the second worst, and so on.
    No response stands in two."""
    least_gap: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by less are left out, and ties always."""
    prompts_at_once: Positive = 64
    """Prompts that are generated and scored together."""


class SamplingConfig(JobConfig):
    """Responses of a model, scored and ranked."""

    model_config = ConfigDict(title="rayrlhf configuration of sampling")

    algorithm: Literal["sampling"]
    """Responses of a model, scored and ranked, as preference pairs or examples."""
    policy: GeneratorConfig
    """The model that answers."""
    reward: ScoringConfig
    """What scores responses."""
    rollout: SamplesConfig = SamplesConfig()
    """What generates responses, and how."""
    data: PromptsConfig
    """Where prompts come from."""
    sampling: SamplingSettings = SamplingSettings()
    """What is made of the responses."""


# -- critique and revision --------------------------------------------------------------------------------------


class CritiquedPromptsConfig(PromptsConfig):
    response_column: Text | None = None
    """Column with the responses that are criticised; null: the model's own, sampled first."""


class CritiqueSettings(Section):
    principles: Text
    """YAML file with the principles: a list of sections, each with a ``name`` and a ``text``."""
    critique_prompt: Text | None = None
    """File with the prompt of a critique, with the places ``{prompt}``, ``{response}`` and ``{principle}``; by default a
    built-in one. The answer must end in ``[[REVISE]]`` or ``[[KEEP]]``."""
    revise_prompt: Text | None = None
    """File with the prompt of a revision, with the places ``{prompt}``, ``{response}``, ``{principle}`` and
    ``{critique}``; by default a built-in one."""
    max_critique_tokens: Positive = 256
    """Longest critique, in tokens."""
    max_input_tokens: Positive = 1024
    """Longest prompt of a critique or a revision, in tokens, with the chat template; longer ones are left out, and
    counted."""


class CritiqueConfig(JobConfig):
    """Preference pairs from a model that criticises and revises its own responses (Bai et al. 2022)."""

    model_config = ConfigDict(title="rayrlhf configuration of critique and revision")

    algorithm: Literal["critique"]
    """Preference pairs from a model that criticises and revises its own responses (Bai et al. 2022, Constitutional AI)."""
    policy: GeneratorConfig
    """The model that answers, criticises and revises."""
    rollout: SamplerConfig = SamplerConfig()
    """What generates, and how."""
    data: CritiquedPromptsConfig
    """Where prompts come from."""
    critique: CritiqueSettings
    """By which principles, and with which words."""


# -- evaluation -------------------------------------------------------------------------------------------------


class ComparedModel(Section):
    path: Text
    """Model folder, Hugging Face name, .gguf file, or ``package:NAME``."""
    name: Text | None = None
    """Name in tables and files; by default the last part of the path that isn't ``model``."""
    tokenizer: Text | None = None
    """Folder or name of the tokenizer; by default the model's."""
    chat_template: Text | None = None
    """File with a Jinja chat template, for a model without one."""


class ComparedPromptsConfig(PromptsConfig):
    completion_column: Text | None = None
    """Column with a known good continuation, for the perplexity; null: none is computed."""


class ScoresConfig(ScorerProcesses):
    reward: ScoreSource | None = None
    """The score by which responses are compared: a reward model, a function, or a service; null: only ``judge``
    compares."""
    safety: ScoreSource | None = None
    """A score of how safe a response is; higher is safer."""
    helpfulness: ScoreSource | None = None
    """A score of how helpful a response is; higher is more helpful."""
    tie: float = Field(default=0.0, ge=0)
    """Largest difference of two rewards that is a tie in the win rate. Of safety and helpfulness only equal scores tie."""


class JudgeConfig(Section):
    url: Text
    """Base address of an OpenAI-compatible API, such as ``https://HOST/v1``."""
    model: Text
    """Name of the judge there."""
    token_env: Text | None = None
    """Environment variable with the token; null: no token is sent."""
    prompt: Text | None = None
    """File with the judge's prompt, with the places ``{prompt}``, ``{first}`` and ``{second}``, which asks for ``[[A]]``,
    ``[[B]]`` or ``[[C]]``; by default a built-in one."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Deadline, in seconds, of one attempt."""
    retries: int = Field(default=4, ge=0)
    """Further attempts after a failed one, with pauses of 0.5, 1, 2, ... s in between."""
    max_tokens: Positive = 512
    """Longest answer of the judge, in tokens."""


class ModelEvaluationConfig(JobConfig):
    """Models side by side on the same prompts."""

    model_config = ConfigDict(title="rayrlhf configuration of an evaluation")

    algorithm: Literal["evaluation"]
    """Models side by side on the same prompts: scores, win rates, KL, perplexity, variety, samples."""
    models: Annotated[list[ComparedModel], Field(min_length=1)]
    """The models; each is compared with each."""
    reference: Text | None = None
    """Model to which the KL is measured; by default the first of ``models``."""
    measure: FrozenConfig = FrozenConfig()
    """How the models are run for KL and perplexity."""
    rollout: SamplerConfig = SamplerConfig()
    """What generates responses, and how."""
    data: ComparedPromptsConfig
    """Where prompts come from."""
    scores: ScoresConfig = ScoresConfig()
    """What scores responses."""
    judge: JudgeConfig | None = None
    """A language model that compares responses in both orders; null: none."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the win rates' intervals."""
    samples_shown: int = Field(default=3, ge=0)
    """Prompts whose responses the terminal shows side by side."""
