"""What the feature store loses with 16 bits per number: the task model resumes from stored states and from exact ones.

python -m benchmarks.precision
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.trained import tuned_task_model
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.precision import Precision, measure_precision
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import OptimConfig
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, MODEL = Path("benchmarks/results/precision.json"), Path("runs/precision/task-model")


def measure() -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Return rows by layer and type, and the identities of data and backbone."""
    data = DataConfig("docstrings", per_class=200)
    task = load_task(data)
    embedded = BackboneConfig(max_length=64)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    model = tuned_task_model(embedded, data, task, OptimConfig(2, 16, 2e-4), 3, MODEL)
    pretrained = load_pretrained(BackboneConfig(str(model), max_length=embedded.max_length))
    backbone = pretrained.backbone.freeze()
    split = pretrained.tokenize(task.test, embedded.max_length)
    rows = []
    for name in ("float16", "bfloat16"):
        for layer in range(backbone.num_layers + 1):
            loss = measure_precision(backbone, split, range(len(split)), layer, getattr(torch, name))
            print(f"layer {layer} in {name}: {loss}", flush=True)
            rows.append({"layer": layer, "dtype": name, **asdict(loss)})
    return rows, task.identity, {"name": embedded.model, "tuned": "upper half, to the task"}


def precision_words(result: dict[str, Any]) -> dict[str, str]:
    """Return a table of both types, over all layers."""
    lines = ["| type on disk | mean relative error of a state | largest | changed labels |", "|---|---|---|---|"]
    names = list(Precision.__dataclass_fields__)
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        whole = Precision.of(
            [Precision(**{name: row[name] for name in names}) for row in result["rows"] if row["dtype"] == dtype]
        )
        lines.append(
            f"| `{dtype}` | {whole.mean_relative_error:.1e} | {whole.max_relative_error:.1e} | "
            f"{whole.changed} of {whole.inputs:,} |"
        )
    layers = max(row["layer"] for row in result["rows"])
    inputs = result["rows"][0]["inputs"]
    words = (
        f"Layers 0 to {layers} of {result['meta']['backbone']['name']}, tuned for the task `docstrings`, each on all {inputs} test "
        "inputs."
    )
    return {"precision": "\n".join(lines) + f"\n\n{words}\n"}


def main() -> None:
    """Measure, then write the result file."""
    rows, data, backbone = measure()
    write_json(RESULT, {"meta": describe_run("python -m benchmarks.precision", data, backbone), "rows": rows})


if __name__ == "__main__":
    main()
