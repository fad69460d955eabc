"""What two task models of one architecture have in common, whatever their weights and classes."""

from __future__ import annotations

import json
from typing import Any

from revmux.backbone import Backbone

_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "classifier_dropout",
        "finetuning_task",
        "id2label",
        "label2id",
        "problem_type",
        "transformers_version",
    }
)
"""Settings of a model's configuration that have no effect on the states of its layers."""


def architecture_of(backbone: Backbone) -> tuple[Any, ...]:
    """What determines how the layers of a model compute, as a value that can be compared and hashed."""
    config = backbone.config
    settings = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_EFFECT}
    kernel = getattr(config, "_attn_implementation", None)
    return type(backbone), type(backbone.model), kernel, json.dumps(settings, sort_keys=True, default=str)
