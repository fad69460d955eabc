"""Record the machine's load (CPU, memory, disk, network and GPU) in the MLflow run while it trains."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from revmux.utils.redact import error_line, redact_logs

_log = logging.getLogger(__name__)


@contextmanager
def system_metrics(tracking_uri: str, run_id: str) -> Iterator[None]:
    """Inside the context, record the machine's load under ``system/``.

    This is on unless ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false`` is set. MLflow's other variables set the intervals.
    Even a short run gets one sample. If the store cannot be reached, a warning is logged and training continues.

    Args:
        tracking_uri: MLflow store.
        run_id: the MLflow run, whose status must be RUNNING.
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

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs its start and stop
    redact_logs("mlflow")  # its thread logs responses of the store
    try:
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri)
        monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.start()
    except Exception as error:
        _log.warning("system metrics are not recorded (%s); training continues", error_line(error))
        yield
        return
    try:
        yield
    finally:
        monitor.finish()
