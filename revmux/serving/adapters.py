"""Load the adapters of a task onto its backbone, and count the cost of each."""

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
"""Tokens per input for which costs are counted. Costs relative to the plain model hardly depend on it."""


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter on the backbone of its task.

    Attributes:
        folder: folder or hub id that it was loaded from, as the caller wrote it.
        config: the adapter's configuration.
        model: backbone with the adapter, in eval mode.
        route: width and cost, for the scheduler.
    """

    folder: str
    config: AdapterConfig
    model: MultiplexedClassifier
    route: Route


def load_adapters(
    folders: Sequence[str | Path], pretrained: Pretrained, max_multiplex: int | None = None
) -> list[LoadedAdapter]:
    """Load every adapter onto the backbone and count its cost.

    Args:
        folders: adapter folders, or ids on the hub, trained on this backbone.
        pretrained: the backbone.
        max_multiplex: wider adapters are skipped; 1 skips all adapters, None skips none.

    Raises:
        UserError: a folder does not contain an adapter of this backbone, or the adapter changes the backbone's weights.
    """
    adapters = []
    for source in folders:
        folder = local_adapter_folder(source)
        config = load_adapter_config(folder)
        if not admits(max_multiplex, config.num_inputs):
            continue
        _check_frozen(folder, config)
        model = load_adapter(folder, pretrained)
        adapters.append(LoadedAdapter(str(source), config, model, _route(model)))
    return adapters


def _check_frozen(folder: Path, config: AdapterConfig) -> None:
    """Refuse an adapter that would change the backbone's weights, which the plain model and other adapters share."""
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError):
        return  # load_adapter reports the error
    if any(name.startswith("backbone.") for name in names):
        raise UserError(
            f"adapter {str(folder)!r} ({config.method}) tuned the backbone, which all adapters share; "
            "serve adapters that were trained on a frozen backbone"
        )


def _route(model: MultiplexedClassifier) -> Route:
    backbone, method, width = model.backbone, model.method, model.num_inputs
    length = min(COUNTED_LENGTH, backbone.max_length - method.added_tokens)
    plain = plain_cost(backbone, length).per_input
    cost = count_flops(backbone, method, model.prefill_layers, length)
    if method.prepares_tokens:  # the tokens differ per slot, so filling slots with repeated inputs saves nothing
        return Route(width, f"slots of {width}", 0.0, width * cost.per_input / plain, method.name)
    shared = width * (cost.per_input - cost.prefill)
    return Route(width, f"layer {model.prefill_layers}", cost.prefill / plain, shared / plain, method.name)


def points_lost(config: AdapterConfig) -> float | None:
    """Accuracy that the adapter lost against the plain model in its evaluation, in percentage points.

    The evaluation does not use the fallback. With a threshold, the loss is smaller.

    Returns:
        The loss, or None if it was not measured.
    """
    own, plain = config.metrics.get("accuracy_mean"), config.metrics.get("siso_accuracy")
    if own is None or plain is None or not math.isfinite(own + plain):
        return None
    return 100 * (plain - own)


def describe_loss(config: AdapterConfig, source: str | Path, threshold: float, max_points: float) -> tuple[str, bool]:
    """Describe on one line how much accuracy an adapter loses.

    Args:
        config: the adapter's configuration.
        source: the adapter's name in the operator's configuration.
        threshold: confidence below which its answers fall back to the plain model; 0 disables the fallback.
        max_points: percentage points that it may lose without a warning.

    Returns:
        The line, and whether it is a warning.
    """
    line = f"adapter {str(source)!r} (N = {config.num_inputs}, {config.method}): "
    lost = points_lost(config)
    if lost is None:
        return line + "its accuracy was not measured; measure it with revmux evaluate", False
    own, plain = config.metrics["accuracy_mean"], config.metrics["siso_accuracy"]
    line += f"accuracy {own:.1%}, {lost:.1f} points below the plain model ({plain:.1%})"
    if threshold > 0:
        return f"{line}, before answers below confidence {threshold:g} fall back to it", False
    if lost <= max_points:
        return line, False
    return (
        f"{line}, more than {max_points:g}. Under load, requests get these answers. Set a threshold for the fallback, "
        f"or {_how_to_avoid(config.num_inputs)}",
        True,
    )


def _how_to_avoid(num_inputs: int) -> str:
    return f"set max_multiplex below {num_inputs}" if num_inputs > 2 else "remove this adapter"
