"""Confidence limits of a loss of accuracy, from paired differences.

On one input, a system loses against the plain model, wins, or is as good. The numbers of the three outcomes follow a
trinomial distribution. The limits come from the exact unconditional test of a difference of paired shares (Suissa and
Shuster, 1991; with the nuisance parameter confined to a confidence set, Berger and Boos, 1994). They hold at any
number of inputs, also if few or none of them differ.

Answers over several groupings give an input a mean between the outcomes. The number of inputs is then the effective
one, as for the exact limits of shares in surveys (Korn and Graubard, 1998).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from revmux.utils.extras import require

Floats = NDArray[np.float64]

OUTSIDE = 0.01
"""Part of the error probability that the confidence set of the share of inputs that differ may use."""
SHARES = 15
"""Values of that share at which the test is computed."""
PRECISION = 1e-6
"""Largest error of a limit, as a share."""


def loss_bound(differences: Floats, confidence: float) -> float:
    """The one-sided upper bound of a mean loss, in points.

    Args:
        differences: (M,) in -1..1, positive if SISO was correct more often.
        confidence: probability that the loss does not exceed the bound.
    """
    inputs, lost, won = _counts(differences)
    mean, reach = (lost - won) / inputs, (6 * math.sqrt(lost + won) + 20) / inputs
    if mean + reach >= 1:
        reach = 1 - mean
    if not reach:
        return 100.0
    optimize = require("scipy.optimize", "plan")

    def excess(loss: float) -> float:
        return _p_value(inputs, lost, won, loss, OUTSIDE * (1 - confidence)) - (1 - confidence)

    found = float(optimize.brentq(excess, max(-1.0, mean - reach), mean + reach, xtol=PRECISION)) + PRECISION
    # Counts are whole numbers, so the p-value does not fall smoothly: a larger loss next to the root may still be possible.
    step = (found - mean) / 80
    above = [found + step * number for number in range(8, 0, -1)]
    return 100 * min(1.0, next((loss + step for loss in above if loss < 1 and excess(loss) > 0), found))


def loss_interval(differences: Floats, confidence: float) -> tuple[float, float]:
    """The two-sided interval of a mean loss, in points; for the arguments, see :func:`loss_bound`."""
    each = (1 + confidence) / 2
    return -loss_bound(-differences, each), loss_bound(differences, each)


def expected_bound(loss: Floats, differing: Floats, searched: int, tested: int, confidence: float) -> Floats:
    """The upper bound that a test will probably find, from the answers to other inputs, in points.

    A system that differs from SISO on few inputs has a bound close to its loss. Of two systems with the same loss, it is
    therefore the better candidate. One standard error is added, so that a lucky search does not come first.

    Args:
        loss: mean loss in the search, any shape.
        differing: mean squared difference, same shape.
        searched: number of inputs of the search.
        tested: number of inputs of the test.
        confidence: of the test.
    """
    quantile = float(require("scipy.stats", "plan").norm.ppf(confidence))
    deviation = np.sqrt((differing * searched + 1) / (searched + 1))
    reach = quantile / math.sqrt(tested) + math.sqrt(1 / searched + 1 / tested)
    bound: Floats = 100 * (loss + deviation * reach)
    return bound


def _counts(differences: Floats) -> tuple[int, int, int]:
    """The effective number of inputs, and how many of them are lost and won, rounded towards a larger loss."""
    size = np.abs(differences).sum()
    ratio = float(size / np.square(differences).sum()) if size else 1.0  # 1 for a single grouping
    inputs = math.floor(len(differences) * ratio + 1e-9)
    lost = min(inputs, math.ceil(float(differences.clip(min=0).sum()) * ratio - 1e-9))
    won = min(inputs - lost, math.floor(float((-differences).clip(min=0).sum()) * ratio + 1e-9))
    return inputs, lost, won


def _p_value(inputs: int, lost: int, won: int, loss: float, outside: float) -> float:
    """The probability of counts that speak at least as much for a smaller loss, if the true one is ``loss`` (0..1).

    The statistic is the observed loss minus ``loss``, over its deviation. Given m inputs that differ, the number of lost
    ones is binomial, so the probability is a sum over m. It is the largest one over the shares of a confidence set, and
    ``outside``, the probability that the true share is not in this set, is added.
    """
    stats, special = require("scipy.stats", "plan"), require("scipy.special", "plan")
    differ = lost + won
    lower = float(stats.beta.ppf(outside / 2, differ, inputs - differ + 1)) if differ else 0.0
    upper = float(stats.beta.ppf(1 - outside / 2, differ + 1, inputs - differ)) if differ < inputs else 1.0
    lower = max(lower, abs(loss), 1e-12)  # at least |loss| of the inputs differ
    share = np.geomspace(lower, max(lower, upper), SHARES)[:, None]  # (SHARES, 1)
    least = max(inputs * abs(loss), 1.0)
    statistic = (lost - won - inputs * loss) / math.sqrt(max(differ, least))
    first, last = stats.binom.ppf([1e-9, 1 - 1e-9], inputs, [share[0, 0], share[-1, 0]])
    counts = np.arange(int(first), int(last) + 1)  # (m,)
    most = np.floor((counts + inputs * loss + statistic * np.sqrt(np.maximum(counts, least))) / 2 + 1e-9)
    most = most.clip(max=counts)  # largest number of lost inputs that is as extreme
    tail = special.bdtr(most.clip(min=0), counts, ((share + loss) / 2 / share).clip(0, 1))
    tail = np.where(most < 0, 0.0, tail)
    return float((stats.binom.pmf(counts, inputs, share) * tail).sum(axis=1).max()) + outside
