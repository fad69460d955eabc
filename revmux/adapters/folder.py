"""Adapters on disk: ``adapter_config.json``, ``adapter_model.safetensors`` and a generated model card."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from revmux.adapters.card import model_card
from revmux.adapters.compatibility import check_base, check_format
from revmux.adapters.config import (
    CARD_NAME,
    CONFIG_NAME,
    MERGE_LIMIT,
    WEIGHTS_NAME,
    AdapterConfig,
    dtype_name,
    load_adapter_config,
    local_adapter_folder,
)
from revmux.backbone import Backbone
from revmux.errors import UserError
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.pretrained import Pretrained
from revmux.utils.files import atomic_folder
from revmux.version import __version__


def describe_adapter(
    model: MultiplexedClassifier,
    pretrained: Pretrained,
    max_length: int,
    task: dict[str, Any],
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> AdapterConfig:
    """The config of a model in its current state."""
    return AdapterConfig(
        method=model.method.name,
        options=model.method.options_dict(),
        num_inputs=model.num_inputs,
        prefill_layers=model.prefill_layers,
        max_length=max_length,
        label_names=pretrained.backbone.label_names,
        base_model=pretrained.identity,
        task=task,
        training=training or {},
        metrics=metrics or {},
        prompt=None if pretrained.prompt is None else pretrained.prompt.to_dict(),
        dtype=dtype_name(pretrained.backbone.dtype),
        tunable_parameters=model.method.tunable_parameters(),
        library_version=__version__,
    )


def adapter_weights(model: MultiplexedClassifier) -> dict[str, Tensor]:
    """CPU copies of the weights for inference: those of the method, and of the backbone if the method tunes it."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in _inference_state(model).items()}


def _inference_state(model: MultiplexedClassifier) -> dict[str, Tensor]:
    weights = {f"method.{name}": value for name, value in model.method.inference_state().items()}
    if model.method.tunes_backbone:
        weights |= {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    return weights


def save_adapter(
    model: MultiplexedClassifier, config: AdapterConfig, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> Path:
    """Write an adapter folder atomically, without access to the hub.

    Args:
        model: the model, whose weights are saved unless ``weights`` is given.
        config: see :func:`describe_adapter`.
        folder: the target folder, replaced if it exists.
        weights: weights from :func:`adapter_weights`, such as those of the best epoch.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        save_file(weights or adapter_weights(model), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        _write_description(config, temporary)
    return folder


def _write_description(config: AdapterConfig, folder: Path) -> None:
    text = json.dumps(asdict(config), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n")
    (folder / CARD_NAME).write_text(model_card(config))


def load_adapter(
    adapter: str | Path, pretrained: Pretrained, revision: str | None = None, merge_limit: int = MERGE_LIMIT
) -> MultiplexedClassifier:
    """Load an adapter onto its backbone, in eval mode.

    Args:
        adapter: a folder or an id on the hub, see :func:`local_adapter_folder`.
        pretrained: the backbone that the adapter was trained on. If the method tuned it, the model has a copy.
        revision: branch, tag or commit of the adapter on the hub.
        merge_limit: most bytes of memory for a copy of the weights into which LoRA's updates are merged, which makes
            inference faster; 0 keeps them apart.

    Raises:
        UserError: the adapter cannot be found, the backbone or its labels differ from those in training, or weights
            are unreadable, missing, unexpected or of the wrong shape.
    """
    folder = local_adapter_folder(adapter, revision)
    config = load_adapter_config(folder)
    check_base(config, pretrained, adapter)
    backbone: Backbone = pretrained.backbone
    method = build_method(config.method, BackboneShape.of(backbone), config.num_inputs, config.options)
    check_format(config, method, backbone, adapter)
    method.drop_training_parts()
    if method.tunes_backbone:
        backbone = copy.deepcopy(
            backbone
        )  # the given backbone must not change, since other adapters were trained on it
    model = MultiplexedClassifier(backbone, method, config.prefill_layers)
    weights = _load_weights(folder / WEIGHTS_NAME)
    expected = _inference_state(model)
    problems = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{folder / WEIGHTS_NAME} does not fit its config: {'; '.join(problems[:4])}; train it again")
    method.load_state_dict(
        {name.removeprefix("method."): value for name, value in weights.items() if name.startswith("method.")}
    )
    tuned = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    if tuned:
        backbone.load_state_dict(tuned)
    method.to(backbone.device)
    model.merge_lora(merge_limit)
    return model.requires_grad_(False).eval()


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); the folder is damaged, save the adapter again") from None
