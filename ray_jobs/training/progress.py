"""A run's progress while it trains: a bar on a terminal, plain lines in a log, curves in MLflow."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from ray.experimental import tqdm_ray

from ray_jobs.tracking.outbox import PatientClient
from ray_jobs.tracking.tracker import log_metrics
from revmux.training.trainer import EpochReport, Trainer
from revmux.utils.redact import error_line, without_passwords

_log = logging.getLogger(__name__)


class TrainProgress:
    """What rank 0 tells of a run.

    Args:
        title: what is trained.
        trainer: where it stands; steps before that count as done, not as fast.
        tracking_uri: MLflow store.
        run_id: the MLflow run that curves go to.
        outbox: folder for what the store cannot take while it is away.
        live: whether to draw a bar.
        interval: seconds between lines, and between points of MLflow's ``live/`` curves, within an epoch.
    """

    def __init__(
        self,
        title: str,
        trainer: Trainer,
        tracking_uri: str,
        run_id: str,
        outbox: Path,
        live: bool,
        interval: float = 30.0,
    ) -> None:
        self.title, self.trainer = title, trainer
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.client = PatientClient(tracking_uri, outbox)
        self.interval = interval
        self.first = trainer.state.step
        self.tokens = 0
        self.started = self.told = time.perf_counter()
        self.bar = tqdm_ray.tqdm(desc=title, total=trainer.total_steps, unit="step") if live else None
        self._record_missing()

    def step(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """After each step; see :class:`revmux.training.trainer.Trainer`."""
        self.tokens += metrics["tokens"]
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_description(f"{self.title}, {self._rates_in_words(step)}")
        if time.perf_counter() - self.told >= self.interval:
            loss = float(metrics["loss"])
            if self.bar is None:
                self.tell(f"step {step}/{total}, loss of this step {loss:.3f}, {self._rates_in_words(step)}")
            self._record_live(step, loss)

    def epoch(self, report: EpochReport) -> None:
        """After each epoch."""
        metrics, trainer = report.metrics, self.trainer
        self.tell(
            f"epoch {report.epoch}/{trainer.optim.epochs}, step {report.step}/{trainer.total_steps}, "
            f"mean loss of the epoch {metrics['train_loss']:.3f}, selection accuracy {metrics['selection_accuracy']:.1%}, "
            f"{self._rates_in_words(report.step)}"
        )
        self._record(metrics, report.epoch)
        self._record_live(report.step, metrics["train_loss"])

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def rates(self, step: int) -> dict[str, float]:
        """``steps_per_second`` and ``tokens_per_second`` since the (re)start, evaluation counted, and ``seconds_left``."""
        seconds, done = time.perf_counter() - self.started, step - self.first
        return {
            "steps_per_second": done / seconds,
            "tokens_per_second": self.tokens / seconds,
            "seconds_left": seconds / max(1, done) * (self.trainer.total_steps - step),
        }

    def _rates_in_words(self, step: int) -> str:
        rates = self.rates(step)
        return (
            f"{rates['steps_per_second']:.1f} steps/s, {rates['tokens_per_second']:.0f} tokens/s, "
            f"{rates['seconds_left']:.0f} s left"
        )

    def tell(self, what: str) -> None:
        """A plain line for the log."""
        print(f"{self.title}: {what}", flush=True)

    def _record_live(self, step: int, loss: float) -> None:
        self.told = time.perf_counter()
        self._record({f"live/{name}": value for name, value in {"loss": loss, **self.rates(step)}.items()}, step)

    def _record_missing(self) -> None:
        """Epochs done before the restart, which this run may not have: it is another one, or the worker died there."""
        if not self.trainer.state.history:
            return
        try:
            there = {point.step for point in self.client.get_metric_history(self.run_id, "train_loss")}
        except Exception as error:
            self._warn(error)
            return
        for epoch, metrics in enumerate(self.trainer.state.history, start=1):
            if epoch not in there:
                self._record(metrics, epoch)

    def _record(self, metrics: dict[str, float], step: int) -> None:
        try:
            log_metrics(self.client, self.run_id, metrics, step)
        except Exception as error:  # a tracking server that is away ends no training
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        place = without_passwords(self.tracking_uri)
        _log.warning("MLflow at %s did not take metrics (%s); training goes on", place, error_line(error))
