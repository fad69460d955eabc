"""The constant prefix of a prompt: how much time it saves, divided by what the operation counter says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.rows import ratio_row
from revmux.backbone import cut
from revmux.backbone.decoder import DecoderBackbone
from revmux.data.tokens import TokenizedSplit
from revmux.estimate.flops import count_flops
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier

TARGET = 0.9
CUT = 15
WIDTHS = (1, 2, 4)
INPUTS, BATCH = 64, 32


def measure_prefix(backbone: DecoderBackbone, split: TokenizedSplit, pairs: int) -> list[dict[str, Any]]:
    """Return a row for the plain model and for RevMUX with N = 2 and 4.

    Args:
        backbone: with a constant prefix, frozen.
        split: the inputs, in their prompt.
        pairs: paired timings, with and without the prefix.
    """
    without = cut(backbone.model, backbone.verbalizer).freeze()
    batches = like_length_batches(split, INPUTS, BATCH)
    length = round(float(split.lengths.float().mean()))
    return [_row(backbone, without, width, batches, length, pairs) for width in WIDTHS]


def titles() -> list[str]:
    """The titles of all rows."""
    return [_title(width) for width in WIDTHS]


def _title(width: int) -> str:
    return "the plain model" if width == 1 else f"RevMUX, N = {width}, l = {CUT}"


def _row(
    backbone: DecoderBackbone, without: Any, width: int, batches: Sequence[Any], length: int, pairs: int
) -> dict[str, Any]:
    name = "siso" if width == 1 else "revmux"
    layers = 0 if width == 1 else CUT
    method = build_method(name, BackboneShape.of(backbone), width)
    whole, cached = (MultiplexedClassifier(each, method, layers).eval() for each in (without, backbone))
    costs = [count_flops(model.backbone, method, layers, length).per_input for model in (cached, whole)]
    counted = 1 - costs[0] / costs[1]
    speedup = paired_throughput(whole, cached, batches, pairs)
    saved = [1 - 1 / value for value in (speedup.least, speedup.median, speedup.most)]
    title = _title(width)
    row = ratio_row(f"{title}: time saved / operations saved", [value / counted for value in saved], TARGET)
    print(f"{title}: {speedup.median:.2f} times as fast, {row['ratio_median']:.2f} of what is counted", flush=True)
    return row | {
        "kind": "prefix",
        "title": title,
        "pairs": pairs,
        "num_inputs": width,
        "prefill_layers": layers,
        "tokens": length,
        "prefix": len(backbone.constant_tokens),
        "saved_counted": round(counted, 4),
        "saved_measured": round(saved[1], 4),
        "throughput_ratio": round(speedup.median, 3),
    }
