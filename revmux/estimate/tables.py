"""The tables of ``revmux cost``, ``revmux memory`` and ``revmux methods``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import docstring_parser
import torch

from revmux.backbone import Backbone
from revmux.estimate.flops import relative_cost, speedup_ceiling
from revmux.estimate.memory import MemoryEstimate, estimate_memory
from revmux.estimate.presets import StageShape
from revmux.estimate.serving_memory import kept_memory, pass_memory
from revmux.estimate.shapes import meta_backbone
from revmux.methods import BackboneShape, Method, build_method, method_class, method_names
from revmux.model import MultiplexedClassifier

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
    stages: Sequence[StageShape],
    batch_size: list[int] | None,
    length: list[int] | None,
    dtype: str,
    prompt: str | None,
    soft_prompt: int,
    constant_tokens: int,
    max_batch: int,
    merge_limit: int,
) -> str:
    """What training each stage takes, and what serving all of them takes; see :func:`revmux.__main__.memory`.

    Args:
        model: see there, as for the other arguments.
        stages: the stages of a ladder, or one adapter.
        batch_size: inputs per training step; the default is 16 N.
        length: tokens of the longest input.
        dtype: type of the frozen weights.
        prompt: prompt of a folder's language model.
        soft_prompt: number of soft prompt vectors.
        constant_tokens: first tokens that are the same in every input.
        max_batch: inputs per pass of the server.
        merge_limit: most bytes of an adapter's copy of the weights for LoRA.
    """
    kind = getattr(torch, dtype)
    backbone = meta_backbone(model, kind, prompt, soft_prompt, constant_tokens)
    models = models_on_meta(backbone, stages)
    lines = [f"{model}: L = {backbone.num_layers}, {dtype}; in GiB, without kernels' temporary buffers", "", "Training"]
    for one in models:
        lines += _training_lines(one, batch_size, length, kind)
    if any(one.method.tunes_backbone for one in models):
        return "\n".join([*lines, "", "Servers load no adapters that tune the backbone."])
    for tokens in length or [128]:
        lines += ["", f"Serving passes of {max_batch} inputs of {tokens} tokens"]
        lines += _serving_lines(models, max_batch, tokens, kind, merge_limit)
    return "\n".join(lines)


def _training_lines(
    model: MultiplexedClassifier, batch_size: list[int] | None, length: list[int] | None, dtype: torch.dtype
) -> list[str]:
    """A heading, and two lines per batch size and length."""
    names = [field.name for field in fields(MemoryEstimate)]
    head = " ".join(f"{name:>11}" for name in (*names, "total"))
    lines = [f"  {_title(model)}", f"  {'batch':>6} {'length':>6} {'checkpointing':>13} {head}"]
    for batch in batch_size or [16 * model.num_inputs]:
        for tokens in length or [128]:
            for checkpointing in (False, True):
                found = estimate_memory(
                    model.backbone, model.method, model.prefill_layers, batch, tokens, dtype, checkpointing
                )
                columns = " ".join(f"{size / GIBIBYTE:11.2f}" for size in (*astuple(found), found.total))
                lines.append(f"  {batch:>6} {tokens:>6} {'yes' if checkpointing else 'no':>13} {columns}")
    return lines


def _serving_lines(
    models: Sequence[MultiplexedClassifier], max_batch: int, length: int, dtype: torch.dtype, merge_limit: int
) -> list[str]:
    """A line for the backbone, for each adapter and for a pass."""
    backbone = models[0].backbone
    for model in models:
        model.method.drop_training_parts()
        model.merge_lora(merge_limit)
    kept = kept_memory(backbone, models)
    needed = pass_memory(backbone, models, max_batch, length, dtype)
    rows = [("backbone", kept.backbone, 0, kept.prefix, "")]
    for model, adapter in zip(models, kept.adapters, strict=True):
        note = f"  LoRA is not merged: a copy takes {adapter.unmerged / GIBIBYTE:.2f}" if adapter.unmerged else ""
        rows.append((_title(model), adapter.weights, adapter.merged, adapter.prefix, note))
    width = max(len(name) for name, *_ in rows)
    lines = [f"  {'':<{width}} {'weights':>11} {'merged LoRA':>11} {'prefix':>11}"]
    for name, *sizes, note in rows:
        lines.append(f"  {name:<{width}} " + " ".join(f"{size / GIBIBYTE:11.2f}" for size in sizes) + note)
    total = (kept.total + needed) / GIBIBYTE
    return [*lines, f"  largest pass {needed / GIBIBYTE:.2f}, total {total:.2f}"]


def _title(model: MultiplexedClassifier) -> str:
    rank = model.method.lora_rank
    lora = f", LoRA of rank {rank}" if model.method.lora is not None else ""
    return f"{model.method.name}, N = {model.num_inputs}, l = {model.prefill_layers}{lora}"


def models_on_meta(backbone: Backbone, stages: Sequence[StageShape]) -> list[MultiplexedClassifier]:
    """The stages on a backbone on the meta device, in eval mode.

    Raises:
        UserError: a method, its options or its layers do not fit the backbone.
    """
    models, shape = [], BackboneShape.of(backbone)
    for stage in stages:
        width = stage.num_inputs or _default_widths(stage.method)[0]
        method = _on_meta(stage.method, shape, width, stage.options)
        layers = stage.prefill_layers
        if layers is None:
            layers = min(backbone.num_layers // 2, method.exit_layer())
        models.append(MultiplexedClassifier(backbone, method, layers).eval())
    return models


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
