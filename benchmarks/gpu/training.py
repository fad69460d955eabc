"""Ten training steps of a large LLaMA, and their peak memory beside the estimate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.sizes import WHY, Row, Sizes, named
from benchmarks.serving.alone import random_backbone, random_tokens
from benchmarks.size import ladder
from revmux.backbone import Backbone
from revmux.estimate.memory import estimate_memory
from revmux.estimate.shapes import meta_backbone
from revmux.estimate.tables import models_on_meta
from revmux.features.base import FeatureBatch
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.training.config import LossConfig, OptimConfig
from revmux.training.trainer import Trainer


class RandomFeatures:
    """Random inputs with random labels, without a teacher.

    Args:
        backbone: determines vocabulary and device.
        inputs: their number.
        length: tokens per input.
    """

    def __init__(self, backbone: Backbone, inputs: int, length: int) -> None:
        self._tokens = random_tokens(backbone, inputs, length)
        self.labels = torch.randint(0, backbone.num_labels, (inputs,))
        self.lengths = torch.full((inputs,), length)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | Tensor) -> FeatureBatch:
        """See :meth:`revmux.features.base.Features.batch`."""
        picked = torch.as_tensor(rows)
        tokens = {name: tensor[picked.to(tensor.device)] for name, tensor in self._tokens.items()}
        return FeatureBatch(self.labels[picked].to(tokens["input_ids"].device), tokens=tokens)


def measure_training(shape: str, device: torch.device, sizes: Sizes) -> Row:
    """Train RevMUX, N = 2, with LoRA above l = L/2 and gradient checkpointing; the peak memory beside ``revmux memory``.

    Args:
        shape: a preset or a folder of a LLaMA.
        device: where the model runs. Peak memory is measured on a GPU only.
        sizes: what is run.
    """
    outline = meta_backbone(shape, sizes.dtype)
    on_meta = models_on_meta(outline, [ladder(outline.num_layers)[1]])[0]
    estimated = estimate_memory(
        outline, on_meta.method, on_meta.prefill_layers, sizes.batch, sizes.length, sizes.dtype, True
    ).total
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    backbone = random_backbone(shape, device, sizes.dtype)
    backbone.gradient_checkpointing = True
    method = build_method(
        on_meta.method.name, BackboneShape.of(backbone), on_meta.num_inputs, on_meta.method.options_dict()
    ).to(device)
    model = MultiplexedClassifier(backbone, method, on_meta.prefill_layers)
    train = RandomFeatures(backbone, sizes.steps * sizes.batch, sizes.length)
    trainer = Trainer(
        model,
        train,
        RandomFeatures(backbone, sizes.batch, sizes.length),
        OptimConfig(1, sizes.batch),
        LossConfig(infonce_weight=0.0),
    )
    report = next(iter(trainer.run()))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    row = named(shape, f"{report.step} training steps")
    row |= {
        "method": method.name,
        "num_inputs": model.num_inputs,
        "prefill_layers": model.prefill_layers,
        "loss": report.metrics["train_loss"],
        "inputs_per_second": round(report.metrics["inputs_per_second"], 3),
        "estimated_bytes": estimated,
        "peak_bytes": peak,
        "peak_of_estimate": None if peak is None else round(peak / estimated, 4),
        "inputs": sizes.batch,
        "tokens": sizes.length,
    }
    return row if peak is not None else row | {"why": f"no peak memory: {WHY}"}
