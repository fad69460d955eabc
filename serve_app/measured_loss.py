"""Log how much accuracy each adapter loses."""

from __future__ import annotations

import logging

from revmux.adapters.config import AdapterConfig
from revmux.serving.adapters import describe_loss
from revmux.utils.redact import without_passwords
from serve_app.config import AppConfig

logger = logging.getLogger(__name__)


def log_loss(adapter: AdapterConfig, source: str, threshold: float | None, config: AppConfig) -> None:
    """Log how much accuracy an adapter loses, as a warning if it loses more than ``max_points_lost``.

    Args:
        adapter: the adapter's configuration.
        source: the adapter's name in the operator's configuration.
        threshold: threshold that the operator set for all adapters of the task; None uses the adapter's own.
        config: the application's configuration.
    """
    effective = adapter.fallback_threshold if threshold is None else threshold
    line, is_warning = describe_loss(adapter, without_passwords(source), effective or 0.0, config.max_points_lost)
    logger.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
