"""A job: its units, its system, and the settings on which the answers depend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from revmux.bulk.config import BulkConfig
from revmux.bulk.formats import Columns
from revmux.bulk.location import with_absolute_paths
from revmux.bulk.output import settings_key
from revmux.bulk.system import System, find_system
from revmux.bulk.units import Work, list_work
from revmux.utils.redact import without_passwords

FORMAT_VERSION = 1
"""Version of the files in the output folder."""
_SAMPLE_RESERVE = 4
"""Units sample more rows than the page shows, because the sample of a unit is random."""


@dataclass(frozen=True)
class Job:
    """What every worker needs.

    Attributes:
        input: the source, as an absolute path or URI.
        output: the output folder, as an absolute path or URI.
        columns: the columns to read.
        system: what classifies the rows.
        settings: everything on which the answers depend, as plain data.
        audit: share of audited rows.
        sample_share: share of the rows to sample for the summary page.
        column_prefix: prefix of the added columns.
        all_scores: whether to write all scores.
        function: function of the scores.
    """

    input: str
    output: str
    columns: Columns
    system: System
    settings: dict[str, Any]
    audit: float
    sample_share: float
    column_prefix: str
    all_scores: bool
    function: str | None

    @property
    def key(self) -> str:
        """Hash of the settings, which names the files of units."""
        return settings_key(self.settings)


def prepare_job(
    config: BulkConfig, work: Work, adapters: Sequence[tuple[Path, str]] | None = None, device: str = "cpu"
) -> Job:
    """Check the settings and describe the job. No weights are loaded.

    Args:
        config: the settings, with absolute paths.
        work: the units, from :func:`revmux.bulk.units.list_work`.
        adapters: see :func:`revmux.bulk.system.find_system`.
        device: where the model runs.

    Raises:
        UserError: the system cannot be found.
    """
    system = find_system(config, adapters, device)
    settings = {
        "format": FORMAT_VERSION,
        "input": {
            "source": without_passwords(config.input),
            "files": work.files,
            "rows": work.rows,
            "sha256": work.digest,
        },
        "columns": asdict(work.columns),
        "system": system.describe(),
        "column_prefix": config.column_prefix,
        "all_scores": config.all_scores,
        "function": config.function,
        "unit_rows": config.unit_rows,
        "audit": config.audit,
        "sample_rows": config.sample_rows,
    }
    return Job(
        config.input,
        config.output,
        work.columns,
        system,
        settings,
        config.audit,
        min(1.0, _SAMPLE_RESERVE * config.sample_rows / work.rows),
        config.column_prefix,
        config.all_scores,
        config.function,
    )


def list_and_prepare(config: BulkConfig, device: str = "cpu") -> tuple[Job, Work]:
    """List the units of a job and describe it.

    Raises:
        UserError: see :func:`list_work` and :func:`prepare_job`.
    """
    config = with_absolute_paths(config)
    work = list_work(config)
    return prepare_job(config, work, device=device), work
