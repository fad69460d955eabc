"""The adapters of an engine: loaded onto its one backbone, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from revmux.adapters.config import WEIGHTS_NAME, AdapterConfig, load_adapter_config, local_adapter_folder
from revmux.adapters.folder import load_adapter
from revmux.errors import UserError
from revmux.estimate.flops import count_flops, plain_cost
from revmux.model import MultiplexedClassifier
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.scheduling import Route, admits

COUNTED_LENGTH = 64
"""Tokens of the inputs whose cost is counted; what is compared hardly depends on it."""


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter on the engine's backbone.

    Attributes:
        folder: where it was loaded from, as it was named.
        config: what the folder says of it.
        model: in eval mode.
        route: its width and cost.
    """

    folder: str
    config: AdapterConfig
    model: MultiplexedClassifier
    route: Route


def load_adapters(
    folders: Sequence[str | Path], pretrained: Pretrained, max_multiplex: int | None = None
) -> list[LoadedAdapter]:
    """Put every adapter on the backbone and count its cost.

    Args:
        folders: adapter folders, or ids on the hub, trained on this backbone.
        pretrained: the backbone.
        max_multiplex: wider adapters are left out, all of them at 1; None keeps all.

    Raises:
        UserError: a folder is no adapter of this backbone, or its method changed the backbone.
    """
    adapters = []
    for named in folders:
        folder = local_adapter_folder(named)
        config = load_adapter_config(folder)
        if not admits(max_multiplex, config.num_inputs):
            continue
        _check_frozen(folder, config)
        model = load_adapter(folder, pretrained)
        adapters.append(LoadedAdapter(str(named), config, model, _route(model)))
    return adapters


def _check_frozen(folder: Path, config: AdapterConfig) -> None:
    """Refuse weights that would change the backbone under the other adapters and the plain model."""
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError):
        return  # loading tells what is wrong with them
    if any(name.startswith("backbone.") for name in names):
        raise UserError(
            f"adapter {str(folder)!r} ({config.method}) tuned the backbone itself, which other requests share; "
            "serve adapters of a frozen backbone"
        )


def _route(model: MultiplexedClassifier) -> Route:
    backbone, method, width = model.backbone, model.method, model.num_inputs
    length = min(COUNTED_LENGTH, backbone.max_length - method.added_tokens)
    plain = plain_cost(backbone, length).per_input
    cost = count_flops(backbone, method, model.prefill_layers, length)
    if method.prepares_tokens:  # every slot has tokens of its own, so a repeated input saves nothing
        return Route(width, f"slots of {width}", 0.0, width * cost.per_input / plain, method.name)
    shared = width * (cost.per_input - cost.prefill)
    return Route(width, f"layer {model.prefill_layers}", cost.prefill / plain, shared / plain, method.name)
