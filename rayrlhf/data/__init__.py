"""Prompts, examples and preference pairs: where they come from, what is wrong with them, their tokens, and the order in
which they are used."""

from __future__ import annotations

from rayrlhf.data.batches import example_batch, labelled_batch, pair_batch
from rayrlhf.data.check import check_file
from rayrlhf.data.cleaning import Cleaned, fix
from rayrlhf.data.examples import Example, ExampleData, Pair, load_examples, load_labelled, load_pairs
from rayrlhf.data.findings import CheckReport, Finding
from rayrlhf.data.prompts import Prompt, PromptData, load_all_prompts, load_prompts
from rayrlhf.data.report import ExampleReport, LengthReport, PromptReport, SourceReport
from rayrlhf.data.sampler import PromptSampler

__all__ = [
    "CheckReport",
    "Cleaned",
    "Example",
    "ExampleData",
    "ExampleReport",
    "Finding",
    "LengthReport",
    "Pair",
    "Prompt",
    "PromptData",
    "PromptReport",
    "PromptSampler",
    "SourceReport",
    "check_file",
    "example_batch",
    "fix",
    "labelled_batch",
    "load_all_prompts",
    "load_examples",
    "load_labelled",
    "load_pairs",
    "load_prompts",
    "pair_batch",
]
