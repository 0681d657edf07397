"""The keys of training on a fixed set of examples: supervised fine-tuning, reward models, preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from rayrlhf.config.base import RunConfig
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.config.trainers import PolicyConfig, Positive, ReferenceConfig, Section, Text, TrainedConfig

__all__ = [
    "DPOConfig",
    "ExampleSource",
    "ExamplesConfig",
    "GuardConfig",
    "KLRolloutConfig",
    "PreferenceConfig",
    "RewardModelConfig",
    "RewardModelSettings",
    "SFTConfig",
    "SFTSettings",
    "ScorerConfig",
    "TrainingConfig",
]


class ExampleSource(Section):
    path: Text
    """A .jsonl, .json, .parquet or .csv file, or the name of a Hugging Face dataset."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the others': a source of weight 2 is seen twice as often for its
    size. Whole copies of it, then examples drawn without replacement from the run's seed."""
    split: Text = "train"
    """Split of a Hugging Face dataset. Files have no splits."""
    subset: Text | None = None
    """Configuration name of a Hugging Face dataset that has several."""
    prompt_column: Text = "prompt"
    """Column with the prompt: a string, or a list of messages ``{role, content}``."""
    completion_column: Text = "completion"
    """Column with the completion (of sft and of unpaired preferences)."""
    messages_column: Text = "messages"
    """Column with a whole conversation, whose assistant messages are the completions (sft)."""
    chosen_column: Text = "chosen"
    """Column with the better response of a pair: a string or a list of messages, with or without the prompt before it."""
    rejected_column: Text = "rejected"
    """Column with the worse response of a pair."""
    margin_column: Text = "margin"
    """Column with the margin by which a pair's responses differ, where the file has one."""
    label_column: Text = "label"
    """Column that says whether an unpaired completion is desirable."""


Sources = Annotated[list[ExampleSource], Field(min_length=1)]


class ExamplesConfig(Section):
    train: Text | Sources
    """Training examples: one file or dataset name, or a mixture of several sources."""
    validation: Text | Sources | None = None
    """Held-out examples; without it they are taken out of ``train``, whole prompts at a time, by the run's seed."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of ``train``'s prompts that is held out where ``validation`` isn't given. 0: none."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """When the model's chat template is applied. ``auto``: to lists of messages. ``always``: a plain prompt becomes one
    user message, its completion the answer. ``never``: plain strings only."""
    system_prompt: Text | None = None
    """System message that is put before each conversation which has none."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens, with the chat template."""
    max_tokens: Positive = 1024
    """Longest example, in tokens: prompt and completion, EOS included."""
    overlong: Literal["drop", "truncate", "refuse"] = "drop"
    """What happens to longer ones: dropped; prompts cut at their beginning and completions at their end (then without
    EOS); or the run is refused. The counts are shown."""
    shuffle: bool = True
    """New order in each epoch, from the run's seed."""
    limit: Positive | None = None
    """Use only the first so many examples of each source."""


class TrainingConfig(Section):
    epochs: Positive = 1
    """Passes over the training examples."""
    batch_examples: Positive = 32
    """Examples (pairs, for preferences and reward models) of one optimizer step, for the whole cluster. A last batch of
    an epoch that is smaller is trained on too."""
    max_steps: Positive | None = None
    """End after so many optimizer steps, whatever the epochs."""
    validate_every_steps: int = Field(default=0, ge=0)
    """Validate after every so many optimizer steps; 0: after each epoch. Before the first and after the last step it is
    always done."""
    patience: Positive | None = None
    """End after so many validations, one after the other, that are no better than the best; null: never."""
    keep_best: bool = True
    """The final model is that of the best validation, not that of the last step."""


class SFTSettings(Section):
    loss_on: Literal["completions", "all"] = "completions"
    """Which tokens are learnt: those of completions (assistant messages) alone, or all."""


class SFTConfig(RunConfig):
    """Supervised fine-tuning."""

    model_config = ConfigDict(title="rayrlhf configuration of supervised fine-tuning")

    algorithm: Literal["sft"]
    """Supervised fine-tuning on completions."""
    policy: PolicyConfig
    """The model that is trained."""
    data: ExamplesConfig
    """Prompts with completions, or conversations."""
    training: TrainingConfig = TrainingConfig()
    """How long, in which batches, and when it is validated."""
    sft: SFTSettings = SFTSettings()
    """What is learnt."""


class ScorerConfig(TrainedConfig):
    path: Text
    """Model that the reward model starts from: a causal LM (an SFT model, say) or a reward model."""
    tokenizer: Text | None = None
    """Folder or name of the tokenizer; by default the model's."""
    chat_template: Text | None = None
    """File with a Jinja chat template, for a model without one."""


class RewardModelSettings(Section):
    margin: bool = True
    """Take a pair's margin, where the data has one, off the difference of its scores in the loss."""
    center_coef: float = Field(default=0.0, ge=0)
    """Factor of the squared sum of a pair's scores in the loss, which keeps them around 0."""
    normalize: bool = True
    """Shift and scale the final model's scores to mean 0 and deviation 1 over the held-out responses."""
    failures_shown: int = Field(default=20, ge=0)
    """Held-out pairs with the most wrongly ordered scores that are written to failures.jsonl."""


class RewardModelConfig(RunConfig):
    """A reward model from preference pairs."""

    model_config = ConfigDict(title="rayrlhf configuration of a reward model")

    algorithm: Literal["reward_model"]
    """A reward model from preference pairs."""
    policy: ScorerConfig
    """The model that is trained: a scalar head over a language model."""
    data: ExamplesConfig
    """Preference pairs."""
    training: TrainingConfig = TrainingConfig()
    """How long, in which batches, and when it is validated."""
    reward_model: RewardModelSettings = RewardModelSettings()
    """The loss, and what is made of the model at the end."""


class GuardConfig(Section):
    max_kl: float | None = Field(default=0.1, gt=0)
    """Largest KL to the reference, in nats a response token, sampled on held-out prompts; null: no bound."""
    actions: list[Literal["halve_lr", "raise_beta", "roll_back"]] | None = None
    """What is done, one after the other, each time a validation finds the KL above ``max_kl``: halve the learning rate,
    raise beta by half, or go back to the last validated state within the bound. The last one is repeated.
    By default all three in this order, without ``raise_beta`` for losses that have no reference to pull to."""
    kl_prompts: int = Field(default=64, ge=0)
    """Held-out prompts from which the KL is sampled, with responses as ``rollout`` says. 0: it isn't, and there is no
    bound."""


class KLRolloutConfig(RolloutConfig):
    max_response_tokens: Positive = 64
    """Longest response, in tokens, EOS included."""


class DPOConfig(Section):
    loss: Literal["sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo", "kto", "length_normalized"] = (
        "sigmoid"
    )
    """The preference loss. ``simpo`` and ``orpo`` need no reference; ``kto`` takes unpaired examples."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the reference's pull (in ipo: tau; in orpo: the odds ratio's weight lambda)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be labelled the wrong way round (``conservative`` and ``robust``)."""
    simpo_margin: float = Field(default=0.5, ge=0)
    """Target margin gamma of ``simpo``, in units of the reward."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight lambda_D of desirable examples (``kto``)."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight lambda_U of undesirable examples (``kto``)."""
    reference: Literal["live", "cached"] = "cached"
    """Whether the frozen reference's log-probabilities are computed in each step, or once before the first."""
    adaptive_beta: bool = False
    """Raise beta by a tenth after a validation whose KL is above ``target_kl``, lower it where it is below half of it."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL, in nats a response token, that ``adaptive_beta`` aims at."""
    curriculum: bool = False
    """In the first epoch, pairs with the largest reward gap (the data's margin, else the reference's implicit one) come
    first."""


class PreferenceConfig(RunConfig):
    """Direct preference optimisation and its kin."""

    model_config = ConfigDict(title="rayrlhf configuration of preference optimisation")

    algorithm: Literal["dpo"]
    """Direct preference optimisation; ``dpo.loss`` names the variant."""
    policy: PolicyConfig
    """The model that is trained."""
    reference: ReferenceConfig | None = ReferenceConfig()
    """The frozen model that the policy is compared with; null for losses that need none."""
    data: ExamplesConfig
    """Preference pairs, or labelled completions for ``kto``."""
    training: TrainingConfig = TrainingConfig()
    """How long, in which batches, and when it is validated."""
    dpo: DPOConfig = DPOConfig()
    """The loss."""
    guard: GuardConfig = GuardConfig()
    """What keeps the policy near its reference."""
    rollout: KLRolloutConfig = KLRolloutConfig()
    """What samples the responses from which the KL is measured."""
