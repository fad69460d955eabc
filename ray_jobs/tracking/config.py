"""Where runs are recorded."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow tracking.

    Args:
        uri: MLflow tracking URI: a database or a server. With several machines, use a server that all of them can
            reach. Default: an SQLite file in the storage, which must then be a folder.
        experiment: Name of the MLflow experiment.
    """

    uri: str | None = field(default=None, repr=False)  # it may have a password
    experiment: str = "revmux"
