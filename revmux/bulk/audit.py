"""Measure on a sample of the rows how often the answers agree with the plain model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import xxhash

from revmux.bulk.units import Unit

CONFIDENCE = 0.95
"""Confidence of the reported interval."""
STOP_CONFIDENCE = 0.999
"""Confidence with which the agreement must be below the floor to stop a job. The job looks at it after every unit."""


@dataclass(frozen=True)
class Agreement:
    """How often the answers of a sample agree with the plain model.

    Attributes:
        rows: number of audited rows.
        agreed: number of those with the plain model's label.
    """

    rows: int = 0
    agreed: int = 0

    @property
    def share(self) -> float:
        """Share of the audited rows that agree; NaN if there are none."""
        return self.agreed / self.rows if self.rows else math.nan

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Wilson's interval of the share."""
        if not self.rows:
            return 0.0, 1.0
        quantile = NormalDist().inv_cdf((1 + confidence) / 2)
        scale = 1 + quantile**2 / self.rows
        centre = (self.share + quantile**2 / (2 * self.rows)) / scale
        reach = (
            quantile / scale * math.sqrt(self.share * (1 - self.share) / self.rows + (quantile / self.rows) ** 2 / 4)
        )
        return max(0.0, centre - reach), min(1.0, centre + reach)

    def is_below(self, floor: float) -> bool:
        """Whether the agreement is below a floor with :data:`STOP_CONFIDENCE`."""
        return self.rows > 0 and self.interval(STOP_CONFIDENCE)[1] < floor

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.rows + other.rows, self.agreed + other.agreed)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.2%} of {self.rows:,} audited rows ({low:.2%} to {high:.2%})"


def position_hash(unit: Unit, row: int) -> int:
    """A hash of a row's file and number, 64 bits. The text has no part in it: equal texts are separate rows."""
    return xxhash.xxh3_64_intdigest(f"{unit.file}\n{unit.first_row + row}".encode())


def choose_rows(hashes: list[int], share: float, rows: list[int]) -> list[int]:
    """The rows of a sample: each row is in it or not, regardless of all others.

    Args:
        hashes: hash of every row of a unit.
        share: expected share of the rows.
        rows: the rows to choose from.
    """
    limit = share * 2**64
    return [row for row in rows if hashes[row] < limit]
