"""What training and serving a ladder on large LLaMAs takes on each GPU, estimated from shapes; no weights are needed.

python -m benchmarks.size
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from revmux.adapters.config import MERGE_LIMIT
from revmux.backbone import Backbone
from revmux.estimate.memory import estimate_memory
from revmux.estimate.presets import StageShape
from revmux.estimate.serving_memory import kept_memory, pass_memory
from revmux.estimate.shapes import meta_backbone
from revmux.estimate.tables import GIBIBYTE, models_on_meta
from revmux.model import MultiplexedClassifier
from revmux.training.recipes import named_recipe
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

RESULT = Path("benchmarks/results/size.json")
MODELS = ("llama-3-8b", "llama-3-70b")
RANK, CONSTANT, LENGTH, BATCH, MAX_BATCH = 16, 40, 128, 32, 128
UNLIMITED = 2**50
GPUS = (24, 48, 80, 141, 192, 288)
"""Memory of common GPUs in GB."""
ROOM = 1.1
"""Factor for kernels' buffers and fragmentation, in addition to a gigabyte."""


def measure(name: str) -> list[dict[str, Any]]:
    """Return a row for the training of each stage, and for serving the ladder with and without merged LoRA."""
    backbone = meta_backbone(name, torch.bfloat16, constant_tokens=CONSTANT)
    stages = ladder(backbone.num_layers)
    rows = []
    for model in models_on_meta(backbone, stages):
        for checkpointing in (False, True):
            found = estimate_memory(
                backbone, model.method, model.prefill_layers, BATCH, LENGTH, torch.bfloat16, checkpointing
            )
            title = f"training {stage_title(model)}{', with checkpointing' * checkpointing}"
            rows.append({"model": name, "title": title, "total": found.total, **asdict(found)})
    rows += [serving(name, backbone, stages, limit) for limit in (0, UNLIMITED)]
    for row in rows:
        print(f"{name}, {row['title']}: {row['total'] / GIBIBYTE:.1f} GiB", flush=True)
    return rows


def ladder(layers: int) -> list[StageShape]:
    """An exit head whose layers have LoRA, then RevMUX with N = 2."""
    recipe, early, middle = named_recipe(), layers // 4, layers // 2
    head = recipe.options_of("exit-head", {"layer": early, "lora_rank": RANK})
    mixer = recipe.options_of("revmux", {"lora_rank": RANK})
    return [StageShape("exit-head", 1, layers // 8, head), StageShape("revmux", 2, middle, mixer)]


def serving(name: str, backbone: Backbone, stages: list[StageShape], limit: int) -> dict[str, Any]:
    """Return the row of a replica."""
    models = models_on_meta(backbone, stages)
    for model in models:
        model.method.drop_training_parts()
        model.merge_lora(limit)
    kept = kept_memory(backbone, models)
    needed = pass_memory(backbone, models, MAX_BATCH, LENGTH)
    return {
        "model": name,
        "title": f"serving, LoRA {'merged' if limit else 'apart'}",
        "total": kept.total + needed,
        "backbone": kept.backbone,
        "adapters": sum(adapter.weights for adapter in kept.adapters),
        "merged": sum(adapter.merged for adapter in kept.adapters),
        "prefix": kept.prefix + sum(adapter.prefix for adapter in kept.adapters),
        "activations": needed,
    }


def stage_title(model: MultiplexedClassifier) -> str:
    """Return a short name of a stage."""
    method = model.method
    reach = f"layers {model.prefill_layers + 1} to {method.exit_layer()}"
    return f"{method.legend()}, N = {model.num_inputs}, LoRA in {reach}"


def size_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the table for the page's mark."""
    settings = result["meta"]["data"]
    lines = [
        "| model | what | backbone | adapters | gradients and AdamW | merged LoRA | prefix | activations | total | smallest GPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        parts = [
            row["backbone"],
            row["adapters"],
            row.get("gradients", 0) + row.get("optimizer", 0),
            row.get("merged", 0),
            row["prefix"],
            row["activations"] + row.get("working", 0),
            row["total"],
        ]
        cells = " | ".join(_gibibytes(size) for size in parts)
        lines.append(f"| {row['model']} | {row['title']} | {cells} | {_smallest(row['total'])} |")
    words = (
        f"In GiB, estimated from shapes in bfloat16, adapters in float32. LoRA has rank {settings['rank']}. Inputs have {settings['length']} "
        f"tokens, of which {settings['constant_tokens']} are a constant prefix. A training step has {settings['batch_size']} inputs. A pass of the "
        f"server has {settings['max_batch']}, and its activations are those of the largest pass, in which every input reaches the plain model. The "
        f"smallest GPU is that of {', '.join(map(str, GPUS))} GB which has a tenth and one gigabyte to spare."
    )
    return {"size": "\n".join(lines) + f"\n\n{words}\n"}


def _gibibytes(size: int) -> str:
    if size == 0:
        return "–"
    return f"{size / GIBIBYTE:.1f}" if size >= GIBIBYTE / 10 else f"{size / GIBIBYTE:.2g}"


def _smallest(total: int) -> str:
    needed = (ROOM * total + 1e9) / 1e9
    return next((f"{size} GB" for size in GPUS if size >= needed), "none")


def main() -> None:
    """Estimate, then write the result file."""
    rows = [row for name in MODELS for row in measure(name)]
    data = {"rank": RANK, "length": LENGTH, "constant_tokens": CONSTANT, "batch_size": BATCH, "max_batch": MAX_BATCH}
    data |= {"default_merge_limit": MERGE_LIMIT}
    write_json(
        RESULT, {"meta": describe_run("python -m benchmarks.size", data, {"name": ", ".join(MODELS)}), "rows": rows}
    )


if __name__ == "__main__":
    main()
