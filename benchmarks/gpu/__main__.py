"""Measure each shape once; an interrupted run resumes. Without a GPU, all rows are null.

python -m benchmarks.gpu
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.sizes import SIZES, TRAINED, WHY, Row, named
from benchmarks.gpu.throughput import compared, measure_shape
from benchmarks.gpu.training import measure_training
from benchmarks.rows import kept_rows
from revmux.estimate.shapes import meta_backbone
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT, KEPT = Path("benchmarks/results/gpu.json"), Path("runs/gpu")


def unmeasured_rows() -> list[Row]:
    """The rows of a machine without a GPU."""
    nothing = dict.fromkeys(("inputs_per_second", "throughput_ratio", "cost_counted", "peak_share"))
    rows = []
    for shape in SIZES.inputs:
        layers = meta_backbone(shape).num_layers
        titles = ["model alone (Transformers)", "SISO", *(title for title, _ in compared(layers))]
        rows += [named(shape, title) | nothing | {"why": WHY} for title in titles]
    trained = dict.fromkeys(("inputs_per_second", "estimated_bytes", "peak_bytes", "peak_of_estimate"))
    return [*rows, named(TRAINED, f"{SIZES.steps} training steps") | trained | {"why": WHY}]


def main() -> None:
    """Measure each shape once, then write the result file; without a GPU, all rows are null."""
    rows = unmeasured_rows()
    if torch.cuda.is_available():
        device, settings = torch.device("cuda"), (SIZES, torch.cuda.get_device_name())
        rows = []
        for shape in SIZES.inputs:
            rows += kept_rows(KEPT, shape, settings, partial(measure_shape, shape, device, SIZES))
        rows.append(kept_rows(KEPT, "training", settings, partial(measure_training, TRAINED, device, SIZES)))
    data = {"tokens": SIZES.length, "inputs": SIZES.inputs}
    write_json(RESULT, {"meta": describe_run("python -m benchmarks.gpu", data, {"weights": "random"}), "rows": rows})


if __name__ == "__main__":
    main()
