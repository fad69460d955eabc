"""Load the adapters of a task onto its backbone, and count the cost of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from revmux.adapters.config import MERGE_LIMIT, WEIGHTS_NAME, AdapterConfig, load_adapter_config, local_adapter_folder
from revmux.adapters.folder import load_adapter
from revmux.errors import UserError
from revmux.fallback import check_threshold
from revmux.ladder import Stage
from revmux.model import MultiplexedClassifier
from revmux.pretrained.pretrained import Pretrained
from revmux.serving.route_cost import route_of
from revmux.serving.scheduling import Route, admits


class LineupPlace(NamedTuple):
    """The place of an adapter in a line-up: stage 1 has one adapter for each N, a later stage has one adapter.

    Attributes:
        stage: from 1.
        width: N in stage 1, 0 in later stages.
    """

    stage: int
    width: int

    def __str__(self) -> str:
        return f"N = {self.width}" if self.stage == 1 else f"stage {self.stage}"


def place_of(config: AdapterConfig) -> LineupPlace:
    """The place of an adapter in a line-up."""
    return LineupPlace(config.stage, config.num_inputs if config.stage == 1 else 0)


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter on the backbone of its task.

    Attributes:
        folder: folder or hub id that it was loaded from, as the caller wrote it.
        config: the adapter's configuration.
        model: backbone with the adapter, in eval mode.
        route: width and cost of the adapter itself, without the inputs that go on from it.
        threshold: confidence below which an input goes on to the next stage or the plain model; 0 means never.
    """

    folder: str
    config: AdapterConfig
    model: MultiplexedClassifier
    route: Route
    threshold: float = 0.0

    @property
    def place(self) -> LineupPlace:
        """The adapter's place in a line-up."""
        return place_of(self.config)

    @property
    def stage(self) -> Stage:
        """The adapter as a stage of a ladder."""
        return Stage(self.model, self.threshold, self.config.learned)

    @property
    def share_on(self) -> float:
        """Expected share of its inputs that go on; 0 if it was not measured at this threshold."""
        recorded = self.config.metrics.get("share_on", 0.0)
        measured = self.threshold == (self.config.fallback_threshold or 0.0) and math.isfinite(recorded)
        return min(max(recorded, 0.0), 1.0) if measured else 0.0


def check_stages(adapters: Sequence[tuple[str, AdapterConfig]], threshold: float | None = None) -> None:
    """Check that adapters form a line-up in which inputs can reach every stage.

    Args:
        adapters: name and configuration of each adapter.
        threshold: the operator's threshold for all adapters; None uses each adapter's own.

    Raises:
        UserError: two adapters have the same place, a stage is missing, or no adapter of a stage has a threshold
            although there is a later stage.
    """
    found: dict[LineupPlace, str] = {}
    for source, config in adapters:
        place = place_of(config)
        if place in found:
            kind = "one for each N" if place.stage == 1 else "one for each stage above 1"
            raise UserError(f"adapters {found[place]!r} and {source!r} both serve {place}; give {kind}")
        found[place] = source
    if not found:
        return
    last, source = max((place.stage, source) for place, source in found.items())
    for stage in range(1, last):
        thresholds = [
            config.fallback_threshold if threshold is None else threshold
            for _, config in adapters
            if config.stage == stage
        ]
        if not thresholds:
            raise UserError(
                f"adapter {source!r} serves stage {last}, but no adapter serves stage {stage}; add one with stage "
                f"{stage}, or remove the later stages"
            )
        if not any(thresholds):
            raise UserError(
                f"adapter {source!r} serves stage {last}, but stage {stage} has no threshold, so no input goes on from "
                "it; set a threshold, or remove the later stages"
            )


def admitted(
    adapters: Sequence[tuple[str, AdapterConfig]], max_multiplex: int | None
) -> list[tuple[str, AdapterConfig]]:
    """The adapters that a limit on the width allows.

    A later stage that is too wide ends the ladder: the inputs that would go on to it go to the plain model.

    Args:
        adapters: name and configuration of each adapter.
        max_multiplex: the limit; 1 allows no adapter, None allows all.
    """
    kept = [item for item in adapters if item[1].stage == 1 and admits(max_multiplex, item[1].num_inputs)]
    if not kept:
        return []
    for item in sorted((item for item in adapters if item[1].stage > 1), key=lambda item: item[1].stage):
        if not admits(max_multiplex, item[1].num_inputs):
            break
        kept.append(item)
    return kept


def load_adapters(
    folders: Sequence[str | Path],
    pretrained: Pretrained,
    threshold: float | None = None,
    merge_limit: int = MERGE_LIMIT,
) -> list[LoadedAdapter]:
    """Load every adapter onto the backbone and count its cost.

    Args:
        folders: adapter folders, or ids on the hub, trained on this backbone.
        pretrained: the backbone.
        threshold: the operator's threshold for all adapters; None uses each adapter's own.
        merge_limit: see :func:`revmux.adapters.folder.load_adapter`.

    Raises:
        UserError: a folder does not contain an adapter of this backbone, or the adapter changes the backbone's weights
            or does not support the threshold.
    """
    adapters = []
    for source in folders:
        folder = local_adapter_folder(source)
        config = load_adapter_config(folder)
        _check_frozen(folder, config)
        model = load_adapter(folder, pretrained, merge_limit=merge_limit)
        effective = (config.fallback_threshold if threshold is None else threshold) or 0.0
        check_threshold(effective, model.method, str(source))
        adapters.append(LoadedAdapter(str(source), config, model, route_of(model), effective))
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


def points_lost(config: AdapterConfig) -> float | None:
    """Accuracy that the adapter lost against the plain model in its evaluation, in percentage points.

    The evaluation uses this adapter for all inputs. With a threshold, the loss is smaller.

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
        threshold: confidence below which an input goes on to the next stage or to the plain model; 0 means never.
        max_points: percentage points that it may lose without a warning.

    Returns:
        The line, and whether it is a warning.
    """
    stage = f"stage {config.stage}, " if config.stage > 1 else ""
    line = f"adapter {str(source)!r} ({stage}N = {config.num_inputs}, {config.method}): "
    lost = points_lost(config)
    if lost is None:
        return line + "its accuracy was not measured; measure it with revmux evaluate", False
    own, plain = config.metrics["accuracy_mean"], config.metrics["siso_accuracy"]
    line += f"accuracy {own:.1%}, {lost:.1f} points below the plain model ({plain:.1%})"
    if threshold > 0:
        return f"{line}, before inputs below confidence {threshold:g} go on to the next stage or the plain model", False
    if lost <= max_points:
        return line, False
    return (
        f"{line}, more than {max_points:g}. Under load, requests get these answers. Set a threshold for the fallback, "
        f"or {_how_to_avoid(config.num_inputs)}",
        True,
    )


def _how_to_avoid(num_inputs: int) -> str:
    return f"set max_multiplex below {num_inputs}" if num_inputs > 2 else "remove this adapter"
