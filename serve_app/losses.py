"""The log's line on what each adapter costs in accuracy."""

from __future__ import annotations

import logging

from revmux.adapters.config import AdapterConfig
from revmux.serving.adapters import describe_loss
from serve_app.config import AppConfig

logger = logging.getLogger(__name__)


def log_loss(adapter: AdapterConfig, source: str, threshold: float | None, config: AppConfig) -> None:
    """Log what an adapter costs in accuracy; a warning where it lost more than ``max_points_lost``.

    Args:
        adapter: its configuration.
        source: how the operator names it.
        threshold: that the operator set for all adapters of the task; None leaves the adapter's own.
        config: of the application.
    """
    own = adapter.fallback_threshold if threshold is None else threshold
    line, is_warning = describe_loss(adapter, source, own or 0.0, config.max_points_lost)
    logger.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
