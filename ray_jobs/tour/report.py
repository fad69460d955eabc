"""The figures that the quickstart reports: accuracy on the test split and throughput of every system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ray_jobs.planning.config import PlanJob
from ray_jobs.sweep.trials import TrialRow
from ray_jobs.tour.config import QuickstartJob
from revmux.adapters.folder import load_adapter
from revmux.data.task import TaskData
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.features.store import open_features
from revmux.methods import Siso
from revmux.model import plain_classifier
from revmux.plan.front import FrontRow
from revmux.plan.plan import Plan
from revmux.plan.report import front_row
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import MethodConfig
from revmux.training.evaluation import evaluate
from revmux.training.recipe import relative_cost_at

TIMED_INPUTS, TIMED_BATCH = 64, 32


class Reporter:
    """Measures the systems of the quickstart in this process.

    Args:
        job: settings of the quickstart.
        plan_job: the plan's settings, with the frozen task model and the store.
        task: the task with its real test split.
    """

    def __init__(self, job: QuickstartJob, plan_job: PlanJob, task: TaskData) -> None:
        self.job, self.plan_job, self.task = job, plan_job, task
        self.pretrained = load_pretrained(plan_job.backbone)
        self.pretrained.backbone.freeze()
        self.rows: list[dict[str, Any]] = []

    def evaluate(self, trained: Sequence[TrialRow]) -> list[dict[str, Any]]:
        """Evaluate SISO and every trained system on the test split, and time each against SISO.

        Args:
            trained: rows of finished trials.

        Returns:
            The rows of the results file.
        """
        split = self.pretrained.tokenize(self.task.test, self.job.backbone.max_length)
        layers = sorted({row.prefill_layers for row in trained})
        store = open_features(self.pretrained, split, layers, self.plan_job.store)
        inputs = min(self.job.measure.throughput_inputs or TIMED_INPUTS, TIMED_INPUTS)
        batches = like_length_batches(split, inputs, TIMED_BATCH)
        plain = plain_classifier(self.pretrained.backbone)
        for trial in trained:
            model = load_adapter(str(trial.adapter), self.pretrained)
            features = store.at(model.prefill_layers)
            figures = evaluate(model, features, self.job.shuffles).metrics()
            figures |= {"cost_counted": relative_cost_at(model, features)}
            figures |= {"tunable_params": trial.metrics["tunable_params"]}
            ratio = paired_throughput(plain, model, batches)
            option = type(model.method).exit_option
            depth = trial.prefill_layers if option is None else model.method.exit_layer()
            method = MethodConfig(trial.method, trial.num_inputs, depth)
            timed = {"throughput_ratio": round(ratio.median, 3), "throughput_pairs": asdict(ratio)}
            self.rows.append(self._row(method, figures) | timed)
        if self.rows:
            accuracy = self.rows[0]["siso_accuracy"]
            figures = {"accuracy_mean": accuracy, "siso_accuracy": accuracy, "accuracy_std": 0.0, "siso_agreement": 1.0}
            figures |= {"cost_counted": 1.0, "tunable_params": 0.0}
            self.rows.insert(0, self._row(MethodConfig(Siso.name, 1, 0), figures) | {"throughput_ratio": 1.0})
        return self.rows

    def front_rows(self) -> list[FrontRow]:
        """The rows as points of the plot."""
        return [front_row(row) for row in self.rows]

    def planned_rows(self, plan: Plan) -> list[FrontRow]:
        """The plan's chosen system as a point of the plot at its accuracy on the test split, unless it is SISO."""
        chosen = plan.choice.chosen
        if chosen is None or chosen.candidate.is_plain or not plan.served or not self.rows:
            return []
        siso = self.rows[0]["accuracy_mean"]
        row = chosen.candidate.row(siso)
        accuracy = siso - plan.served[-1].verification.loss / 100
        return [replace(row, name=f"{row.name}, planned", accuracy=accuracy, throughput_ratio=None, accuracy_std=0.0)]

    def _row(self, method: MethodConfig, figures: dict[str, float]) -> dict[str, Any]:
        return {
            "method": method.name,
            "family": self.pretrained.backbone.config.model_type,
            "backbone": self.pretrained.identity["name"],
            "task": self.task.identity["source"],
            "num_inputs": method.num_inputs,
            "prefill_layers": method.prefill_layers,
            "fallback": 0,
            "seeds": 1,
            "tunable_params": int(figures["tunable_params"]),
        } | {
            name: figures[name]
            for name in ("accuracy_mean", "accuracy_std", "siso_accuracy", "siso_agreement", "cost_counted")
        }
