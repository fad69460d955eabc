"""A small job of bulk classification, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet
from serving_models import text

from revmux.bulk.config import BulkConfig


def small_job(model: Path, adapter: Path, folder: Path) -> BulkConfig:
    """200 rows in two row groups of a Parquet file, in units of 64 rows."""
    frame = pd.DataFrame({"id": range(200), "text": [text(index) for index in range(200)]})
    frame.to_parquet(folder / "rows.parquet", index=False, row_group_size=150)
    return BulkConfig(
        input=str(folder / "rows.parquet"),
        output=str(folder / "out"),
        model=str(model),
        adapter=str(adapter),
        unit_rows=64,
        max_batch_tokens=256,
    )


def parts(config: BulkConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(config.output).glob("part-*.parquet"))}


def answers(config: BulkConfig) -> pd.DataFrame:
    return pa.concat_tables(
        parquet.read_table(path) for path in sorted(Path(config.output).glob("*.parquet"))
    ).to_pandas()
