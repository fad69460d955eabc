"""Training progress: a bar on a terminal, plain lines in a log, curves in MLflow."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.experimental import tqdm_ray

from ray_jobs.tracking.outbox import BufferedClient
from ray_jobs.tracking.tracker import log_metrics
from ray_jobs.training.progress_board import Poster
from revmux.training.trainer import EpochReport, Trainer
from revmux.utils.redact import error_line, without_passwords

_log = logging.getLogger(__name__)


class TrainProgress:
    """Reports the progress of a run; used on rank 0.

    Args:
        title: name of the run in printed lines.
        trainer: the trainer, positioned at the step from which it starts; rates count only later steps.
        tracking_uri: MLflow store.
        run_id: the MLflow run to log to.
        outbox: folder or URI for records while MLflow cannot be reached.
        live: whether to draw a bar.
        interval: seconds between lines, and between points of MLflow's ``live/`` curves, within an epoch.
    """

    def __init__(
        self,
        title: str,
        trainer: Trainer,
        tracking_uri: str,
        run_id: str,
        outbox: str,
        live: bool,
        interval: float = 30.0,
    ) -> None:
        self.title, self.trainer = title, trainer
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.client = BufferedClient(tracking_uri, outbox)
        self.interval = interval
        self.first = trainer.state.step
        self.tokens = 0
        self.started = self.last_report = time.perf_counter()
        self.poster = Poster(title)
        self.bar = tqdm_ray.tqdm(desc=title, total=trainer.total_steps, unit="step") if live else None
        self._record_missing()

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """Report a step; the ``on_step`` of :class:`revmux.training.trainer.Trainer`."""
        self.tokens += metrics["tokens"]
        self.poster.post(step, total)
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_description(f"{self.title}, {self._describe_rates(step)}")
        if time.perf_counter() - self.last_report >= self.interval:
            loss = float(metrics["loss"])
            if self.bar is None:
                self.print_line(f"step {step}/{total}, loss of this step {loss:.3f}, {self._describe_rates(step)}")
            self._record_live(step, loss)

    def epoch(self, report: EpochReport) -> None:
        """Report an epoch."""
        metrics, trainer = report.metrics, self.trainer
        self.print_line(
            f"epoch {report.epoch}/{trainer.optim.epochs}, step {report.step}/{trainer.total_steps}, "
            f"mean loss of the epoch {metrics['train_loss']:.3f}, selection accuracy {metrics['selection_accuracy']:.1%}, "
            f"{self._describe_rates(report.step)}"
        )
        self._record(metrics, report.epoch)
        self._record_live(report.step, metrics["train_loss"])

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def rates(self, step: int) -> dict[str, float]:
        """Steps and tokens per second since the start or restart, with time for evaluation, and the seconds left."""
        seconds, done = time.perf_counter() - self.started, step - self.first
        return {
            "steps_per_second": done / seconds,
            "tokens_per_second": self.tokens / seconds,
            "seconds_left": seconds / max(1, done) * (self.trainer.total_steps - step),
        }

    def _describe_rates(self, step: int) -> str:
        rates = self.rates(step)
        return (
            f"{rates['steps_per_second']:.1f} steps/s, {rates['tokens_per_second']:.0f} tokens/s, "
            f"{rates['seconds_left']:.0f} s left"
        )

    def print_line(self, text: str) -> None:
        """Print a plain line with the run's title."""
        print(f"{self.title}: {text}", flush=True)

    def _record_live(self, step: int, loss: float) -> None:
        self.last_report = time.perf_counter()
        self._record({f"live/{name}": value for name, value in {"loss": loss, **self.rates(step)}.items()}, step)

    def _record_missing(self) -> None:
        """Log the epochs before a restart that the MLflow run lacks: it is a new run, or the worker died before logging."""
        if not self.trainer.state.history:
            return
        try:
            logged = {point.step for point in self.client.get_metric_history(self.run_id, "train_loss")}
        except Exception as error:
            self._warn(error)
            return
        for epoch, metrics in enumerate(self.trainer.state.history, start=1):
            if epoch not in logged:
                self._record(metrics, epoch)

    def _record(self, metrics: dict[str, float], step: int) -> None:
        try:
            log_metrics(self.client, self.run_id, metrics, step)
        except Exception as error:  # training continues without the tracking server
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        uri = without_passwords(self.tracking_uri)
        _log.warning("cannot log metrics to MLflow at %s (%s); training continues", uri, error_line(error))
