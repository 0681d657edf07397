"""Prompts: where they come from, what is wrong with them, their tokens, and the order in which they are used."""

from __future__ import annotations

from rayrlhf.data.prompts import Prompt, PromptData, load_prompts
from rayrlhf.data.report import PromptReport, SourceReport
from rayrlhf.data.sampler import PromptSampler

__all__ = ["Prompt", "PromptData", "PromptReport", "PromptSampler", "SourceReport", "load_prompts"]
