"""Confidence limits of a loss of accuracy, from paired differences.

The limits combine the score limits of the share lost and the share won (Newcombe, 1998; Zou and Donner, 2008). They remain
valid if few inputs differ: zero differences on few inputs do not give a bound of zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from revmux.utils.extras import require

Floats = NDArray[np.float64]


def loss_bound(differences: Floats, confidence: float) -> float:
    """The one-sided upper bound of a mean loss, in points.

    Args:
        differences: (M,) in -1..1, positive if SISO was correct more often.
        confidence: probability that the loss does not exceed the bound.
    """
    return 100 * float(_loss_interval(differences, _student(confidence, len(differences)))[1])


def loss_interval(differences: Floats, confidence: float) -> tuple[float, float]:
    """The two-sided interval of a mean loss, in points; for the arguments, see :func:`loss_bound`."""
    lower, upper = _loss_interval(differences, _student((1 + confidence) / 2, len(differences)))
    return 100 * float(lower), 100 * float(upper)


def _loss_interval(differences: Floats, quantile: float) -> tuple[Floats, Floats]:
    """The interval of a mean loss, from the limits of the share lost and the share won.

    The distances of the two limits from their means are combined as the root of the sum of their squares.

    Args:
        differences: (..., M) in -1..1, positive if SISO was correct more often.
        quantile: quantile of the studentised error on each side.

    Returns:
        Lower and upper ends, both (...).
    """
    lost, won = differences.clip(min=0), (-differences).clip(min=0)
    lost_lower, lost_upper = _score_limits(lost, quantile)
    won_lower, won_upper = _score_limits(won, quantile)
    loss, lost_mean, won_mean = differences.mean(axis=-1), lost.mean(axis=-1), won.mean(axis=-1)
    lower = loss - np.hypot(lost_mean - lost_lower, won_upper - won_mean)
    upper = loss + np.hypot(lost_upper - lost_mean, won_mean - won_lower)
    return lower, upper


def _score_limits(shares: Floats, quantile: float) -> tuple[Floats, Floats]:
    """Wilson's limits of a mean share.

    Shares that are means over groupings vary less than single answers of 0 or 1. The number of inputs is increased by
    the ratio of the two variances.

    Args:
        shares: (..., M) in 0..1.
        quantile: quantile of the studentised error.

    Returns:
        Lower and upper limits, both (...).
    """
    mean, variance = shares.mean(axis=-1), shares.var(axis=-1)
    variance_ratio = np.divide(mean * (1 - mean), variance, out=np.ones_like(mean), where=variance > 0)
    inputs = shares.shape[-1] * variance_ratio
    centre = mean + quantile**2 / (2 * inputs)
    reach = quantile * np.sqrt(mean * (1 - mean) / inputs + quantile**2 / (4 * inputs**2))
    scale = 1 + quantile**2 / inputs
    return (centre - reach) / scale, (centre + reach) / scale


def _student(level: float, inputs: int) -> float:
    """Quantile of Student's t for a mean of ``inputs`` values."""
    return float(require("scipy.stats", "plan").t.ppf(level, max(1, inputs - 1)))
