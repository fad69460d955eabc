"""Before a run: ``python -m revmux cost`` prints speed-ups, ``python -m revmux memory`` the memory of training,
``python -m revmux methods`` the methods and their options.

``python -m revmux cache ls`` and ``cache rm`` list and remove stored features; ``python -m revmux push`` puts an
adapter on the Hugging Face hub.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from typing import Any, Literal

import docstring_parser
import torch
from jsonargparse import auto_cli

from revmux.adapters.push import push_to_hub
from revmux.errors import UserError
from revmux.estimate.flops import relative_cost, speedup_ceiling
from revmux.estimate.memory import estimate_memory
from revmux.estimate.shapes import meta_backbone
from revmux.features import cache_cli
from revmux.methods import BackboneShape, Method, build_method, method_class, method_names

GIBIBYTE = 2**30
CACHE: dict[str, Any] = {"_help": "List and remove stored features.", "ls": cache_cli.ls, "rm": cache_cli.rm}


def cost(
    model: str = "bert-base",
    method: str = "revmux",
    num_inputs: list[int] | None = None,
    prefill_layers: list[int] | None = None,
    length: int = 128,
    prompt: str | None = None,
    soft_prompt: int = 0,
    options: dict[str, Any] | None = None,
) -> str:
    """Speed-ups over one input alone: the ceiling N·L / (N·l + e − l), and by counted operations.

    Args:
        model: bert-base, bert-large, t5-small, t5-base, t5-large, llama-3-8b, or a local model folder.
        method: a method's name.
        num_inputs: values of N; 2, 4, 8 and 16 by default, or the only one that the method serves.
        prefill_layers: values of l; by default none, a quarter and half of the layers.
        length: S, tokens an input, a prompt's template included.
        prompt: by which the language model of a folder answers: a shipped prompt's name or a YAML file.
        soft_prompt: vectors before every input of a language model.
        options: the method's own settings by name; ``python -m revmux methods`` lists them.
    """
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


def memory(
    model: str = "bert-base",
    method: str = "revmux",
    num_inputs: int | None = None,
    prefill_layers: int | None = None,
    batch_size: list[int] | None = None,
    length: list[int] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    prompt: str | None = None,
    soft_prompt: int = 0,
    options: dict[str, Any] | None = None,
) -> str:
    """Memory of one training process: backbone, adapters in fp32 with AdamW, activations.

    Args:
        model: bert-base, bert-large, t5-small, t5-base, t5-large, llama-3-8b, or a local model folder.
        method: a method's name.
        num_inputs: N; 2 by default, or the only one that the method serves.
        prefill_layers: l; half the layers by default.
        batch_size: inputs a step, multiples of N; 16N by default.
        length: S, tokens of the longest input; 128 by default.
        dtype: type of a frozen backbone's weights.
        prompt: by which the language model of a folder answers: a shipped prompt's name or a YAML file.
        soft_prompt: vectors before every input of a language model.
        options: the method's own settings by name; ``python -m revmux methods`` lists them.
    """
    backbone = meta_backbone(model, prompt=prompt, soft_prompt=soft_prompt)
    width = num_inputs or _default_widths(method)[0]
    adapters = _on_meta(method, BackboneShape.of(backbone), width, options)
    cut_at = min(backbone.num_layers // 2, adapters.exit_layer()) if prefill_layers is None else prefill_layers
    lines = [
        f"{model}: {method}, N = {width}, l = {cut_at} of {backbone.num_layers}; GiB, kernels' buffers not counted",
        f"{'batch':>6} {'length':>6} {'checkpointing':>13} {'backbone':>9} {'adapters':>9} {'gradients':>9} "
        f"{'AdamW':>9} {'kept':>9} {'working':>9} {'total':>9}",
    ]
    for batch in batch_size or [16 * width]:
        for tokens in length or [128]:
            for again in (False, True):
                plan = estimate_memory(backbone, adapters, cut_at, batch, tokens, getattr(torch, dtype), again)
                sizes = (plan.backbone, plan.adapters, plan.gradients, plan.optimizer, plan.activations, plan.working)
                shown = " ".join(f"{size / GIBIBYTE:9.2f}" for size in (*sizes, plan.total))
                lines.append(f"{batch:>6} {tokens:>6} {'yes' if again else 'no':>13} {shown}")
    return "\n".join(lines)


def push(
    folder: str,
    repository: str,
    revision: str | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    message: str = "Add adapter",
) -> str:
    """Put an adapter folder on the Hugging Face hub; the token is that of HF_TOKEN or of `hf auth login`.

    Args:
        folder: adapter folder.
        repository: USER/NAME, made where it is missing.
        revision: branch.
        private: whether a new repository is private; by default as the account is set.
        base_model: id on the hub of the backbone, where the adapter was trained on a local copy of it; without it those
            who load such an adapter must say where the backbone is.
        message: of the commit.
    """
    commit = push_to_hub(folder, repository, None, revision, private, base_model, message)
    return f"pushed: {repository} at {commit}"


def methods() -> str:
    """Every method, and its options with their defaults."""
    lines = []
    for name in method_names():
        cls = method_class(name)
        lines.append(f"{name}: {inspect.getdoc(cls).splitlines()[0]}")  # type: ignore[union-attr]
        written = docstring_parser.parse(inspect.getdoc(cls.Options) or "")
        meaning = {param.arg_name: " ".join((param.description or "").split()) for param in written.params}
        for option in fields(cls.Options):
            lines.append(f"    {option.name} (default {option.default}): {meaning.get(option.name, option.type)}")
    return "\n".join(lines)


def _default_widths(method: str) -> list[int]:
    only = method_class(method).fixed_num_inputs
    return [2, 4, 8, 16] if only is None else [only]


def _on_meta(method: str, shape: BackboneShape, num_inputs: int, options: dict[str, Any] | None) -> Method:
    with torch.device("meta"):
        return build_method(method, shape, num_inputs, options)


def main() -> int:
    """Run a subcommand; 0, or 2 for a mistake in its arguments."""
    try:
        commands: dict[str, Any] = {"cost": cost, "memory": memory, "methods": methods, "cache": CACHE, "push": push}
        print(auto_cli(commands, prog="python -m revmux"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
