"""The price of a job, from the time of its workers and the price of an hour of a worker's hardware."""

from __future__ import annotations

from dataclasses import dataclass

from revmux.estimate.price import SECONDS_PER_HOUR, price_per_million


@dataclass(frozen=True)
class JobPrice:
    """What the rows so far cost, in the currency of the price of an hour.

    Attributes:
        so_far: price of the workers' time, with the loading of the model and the audit.
        per_million: price of a million rows.
        plain: price of the same rows in the plain model, by counted cost.
    """

    so_far: float
    per_million: float
    plain: float

    def __str__(self) -> str:
        return (
            f"price {self.so_far:,.2f}, {self.per_million:,.2f} per million rows, with the plain model by counted cost "
            f"{self.plain:,.2f}"
        )


def job_price(rows: int, worker_seconds: float, price_per_hour: float, relative_cost: float) -> JobPrice:
    """Compute the price of a job's rows.

    Args:
        rows: number of rows, above 0.
        worker_seconds: time of all workers, above 0.
        price_per_hour: price of an hour of a worker's hardware, in any currency.
        relative_cost: counted cost of the answers and of the audit, divided by that of the plain model.
    """
    so_far = price_per_hour * worker_seconds / SECONDS_PER_HOUR
    return JobPrice(so_far, price_per_million(rows / worker_seconds, price_per_hour), so_far / relative_cost)
