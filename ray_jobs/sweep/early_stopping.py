"""Early stopping of trials: ASHA among trials of equal cost, and trials that cannot reach the front.

Trials are compared within a method and after equal shares of their own epochs. A method that learns slowly, such as a
multiplexer, is never stopped because an exit head was more accurate at an early epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from ray_jobs.sweep.trials import ACCURACY, EPOCH, FAILED, Trial

PERCENT = "percent"
"""Key of the completed percentage of a trial's epochs, the time of ASHA's rungs."""


class FrontScheduler(FIFOScheduler):
    """Stops a trial after an epoch for one of two reasons, and records the reason.

    - ASHA: at a rung, the trial is not among the best ``1 / reduction`` of the trials of its method and cost.
    - Front: a trial of its method and of equal or lower cost was more accurate after the same share of its epochs by
      more than ``deviations`` standard errors, so sampling noise on the selection split cannot explain the gap.

    Args:
        selection_inputs: number of inputs in the selection split.
        grace: share of its epochs that every trial may run.
        reduction: ASHA's reduction factor.
        deviations: standard errors of the difference from which a trial counts as beaten.
        curves: accuracy per epoch of trials of an earlier start, by name.
        ended: trials that ended in an earlier start without a failure. New trials are compared with them.

    Attributes:
        stopped: reason for each stopped trial, by Tune's trial id.
    """

    def __init__(
        self,
        selection_inputs: int,
        grace: float = 0.3,
        reduction: float = 3,
        deviations: float = 3.0,
        curves: Mapping[str, Mapping[int, float]] | None = None,
        ended: Sequence[Trial] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # unannotated in Ray
        self.selection_inputs, self.grace = selection_inputs, grace
        self.reduction, self.deviations = reduction, deviations
        self.stopped: dict[str, str] = {}
        self._brackets: dict[tuple[str, float], AsyncHyperBandScheduler] = {}
        self._curves: dict[str, dict[int, float]] = {}
        self._set_aside: dict[str, dict[int, float]] = {}
        self._trials: dict[str, Trial] = {}
        self._earlier = {name: dict(curve) for name, curve in (curves or {}).items()}
        for trial in ended:
            self.on_trial_add(None, SimpleNamespace(trial_id=trial.name, config={"trial": trial}))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial to its ASHA bracket; a trial that continues after a failure or an earlier start keeps its curve."""
        mine: Trial = trial.config["trial"]
        self._trials[trial.trial_id] = mine
        self._bracket(mine).on_trial_add(tune_controller, trial)
        self._curves[trial.trial_id] = self._set_aside.pop(trial.trial_id, {})
        for epoch, accuracy in sorted(self._earlier.pop(mine.name, {}).items()):
            self._curves[trial.trial_id][epoch] = accuracy
            if self._may_stop(mine, epoch):
                self._asha(trial, epoch, accuracy)  # only recorded: it was decided then

    def _bracket(self, trial: Trial) -> AsyncHyperBandScheduler:
        key = trial.recipe.method.name, round(trial.cost, 2)
        if key not in self._brackets:
            self._brackets[key] = AsyncHyperBandScheduler(
                time_attr=PERCENT,
                metric=ACCURACY,
                mode="max",
                max_t=100,
                grace_period=max(1, round(100 * self.grace)),
                reduction_factor=self.reduction,
                stop_last_trials=False,
            )
        return self._brackets[key]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop a trial; a trial in its last epoch continues to its evaluation."""
        mine = self._trials[trial.trial_id]
        epoch, accuracy = result.get(EPOCH), result.get(ACCURACY)
        if epoch is None or accuracy is None:
            return str(TrialScheduler.CONTINUE)
        self._curves[trial.trial_id][int(epoch)] = accuracy
        if not self._may_stop(mine, epoch):
            return str(TrialScheduler.CONTINUE)
        why = self.beaten(trial.trial_id, int(epoch))
        if not why and self._asha(trial, epoch, accuracy) == TrialScheduler.STOP:
            why = (
                f"ASHA at epoch {epoch}: its selection accuracy of {accuracy:.1%} is not among the best "
                f"1/{self.reduction:g} of the {mine.recipe.method.name} trials at cost {mine.cost:.2f}"
            )
        if not why:
            return str(TrialScheduler.CONTINUE)
        self.stopped[trial.trial_id] = why
        return str(TrialScheduler.STOP)

    def _may_stop(self, trial: Trial, epoch: float) -> bool:
        """Whether a trial may be stopped after an epoch: after its grace and before its last epoch."""
        epochs = trial.recipe.optim.epochs
        return self.grace * epochs <= epoch < epochs

    def _asha(self, trial: Any, epoch: float, accuracy: float) -> str:
        """Record an accuracy in a trial's ASHA bracket; returns ASHA's decision."""
        mine = self._trials[trial.trial_id]
        result = {PERCENT: 100 * epoch / mine.recipe.optim.epochs, ACCURACY: accuracy}
        return self._bracket(mine).on_trial_result(None, trial, result)  # type: ignore[arg-type]  # it ignores the controller

    def beaten(self, trial_id: str, epoch: int) -> str:
        """The reason why a trial can no longer reach the front; empty if it still can."""
        mine, accuracy = self._trials[trial_id], self._curves[trial_id][epoch]
        share = epoch / mine.recipe.optim.epochs
        for other_id, other in self._trials.items():
            if other_id == trial_id or not self._is_rival(mine, other):
                continue
            reached = [
                (then, found)
                for then, found in self._curves[other_id].items()
                if then <= share * other.recipe.optim.epochs + 1e-9
            ]
            if not reached:
                continue
            then, theirs = max(reached)
            variance = accuracy * (1 - accuracy) + theirs * (1 - theirs)
            if theirs - accuracy > self.deviations * math.sqrt(variance / self.selection_inputs):
                return (
                    f"cannot reach the front: after {share:.0%} of its epochs its selection accuracy is {accuracy:.1%} at "
                    f"cost {mine.cost:.2f}, while that of {other.name} was {theirs:.1%} at epoch {then} at cost {other.cost:.2f}"
                )
        return ""

    @staticmethod
    def _is_rival(mine: Trial, other: Trial) -> bool:
        """Whether a trial has the same method and costs no more."""
        return other.recipe.method.name == mine.recipe.method.name and other.cost <= mine.cost + 1e-9

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Keep the curve of a trial that ended, unless it failed."""
        if result.get(FAILED):
            self.on_trial_error(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Ignore the curve of a trial that failed, until Tune adds the trial again."""
        self._set_aside[trial.trial_id] = self._curves[trial.trial_id]
        self._curves[trial.trial_id] = {}
