"""LoRA by PEFT in the upper layers of a backbone, to tune a task model that is an adapter on the frozen base.

PEFT replaces layers of the model, which suits a model that only one run trains. The result is saved in PEFT's format.
The adapters of multiplexing methods use :mod:`revmux.methods.lora` instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from revmux.backbone.base import Backbone
from revmux.utils.extras import require


def add_peft_lora(backbone: Backbone, first: int, rank: int) -> None:
    """Add trainable low-rank updates to all linear maps of the layers above ``first``, and train the head.

    Args:
        backbone: a frozen classifier. All of its own weights but those of the head stay frozen.
        first: number of layers that the base's other task models share.
        rank: r; the factor of the updates is 2.
    """
    peft = require("peft", "peft")
    names = {id(module): name for name, module in backbone.model.named_modules()}
    targets = [
        names[id(module)]
        for index in range(first, backbone.num_layers)
        for module in backbone.layer(index).modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    backbone.model.add_adapter(
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            modules_to_save=_head_modules(backbone.model),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.layer(first).modules()),
        )
    )
    backbone.frozen = False


def _head_modules(model: Any) -> list[str]:
    """The names of the modules that run after the layers."""
    body = model.base_model
    heads = [
        name
        for name, child in model.named_children()
        if child is not body and next(child.parameters(), None) is not None
    ]
    return heads + (["pooler"] if getattr(body, "pooler", None) is not None else [])
