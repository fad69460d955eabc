"""Where runs are recorded."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded.

    Args:
        uri: MLflow tracking URI: a database, or a server; by default sqlite in the job's storage folder. On several
            machines name a server, which all of them reach.
        experiment: MLflow experiment.
    """

    uri: str | None = field(default=None, repr=False)  # it may have a password
    experiment: str = "revmux"
