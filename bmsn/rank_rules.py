"""Ways to rank architectures by a whole table of accuracies acc[c,m], of every architecture in every supernet.

Numbers alone: no torch, no search. Source of `assigned`: Javan et al. 2023, section 2.3; of `best`: their released
code, which scores all pairs. The others answer what those two leave open: supernets differ in level, and an
architecture's accuracy in one of them is a noisy view of it.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bmsn.errors import InputError

RankRule = Literal["assigned", "best", "mean", "weighted", "level"]
RANK_RULES: tuple[RankRule, ...] = get_args(RankRule)
# `--rank-by` in words, after "Ranked by". The first two are accuracies of one supernet, and begin so.
IN_WORDS: dict[RankRule, str] = {
    "assigned": "validation accuracy",
    "best": "validation accuracy in the best supernet of each",
    "mean": "the mean of validation accuracies over all supernets",
    "weighted": "the mean of validation accuracies over all supernets, weighted by p(m|c)",
    "level": "validation accuracy corrected for the level of its supernet",
}
_DIGITS = (
    12  # what is equal but for the order of a sum stays equal: a rounding is no reason to rank one above the other
)


def rank_values(
    rule: RankRule, accuracy: NDArray[np.float64], assignment: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What each architecture is worth by a rule.

        assigned   acc[c, m*],  m* = argmax_m p(m|c)
        best       max_m acc[c, m]
        mean       mean_m acc[c, m]
        weighted   sum_m p(m|c) acc[c, m]
        level      acc[c, m*] - mean_c' acc[c', m*] + mean acc

    `level` takes out that one supernet is better than another at all architectures alike. The column means of a whole
    table are also the columns' part of the least-squares fit acc[c, m] = r[c] + s[m], so there is nothing to iterate;
    the mean of all brings it back to the scale of an accuracy, but it may leave [0, 1]. With one supernet all rules
    rank alike.

    Args:
        accuracy: (C, M), without gaps.
        assignment: (C, M), p(m|c).
    Returns:
        values: (C,), larger is better; supernets: (C,), the one whose accuracy stands for the architecture: the best
        one for `best`, else m*. Of equal ones the first.
    Raises:
        InputError: tables of different shapes or with gaps.
    """
    if accuracy.shape != assignment.shape or accuracy.ndim != 2 or 0 in accuracy.shape:
        raise InputError(f"accuracy and assignment must be (C, M) alike; got {accuracy.shape} and {assignment.shape}")
    if not (np.isfinite(accuracy).all() and np.isfinite(assignment).all()):
        raise InputError("accuracy and assignment must be finite for all architectures and supernets")
    supernets = (accuracy if rule == "best" else assignment).argmax(1)
    values = accuracy[np.arange(len(accuracy)), supernets]
    if rule == "mean":
        values = accuracy.mean(1)
    elif rule == "weighted":
        values = (assignment * accuracy).sum(1)
    elif rule == "level":
        values = values - accuracy.mean(0)[supernets] + accuracy.mean()
    return values.round(_DIGITS), supernets
