"""How busy the machine is while a run trains: CPU, memory, disk, network and GPU, beside the run's curves in MLflow."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from revmux.utils.redact import error_line, redact_logs

_log = logging.getLogger(__name__)


@contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Record the machine's load under ``system/`` while the body runs.

    On unless ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false`` is set; MLflow's other variables set the intervals. A short
    run gets a sample as well. A store that cannot be reached is told and harms nothing.

    Args:
        tracking_uri: MLflow store.
        run_id: the MLflow run, which must be running.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED

    if ENABLED.is_set() and not ENABLED.get():
        yield
        return
    if importlib.util.find_spec("psutil") is None:
        _log.warning("system metrics are not recorded: psutil is not installed; run: pip install 'revmux[mlflow]'")
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells when it starts and stops
    redact_logs("mlflow")  # its thread logs what the store answers
    try:
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri)
        monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.start()
    except Exception as error:
        _log.warning("system metrics are not recorded (%s); training goes on", error_line(error))
        yield
        return
    try:
        yield
    finally:
        monitor.finish()
