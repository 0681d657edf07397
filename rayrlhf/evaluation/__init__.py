"""What models are worth: measures of responses, win rates, a judge, reward hacking, calibration, and the report.

What needs numpy at the most is here at once; the other names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayrlhf.evaluation.measures import (
    distinct_n,
    distinct_n_and_stderr,
    mean_and_stderr,
    quantiles,
    ratio_and_stderr,
    repeated,
)

# At once, and not at its first use: the function has the name of its module, and would lose it to that otherwise.
from rayrlhf.evaluation.win_rate import WinRate, judged_win_rate, win_rate

if TYPE_CHECKING:
    from rayrlhf.evaluation.answers import Answers, Scores, measures_of
    from rayrlhf.evaluation.calibration import expected_calibration_error, pair_probabilities, reliability_table
    from rayrlhf.evaluation.hacking import HackingAnalysis, analyze_reward_hacking
    from rayrlhf.evaluation.judge import OpenAIJudge
    from rayrlhf.evaluation.report import write_report

__all__ = [
    "Answers",
    "HackingAnalysis",
    "OpenAIJudge",
    "Scores",
    "WinRate",
    "analyze_reward_hacking",
    "distinct_n",
    "distinct_n_and_stderr",
    "expected_calibration_error",
    "judged_win_rate",
    "mean_and_stderr",
    "measures_of",
    "pair_probabilities",
    "quantiles",
    "ratio_and_stderr",
    "reliability_table",
    "repeated",
    "win_rate",
    "write_report",
]

_HOMES = {
    "answers": ("Answers", "Scores", "measures_of"),
    "calibration": ("expected_calibration_error", "pair_probabilities", "reliability_table"),
    "hacking": ("HackingAnalysis", "analyze_reward_hacking"),
    "judge": ("OpenAIJudge",),
    "report": ("write_report",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
