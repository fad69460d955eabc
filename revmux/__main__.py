"""Before a run: ``python -m revmux cost`` prints speed-ups, ``python -m revmux memory`` the memory of training.

``python -m revmux cache ls`` and ``cache rm`` list and remove stored features; ``python -m revmux push`` puts an
adapter on the Hugging Face hub.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from revmux.artifact import push_to_hub
from revmux.cost import ceiling_table, relative_cost
from revmux.errors import UserError
from revmux.features import cache_cli
from revmux.memory import plan_memory
from revmux.methods import BackboneShape, Method, build_method
from revmux.shapes import meta_backbone

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
) -> str:
    """Speed-ups over one input alone: the ceiling N·L / (N·l + L − l), and by counted operations.

    Args:
        model: bert-base, bert-large, t5-small, t5-base, t5-large, llama-3-8b, or a local model folder.
        method: a method's name.
        num_inputs: values of N; 2, 4, 8 and 16 by default.
        prefill_layers: values of l; by default quarters of the layers.
        length: S, tokens an input, a prompt's template included.
        prompt: by which the language model of a folder answers: a shipped prompt's name or a YAML file.
        soft_prompt: vectors before every input of a language model.
    """
    backbone = meta_backbone(model, prompt=prompt, soft_prompt=soft_prompt)
    layers = backbone.num_layers
    rows = ceiling_table(
        layers, num_inputs or [2, 4, 8, 16], sorted(set(prefill_layers or [0, layers // 4, layers // 2]))
    )
    lines = [
        f"{model}: L = {layers}, d = {backbone.hidden_size}, S = {length}, method {method}",
        f"{'N':>4} {'l':>4} {'ceiling':>9} {'counted':>9}",
    ]
    for row in rows:
        adapters = _on_meta(method, BackboneShape.of(backbone), row.num_inputs)
        speedup = 1 / relative_cost(backbone, adapters, row.prefill_layers, length)
        lines.append(f"{row.num_inputs:>4} {row.prefill_layers:>4} {row.ceiling:>8.2f}× {speedup:>8.2f}×")
    return "\n".join(lines)


def memory(
    model: str = "bert-base",
    method: str = "revmux",
    num_inputs: int = 2,
    prefill_layers: int | None = None,
    batch_size: list[int] | None = None,
    length: list[int] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    prompt: str | None = None,
    soft_prompt: int = 0,
) -> str:
    """Memory of one training process: backbone, adapters in fp32 with AdamW, activations.

    Args:
        model: bert-base, bert-large, t5-small, t5-base, t5-large, llama-3-8b, or a local model folder.
        method: a method's name.
        num_inputs: N.
        prefill_layers: l; half the layers by default.
        batch_size: inputs a step, multiples of N; 16N by default.
        length: S, tokens of the longest input; 128 by default.
        dtype: type of a frozen backbone's weights.
        prompt: by which the language model of a folder answers: a shipped prompt's name or a YAML file.
        soft_prompt: vectors before every input of a language model.
    """
    backbone = meta_backbone(model, prompt=prompt, soft_prompt=soft_prompt)
    adapters = _on_meta(method, BackboneShape.of(backbone), num_inputs)
    cut_at = backbone.num_layers // 2 if prefill_layers is None else prefill_layers
    lines = [
        f"{model}: {method}, N = {num_inputs}, l = {cut_at} of {backbone.num_layers}; GiB, kernels' buffers not counted",
        f"{'batch':>6} {'length':>6} {'checkpointing':>13} {'backbone':>9} {'adapters':>9} {'gradients':>9} "
        f"{'AdamW':>9} {'kept':>9} {'working':>9} {'total':>9}",
    ]
    for batch in batch_size or [16 * num_inputs]:
        for tokens in length or [128]:
            for again in (False, True):
                plan = plan_memory(backbone, adapters, cut_at, batch, tokens, getattr(torch, dtype), again)
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


def _on_meta(method: str, shape: BackboneShape, num_inputs: int) -> Method:
    with torch.device("meta"):
        return build_method(method, shape, num_inputs)


def main() -> int:
    """Run a subcommand; 0, or 2 for a mistake in its arguments."""
    try:
        print(auto_cli({"cost": cost, "memory": memory, "cache": CACHE, "push": push}, prog="python -m revmux"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
