"""The loss of a reward model.

Letters: P pairs, s_w the score of the chosen response, s_l that of the rejected one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bradley_terry_loss"]


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None, center_coef: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the preference, for a reward model.

    Bradley and Terry 1952, as in Ouyang et al. 2022, "Training language models to follow instructions with human
    feedback", eq. 1; with the margin m of Touvron et al. 2023, "Llama 2", eq. 2, and the term of Eisenstein et al. 2023,
    "Helping or herding?", section 2, that keeps scores around 0:
    ``L = -log sigma(s_w - s_l - m) + c (s_w + s_l)^2``.

    Args:
        chosen_scores: [P], s_w.
        rejected_scores: [P], s_l.
        margin: [P], m; NaN where a pair has none. None: no pair has one.
        center_coef: c, >= 0.

    Returns:
        [P], not reduced. ln 2 for equal scores without a margin.

    Raises:
        ValueError: for a negative ``center_coef``.
    """
    if not center_coef >= 0:
        raise ValueError(f"center_coef of {center_coef}: it must be 0 or more")
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - torch.where(margin.isnan(), 0.0, margin).to(difference.dtype)
    return -F.logsigmoid(difference) + center_coef * (chosen_scores + rejected_scores).square()
