"""Inputs per second of the model alone, SISO, groups and early exits, as a share of the device's peak matrix rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu.sizes import Row, Sizes, named
from benchmarks.serving.alone import random_backbone, random_tokens
from revmux.backbone import Backbone, TokenBatch
from revmux.estimate.flops import count_flops
from revmux.estimate.throughput import paired_throughput
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.training.config import MethodConfig
from revmux.training.recipe import exit_head_config

WIDTHS = (2, 4, 8)


class Untouched(nn.Module):
    """The model of Transformers as it is, without our layer loop."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: TokenBatch) -> Tensor:
        """The model's own scores: tokens (B, S) to (B, C), or of a language model to those of the last token."""
        last = {"logits_to_keep": 1, "use_cache": False} if hasattr(self.backbone, "verbalizer") else {}
        scores: Tensor = self.backbone.model(**tokens, **last).logits
        return scores


def peak_rate(device: torch.device, sizes: Sizes, repeats: int = 10) -> float:
    """The highest rate of a large matrix product on this device, in operations per second."""
    left, right = (torch.randn(sizes.side, sizes.side, device=device).to(sizes.dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return float(2 * sizes.side**3 / min(seconds[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compared(num_layers: int) -> Iterator[tuple[str, MethodConfig]]:
    """The systems that are timed against SISO, with their titles."""
    half = num_layers // 2
    for width in WIDTHS:
        yield f"RevMUX, N = {width}, l = {half}", MethodConfig("revmux", width, half)
    for layer in dict.fromkeys((half, 3 * num_layers // 4)):
        yield f"exit head, layer {layer}", exit_head_config(layer)


def measure_shape(shape: str, device: torch.device, sizes: Sizes) -> list[Row]:
    """Return a row for the untouched model, SISO, RevMUX and exit heads: inputs per second and share of the peak rate.

    Args:
        shape: a key of ``sizes.inputs``.
        device: where the model runs.
        sizes: what is run.
    """
    peak = peak_rate(device, sizes)
    backbone = random_backbone(shape, device, sizes.dtype)
    batches = [random_tokens(backbone, sizes.inputs[shape], sizes.length)]
    plain = plain_classifier(backbone)
    ratio = paired_throughput(plain, Untouched(backbone), batches, sizes.pairs)  # type: ignore[arg-type]
    operations = count_flops(backbone, plain.method, 0, sizes.length).per_input
    rows = []

    def add(title: str, config: MethodConfig, throughput: float, siso_rate: float, counted: float) -> None:
        rate = siso_rate * throughput
        rows.append(
            named(shape, title)
            | {
                "method": config.name,
                "num_inputs": config.num_inputs,
                "prefill_layers": config.prefill_layers,
                "inputs_per_second": round(rate, 3),
                "throughput_ratio": round(throughput, 3),
                "cost_counted": round(counted / operations, 4),
                "peak_share": round(counted * rate / peak, 4),
                "peak_rate": peak,
                "inputs": sizes.inputs[shape],
                "tokens": sizes.length,
            }
        )
        print(f"{shape}, {title}: {rate:.1f} inputs per second, {rows[-1]['peak_share']:.1%} of the peak", flush=True)

    nothing = MethodConfig("siso", 1, 0)
    add("model alone (Transformers)", nothing, ratio.median, ratio.baseline_rate, operations)
    add("SISO", nothing, 1.0, ratio.baseline_rate, operations)
    for title, config in compared(backbone.num_layers):
        torch.manual_seed(0)
        method = build_method(config.name, BackboneShape.of(backbone), config.num_inputs, config.options).to(device)
        rival = MultiplexedClassifier(backbone, method, config.prefill_layers).requires_grad_(False).eval()
        ratio = paired_throughput(plain, rival, batches, sizes.pairs)
        counted = count_flops(backbone, method, config.prefill_layers, sizes.length).per_input
        add(title, config, ratio.median, ratio.baseline_rate, counted)
    return rows
