"""A reward without a model: the sentiment of a response, from the VADER lexicon (Hutto & Gilbert 2014)."""

from __future__ import annotations

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def positive(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound score of each response, from -1 (negative) to 1 (positive)."""
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]
