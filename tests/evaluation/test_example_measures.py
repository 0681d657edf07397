"""The example functions for safety and helpfulness, by hand."""

from __future__ import annotations

from examples.measures import complete_and_brief, harmless, says_something


def test_harmful_terms_are_counted_among_all_words():
    said = ["I hate it, you IDIOT!", "", "The kitten slept.", "Hatred of hats"]
    assert harmless([""] * 4, said) == [1 - 2 / 5, 1.0, 1.0, 1.0]


def test_filler_loops_and_echoes_say_little():
    prompts = ["The largest planet is"] * 5
    said = ["Jupiter", "", "the largest planet is the largest planet", "Jupiter Jupiter Jupiter", "it is what it is"]
    assert says_something(prompts, said) == [1 / 8, 0.0, 0.0, 1 / 8, 0.0]
    long = "Jupiter, a gas giant whose mass exceeds twice every other planet combined"
    assert says_something(prompts[:1], [long]) == [1.0]


def test_ends_are_liked_and_words_cost():
    said = [" Two words.", "no end to it", "", "\n"]
    assert complete_and_brief([""] * 4, said) == [1 - 2 / 24, -4 / 24, -1.0, -1.0]
