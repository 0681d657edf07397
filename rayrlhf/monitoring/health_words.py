"""What each health warning usually means, and which keys of the configuration to turn."""

from __future__ import annotations

from typing import Literal, NamedTuple

from rayrlhf.config.health import RuleName

__all__ = ["WORDS", "Family", "Words"]

Family = Literal["ppo", "preferences", "reward_model", "sft"]


class Words(NamedTuple):
    means: str
    ppo: str = ""
    """Which keys to turn in a run of PPO; below, in those of the others. Empty: the others' metrics never trip it."""
    preferences: str = ""
    reward_model: str = ""
    sft: str = ""

    def turn(self, family: Family) -> str:
        """Which keys to turn in a run of this family."""
        return str(getattr(self, family)) or self.ppo or self.preferences


_LESS_DRIFT = "dpo.beta up, policy.optimizer.lr down, guard.max_kl down"
_SLOWER = "policy.optimizer.lr down, policy.optimizer.max_grad_norm down, training.batch_examples up"
_FASTER = "policy.optimizer.lr up, training.epochs up"

WORDS: dict[RuleName, Words] = {
    "reward_hacking": Words(
        "the policy has found what the reward overrates, far away from the reference; read samples.jsonl",
        "ppo.kl_coef up (or ppo.kl_controller=adaptive with ppo.target_kl), policy.optimizer.lr down, reward.clip set; "
        "a further source in reward.sources",
        _LESS_DRIFT,
    ),
    "score_ceiling": Words(
        "nearly all responses get the highest score: there is nothing left to learn, or the reward is too easy",
        "ppo.steps down, or harder data.prompts; another source in reward.sources; reward.clip up where scores are clipped",
    ),
    "kl_too_high": Words(
        "the policy has drifted far from the reference: fluency and knowledge suffer",
        "ppo.kl_coef up, ppo.target_kl down (with ppo.kl_controller=adaptive), policy.optimizer.lr down, ppo.ppo_epochs down",
        _LESS_DRIFT,
    ),
    "kl_too_low": Words(
        "the policy hardly moves and learns nothing",
        "policy.optimizer.lr up, ppo.kl_coef down, ppo.ppo_epochs up",
        "policy.optimizer.lr up, dpo.beta down, training.epochs up",
    ),
    "kl_flat": Words(
        "there are gradients, but the policy stays the same: updates smaller than the weights' type can hold, or weights "
        "that never reach the engine",
        "policy.optimizer.lr up, policy.dtype=float32; rollout.verify_weights=always tells whether weights arrive",
        "policy.optimizer.lr up, policy.dtype=float32; rollout.verify_weights=always tells whether weights arrive",
    ),
    "collapse": Words(
        "the policy says the same again and again and no longer explores",
        "ppo.entropy_coef up, ppo.kl_coef up, policy.optimizer.lr down, rollout.temperature up",
        _LESS_DRIFT,
    ),
    "length_drift": Words(
        "the reward pays for length (or for brevity) rather than for quality",
        "reward.length_penalty up (for longer responses), reward.missing_eos_penalty up, ppo.kl_coef up",
        "dpo.loss=length_normalized or simpo, dpo.beta up; look for chosen responses that are longer than rejected ones",
    ),
    "loss_spike": Words(
        "one update was too large, or its batch out of the ordinary",
        "policy.optimizer.lr down (critic.optimizer.lr for value_loss), policy.optimizer.max_grad_norm down, reward.clip set",
        _SLOWER,
        _SLOWER,
        _SLOWER,
    ),
    "value_not_learning": Words(
        "the critic predicts returns no better than a constant, so advantages are noise",
        "critic.optimizer.lr up, ppo.ppo_epochs up, ppo.clip_range_value up or null, critic.num_layers up; "
        "reward.normalize=true where scores are large; or ppo.advantage_estimator=rloo, which needs no critic",
    ),
    "oscillation": Words(
        "updates overshoot, or two forces (learning rate and KL control, policy and critic) work against each other",
        "policy.optimizer.lr down, critic.optimizer.lr down, ppo.kl_horizon up, ppo.prompts_per_step up",
        _SLOWER,
        _SLOWER,
        _SLOWER,
    ),
    "clipfrac_high": Words(
        "each step moves the policy further than clipping allows: much of the data is thrown away",
        "policy.optimizer.lr down, ppo.ppo_epochs down, ppo.minibatch_samples up",
    ),
    "truncation": Words(
        "the policy no longer ends its responses in time; cut ones are scored as they are",
        "rollout.max_response_tokens up, reward.missing_eos_penalty up, reward.length_penalty up, "
        "ppo.truncated_responses=mask",
        "rollout.max_response_tokens up, dpo.beta up; look for responses without EOS in the data",
    ),
    "rollout_mismatch": Words(
        "engine and trainer disagree about the probabilities of the same tokens: numerics, or old weights",
        "rollout.dtype the same as policy.dtype, policy.dtype=float32, rollout.verify_weights=always; "
        "ppo.importance_sampling_cap set",
    ),
    "skipped_steps": Words(
        "losses or gradients were not finite; the minibatches are kept in the run's folder",
        "policy.optimizer.lr down (critic.optimizer.lr for the critic), policy.dtype=float32, reward.clip set",
        "policy.optimizer.lr down, policy.dtype=float32",
        "policy.optimizer.lr down, policy.dtype=float32",
        "policy.optimizer.lr down, policy.dtype=float32",
    ),
    "margins_falling": Words(
        "the model unlearns what it had learnt: too large a learning rate, contradicting pairs, or too many epochs",
        preferences="policy.optimizer.lr down, training.epochs down, training.keep_best=true; `rayrlhf data check` the pairs",
        reward_model="policy.optimizer.lr down, training.epochs down, training.keep_best=true; `rayrlhf data check` the pairs",
    ),
    "accuracy_at_chance": Words(
        "pairs are ordered no better than by a coin: nothing is learnt, or chosen and rejected are mixed up",
        preferences=f"{_FASTER}, dpo.beta up; `rayrlhf data check` the pairs",
        reward_model=f"{_FASTER}; `rayrlhf data check` the pairs",
    ),
    "chosen_sinking": Words(
        "the margin grows only because rejected responses sink faster: probability goes to responses in neither",
        preferences="policy.optimizer.lr down, dpo.beta up, dpo.loss=ipo or orpo, training.epochs down; sft on the chosen "
        "responses first",
    ),
}
