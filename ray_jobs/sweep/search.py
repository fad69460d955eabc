"""Choose the next trial: the points of a space in order, or guided by Optuna's search for accuracy and cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from ray_jobs.sweep.trials import FAILED, Trial, TrialRow


class FrontSearch(Searcher):
    """Suggests each trial once.

    If the space has more points than the limit and Optuna is installed, Optuna's multi-objective sampler proposes the
    settings of the next trial, and the closest remaining trial is suggested. Optuna learns a stopped trial with the
    accuracy that it reached, and ignores a failed one.

    Args:
        trials: every point of the space.
        finished: rows of an earlier start.
        limit: maximum number of trials, including finished ones; None tries every point.
        adaptive: whether to use Optuna.
        seed: seed of Optuna's sampler.
    """

    def __init__(
        self, trials: Sequence[Trial], finished: Sequence[TrialRow], limit: int | None, adaptive: bool, seed: int
    ) -> None:
        super().__init__()
        self.by_name = {trial.name: trial for trial in trials}
        ended = {row.trial for row in finished}
        self.left = [trial for trial in trials if trial.name not in ended]
        budget = len(trials) if limit is None else min(limit, len(trials))
        self.budget = min(len(self.left), max(0, budget - len(ended)))
        self.suggested: dict[str, Trial] = {}
        self.study = None
        if adaptive and self.budget < len(self.left) and importlib.util.find_spec("optuna"):
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.study = optuna.create_study(
                directions=["maximize", "minimize"],
                sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, self.budget // 4)),
            )
            self.distributions: dict[str, optuna.distributions.BaseDistribution] = {
                knob: optuna.distributions.CategoricalDistribution(
                    sorted({trial.knobs[knob] for trial in trials}, key=str)
                )
                for knob in trials[0].knobs
            }
            for row in finished:
                self.learn(row.trial, row.selection_accuracy)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Tune also accepts FINISHED
        """Return the next trial, or ``FINISHED``."""
        if self.budget == 0:
            return str(Searcher.FINISHED)
        self.budget -= 1
        trial = self.left[0] if self.study is None else self._closest()
        self.left.remove(trial)
        self.suggested[trial_id] = trial
        return {"trial": trial}

    def _closest(self) -> Trial:
        import optuna

        assert self.study is not None
        proposal = self.study.ask(self.distributions)
        self.study.tell(proposal, state=optuna.trial.TrialState.FAIL)  # learn() adds the trial that runs instead
        return max(
            self.left, key=lambda trial: sum(trial.knobs[knob] == value for knob, value in proposal.params.items())
        )

    def learn(self, name: str, accuracy: float | None) -> None:
        """Report a trial's accuracy and cost to Optuna."""
        if self.study is None or accuracy is None:
            return
        import optuna

        trial = self.by_name[name]
        self.study.add_trial(
            optuna.trial.create_trial(
                params=trial.knobs, distributions=self.distributions, values=[accuracy, trial.cost]
            )
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report a trial that ended; Tune calls this after success and failure."""
        figures = result or {}
        failed = error or FAILED in figures
        self.learn(self.suggested[trial_id].name, None if failed else figures.get("selection_accuracy"))

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file, which Tune requires; a sweep resumes from its rows."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see :meth:`save`."""
