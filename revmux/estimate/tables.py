"""The tables of ``revmux cost``, ``revmux memory`` and ``revmux methods``."""

from __future__ import annotations

import inspect
from dataclasses import astuple, fields
from typing import Any

import docstring_parser
import torch

from revmux.estimate.flops import relative_cost, speedup_ceiling
from revmux.estimate.memory import estimate_memory
from revmux.estimate.shapes import meta_backbone
from revmux.methods import BackboneShape, Method, build_method, method_class, method_names

GIBIBYTE = 2**30


def cost_table(
    model: str,
    method: str,
    num_inputs: list[int] | None,
    prefill_layers: list[int] | None,
    length: int,
    prompt: str | None,
    soft_prompt: int,
    options: dict[str, Any] | None,
) -> str:
    """One line per N and l; for the arguments, see :func:`revmux.__main__.cost`."""
    backbone = meta_backbone(model, prompt=prompt, soft_prompt=soft_prompt)
    layers, shape = backbone.num_layers, BackboneShape.of(backbone)
    lines = [
        f"{model}: L = {layers}, d = {backbone.hidden_size}, S = {length}, method {method}",
        f"{'N':>4} {'l':>4} {'ceiling':>9} {'counted':>9}",
    ]
    for width in num_inputs or _default_widths(method):
        adapters = _on_meta(method, shape, width, options)
        depth = adapters.exit_layer()
        default = {min(cut, depth) for cut in (0, layers // 4, layers // 2)}
        for cut in sorted(set(prefill_layers or default)):
            speedup = 1 / relative_cost(backbone, adapters, cut, length)
            ceiling = speedup_ceiling(layers, cut, width, depth)
            lines.append(f"{width:>4} {cut:>4} {ceiling:>8.2f}× {speedup:>8.2f}×")
    return "\n".join(lines)


def memory_table(
    model: str,
    method: str,
    num_inputs: int | None,
    prefill_layers: int | None,
    batch_size: list[int] | None,
    length: list[int] | None,
    dtype: str,
    prompt: str | None,
    soft_prompt: int,
    options: dict[str, Any] | None,
) -> str:
    """Two lines per batch size and length; for the arguments, see :func:`revmux.__main__.memory`."""
    backbone = meta_backbone(model, prompt=prompt, soft_prompt=soft_prompt)
    width = num_inputs or _default_widths(method)[0]
    adapters = _on_meta(method, BackboneShape.of(backbone), width, options)
    cut_at = min(backbone.num_layers // 2, adapters.exit_layer()) if prefill_layers is None else prefill_layers
    lines = [
        f"{model}: {method}, N = {width}, l = {cut_at} of {backbone.num_layers}; in GiB, without kernels' temporary buffers",
        f"{'batch':>6} {'length':>6} {'checkpointing':>13} {'backbone':>11} {'adapters':>11} {'gradients':>11} "
        f"{'AdamW':>11} {'activations':>11} {'working':>11} {'total':>11}",
    ]
    for batch in batch_size or [16 * width]:
        for tokens in length or [128]:
            for checkpointing in (False, True):
                found = estimate_memory(backbone, adapters, cut_at, batch, tokens, getattr(torch, dtype), checkpointing)
                columns = " ".join(f"{size / GIBIBYTE:11.2f}" for size in (*astuple(found), found.total))
                lines.append(f"{batch:>6} {tokens:>6} {'yes' if checkpointing else 'no':>13} {columns}")
    return "\n".join(lines)


def method_list() -> str:
    """The methods, and their options with their defaults."""
    lines = []
    for name in method_names():
        cls = method_class(name)
        lines.append(f"{name}: {inspect.getdoc(cls).splitlines()[0]}")  # type: ignore[union-attr]
        parsed = docstring_parser.parse(inspect.getdoc(cls.Options) or "")
        meaning = {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
        for option in fields(cls.Options):
            lines.append(f"    {option.name} (default {option.default}): {meaning.get(option.name, option.type)}")
    return "\n".join(lines)


def _default_widths(method: str) -> list[int]:
    only = method_class(method).fixed_num_inputs
    return [2, 4, 8, 16] if only is None else [only]


def _on_meta(method: str, shape: BackboneShape, num_inputs: int, options: dict[str, Any] | None) -> Method:
    with torch.device("meta"):
        return build_method(method, shape, num_inputs, options)
