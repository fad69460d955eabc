"""The adapters of an engine: loaded onto its one backbone, and what each costs."""

from __future__ import annotations

import math
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


def points_lost(config: AdapterConfig) -> float | None:
    """Percentage points of accuracy below the plain model in the adapter's own evaluation; None where not measured.

    Answers that fall back to the plain model are not counted, so with a threshold the loss is smaller.
    """
    own, plain = config.metrics.get("accuracy_mean"), config.metrics.get("siso_accuracy")
    if own is None or plain is None or not math.isfinite(own + plain):
        return None
    return 100 * (plain - own)


def describe_loss(config: AdapterConfig, source: str | Path, threshold: float, most: float) -> tuple[str, bool]:
    """What an adapter costs in accuracy, on one line.

    Args:
        config: of the adapter.
        source: how the operator names it.
        threshold: confidence below which its answers fall back, 0 for never.
        most: points that it may lose without a warning.

    Returns:
        The line, and whether it is a warning.
    """
    line = f"adapter {str(source)!r} (N = {config.num_inputs}, {config.method}): "
    lost = points_lost(config)
    if lost is None:
        return line + "its accuracy was not measured; run python -m ray_jobs.evaluate", False
    own, plain = config.metrics["accuracy_mean"], config.metrics["siso_accuracy"]
    line += f"accuracy {own:.1%}, {lost:.1f} points below the plain model ({plain:.1%})"
    if threshold > 0:
        return f"{line}, before answers below confidence {threshold:g} fall back to it", False
    if lost <= most:
        return line, False
    return (
        f"{line}, more than {most:g}: busy traffic gets these answers; set a threshold to fall back, "
        f"or {_without(config.num_inputs)}",
        True,
    )


def _without(num_inputs: int) -> str:
    return f"max_multiplex below {num_inputs}" if num_inputs > 2 else "leave this adapter out"
