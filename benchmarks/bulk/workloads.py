"""What is classified: real sentences of mixed lengths, by a plain model, by groups, and by a ladder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from benchmarks.bulk.settings import CUT, LENGTH, WIDTHS, Settings
from benchmarks.serving.workloads import random_revmux, write_embedded, write_shape
from revmux.adapters.config import CONFIG_NAME
from revmux.adapters.folder import describe_adapter, save_adapter
from revmux.bulk.classify import classify_files
from revmux.bulk.config import BulkConfig
from revmux.data.config import SENTIMENT, DataConfig
from revmux.data.task import load_task
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.plan.files import PLAN_NAME
from revmux.pretrained.config import EMBEDDED_NAME, BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.utils.files import write_json

LADDER_CUT, LADDER_WIDTH = 3, 4
_SAMPLE = 256
_UNIT_ROWS = 2048
"""Rows per unit. In much smaller units, few inputs have similar lengths, and passes are small."""


@dataclass(frozen=True)
class Workload:
    """A backbone in a folder, with the rows to classify.

    Attributes:
        key: name in file names.
        name: name in the rows.
        folder: folder of the task model; its adapters are written beside it.
        rows: rows per leg.
    """

    key: str
    name: str
    folder: Path
    rows: int

    @cached_property
    def pretrained(self) -> Pretrained:
        """The task model, loaded once."""
        return load_pretrained(BackboneConfig(str(self.folder), max_length=LENGTH))

    @cached_property
    def texts(self) -> list[str]:
        """The texts: a sample of the sentences of the sentiment task, in random order."""
        task = load_task(DataConfig(SENTIMENT))
        known = [text for text in [*task.train["text"], *task.test["text"]] if text]
        lengths = map(len, self.pretrained.tokenizer(known)["input_ids"])
        fitting = [text for text, length in zip(known, lengths) if length <= LENGTH]  # so that no program truncates any
        return [fitting[index] for index in np.random.default_rng(0).integers(0, len(fitting), self.rows)]

    @property
    def mean_length(self) -> float:
        """Mean number of tokens per text."""
        return sum(map(len, self.pretrained.tokenizer(self.texts)["input_ids"])) / len(self.texts)

    @cached_property
    def file(self) -> Path:
        """The texts as a Parquet file."""
        return _write_rows(self.folder.with_name(f"{self.key}.parquet"), self.texts)

    def about(self) -> dict[str, Any]:
        """Return the identity of the rows."""
        return {
            "rows": self.rows,
            "tokens": round(self.mean_length, 1),
            "sha256": hashlib.sha256("\n".join(self.texts).encode()).hexdigest(),
        }

    def config(self, output: Path, adapter: Path | None = None, plan: Path | None = None) -> BulkConfig:
        """Return the settings of one leg."""
        return BulkConfig(
            input=str(self.file),
            output=str(output),
            model=str(self.folder),
            adapter=None if adapter is None else str(adapter),
            plan=None if plan is None else str(plan),
            max_length=LENGTH,
            unit_rows=_UNIT_ROWS,
        )

    def systems(self) -> dict[str, dict[str, Path]]:
        """Return the settings of each multiplexed system by its title; missing adapters are written."""
        found = {f"N = {width}, l = {CUT}": {"adapter": self._revmux(width, CUT)} for width in WIDTHS}
        title = f"ladder: exit head at layer {CUT}, N = {LADDER_WIDTH} at layer {LADDER_CUT}, plain model"
        return found | {title: {"plan": self._ladder()}}

    def _save(self, model: MultiplexedClassifier, name: str) -> Path:
        folder = self.folder.with_name(f"{self.key}-{name}")
        if not folder.is_dir():
            save_adapter(model, describe_adapter(model, self.pretrained, LENGTH, {"source": "none"}), folder)
        return folder

    def _revmux(self, width: int, cut: int) -> Path:
        return self._save(random_revmux(self.pretrained.backbone, width, cut), f"n{width}-l{cut}")

    def _ladder(self) -> Path:
        """Write a plan: half of the inputs go on from the exit head, and a fifth of those to the plain model."""
        backbone = self.pretrained.backbone
        head = build_method("exit-head", BackboneShape.of(backbone), 1)
        stages = [
            (self._save(MultiplexedClassifier(backbone, head, CUT), f"exit-l{CUT}"), 0.5),
            (self._revmux(LADDER_WIDTH, LADDER_CUT), 0.2),
        ]
        plan = self.folder.with_name(f"{self.key}-plan")
        served = []
        for stage, (adapter, share) in enumerate(stages, 1):
            target = plan / f"stage{stage}"
            target.mkdir(parents=True, exist_ok=True)
            for file in adapter.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            threshold = {"stage": stage, "fallback_threshold": self._threshold(adapter, share)}
            config = json.loads((adapter / CONFIG_NAME).read_text()) | threshold | {"metrics": {"share_on": share}}
            (target / CONFIG_NAME).write_text(json.dumps(config))
            served.append({"adapter": target.name})
        write_json(plan / PLAN_NAME, {"is_met": True, "why_not": None, "served": [{"stages": served}]})
        return plan

    def _threshold(self, adapter: Path, share: float) -> float:
        """The confidence below which this share of a sample is."""
        output = adapter.with_name(f"{adapter.name}-sample")
        sample = _write_rows(output.with_suffix(".parquet"), self.texts[:_SAMPLE])
        classify_files(replace(self.config(output, adapter), input=str(sample), threshold=0.0))
        scores = parquet.read_table(output)["score"].to_pylist()
        return float(quantiles(scores, n=100)[round(100 * share) - 1])


def workloads(settings: Settings, folder: Path) -> list[Callable[[], Workload]]:
    """Return for each backbone a function that writes it."""
    return [
        lambda: Workload(
            "embedded", EMBEDDED_NAME, write_embedded(folder / "embedded")[0], round(2048 * settings.scale)
        ),
        lambda: Workload(
            "shape", settings.shape.name, write_shape(folder / "shape", settings.shape), round(768 * settings.scale)
        ),
    ]


def _write_rows(file: Path, texts: list[str]) -> Path:
    parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), file)
    return file
