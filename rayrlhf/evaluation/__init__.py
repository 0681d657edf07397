"""What a policy is worth on held-out prompts."""

from __future__ import annotations

from rayrlhf.evaluation.measures import distinct_n, mean_and_stderr

__all__ = ["distinct_n", "mean_and_stderr"]
