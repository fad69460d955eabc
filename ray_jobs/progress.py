"""A sweep's progress in words."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback


class SweepProgress(Callback):
    """One line a finished trial: done, left, best so far, time left.

    Args:
        total: trials in the sweep.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = self.failed = 0
        self.best = ("", 0.0, 0.0)
        self.started = time.perf_counter()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial ends well."""
        self.done += 1
        result = trial.last_result
        if result.get("accuracy_mean", 0.0) > self.best[1]:
            self.best = (str(trial), result["accuracy_mean"], result["cost_counted"])
        self._tell(f"{trial}: accuracy {result['accuracy_mean']:.1%} at cost {result['cost_counted']:.2f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune calls this when a trial fails; the sweep goes on."""
        self.failed += 1
        self._tell(f"{trial} failed: {trial.error_file or 'see its log'}")

    def _tell(self, what: str) -> None:
        ended = self.done + self.failed
        left = (time.perf_counter() - self.started) / ended * (self.total - ended)
        name, accuracy, cost = self.best
        print(
            f"sweep {ended}/{self.total} ({self.failed} failed), {left:.0f} s left; {what}; "
            f"best {name} {accuracy:.1%} at {cost:.2f}",
            flush=True,
        )
