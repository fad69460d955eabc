"""Adapters on disk: ``adapter_config.json``, ``adapter_model.safetensors`` and a generated model card."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import revmux
from revmux.backbone import Backbone
from revmux.errors import UserError
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained import Pretrained

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterConfig:
    """All that is needed to put an adapter on its backbone again, and where it came from.

    Attributes:
        method: registered name of the method.
        options: its settings.
        num_inputs: N.
        prefill_layers: l.
        max_length: tokens that inputs were cut to in training.
        label_names: classes in the order of the scores.
        base_model: ``name``, ``revision`` and ``sha256`` of the backbone.
        task: identity of the data.
        training: loss, optimiser and seed.
        metrics: what was measured on data that chose nothing.
        format_version: of these files.
        library_version: that wrote them.
    """

    method: str
    num_inputs: int
    prefill_layers: int
    max_length: int
    label_names: list[str]
    base_model: dict[str, str | None]
    options: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    library_version: str = ""


def describe(
    model: MultiplexedClassifier,
    pretrained: Pretrained,
    max_length: int,
    task: dict[str, Any],
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> AdapterConfig:
    """The config of a model as it stands."""
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
        library_version=revmux.__version__,
    )


def adapter_weights(model: MultiplexedClassifier) -> dict[str, Tensor]:
    """What training made: the method's state, and the backbone's too where the method tunes it."""
    weights = {f"method.{name}": value for name, value in model.method.state_dict().items()}
    if model.method.tunes_backbone:
        weights |= {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}


def save_pretrained(
    model: MultiplexedClassifier, config: AdapterConfig, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> Path:
    """Write an adapter folder whole or not at all.

    Args:
        model: gives the weights, unless they are given.
        config: see :func:`describe`.
        folder: replaced if it exists.
        weights: as :func:`adapter_weights` gives them, such as those of the best epoch.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        save_file(weights or adapter_weights(model), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(asdict(config), indent=2, sort_keys=True)
        (temporary / CONFIG_NAME).write_text(text + "\n")
        (temporary / "README.md").write_text(model_card(config, model.method.tunable_parameters()))
    return folder


def load_config(folder: str | Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        UserError: no such folder, not an adapter, or written in a newer format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} is no adapter folder: it has no {CONFIG_NAME}; name a folder that training wrote"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); the folder is damaged, write it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object; the folder is damaged, write it again")
    version = raw.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version} (revmux {raw.get('library_version')}), this is revmux "
            f"{revmux.__version__} that reads up to {FORMAT_VERSION}; run: pip install --upgrade revmux"
        )
    known = {item.name for item in fields(AdapterConfig)}
    if odd := sorted(raw.keys() - known):
        raise UserError(f"{path} has unknown keys {', '.join(odd)}; known: {', '.join(sorted(known))}")
    try:
        return AdapterConfig(**raw)
    except TypeError as error:
        raise UserError(f"{path} is incomplete: {error}") from None


def from_pretrained(folder: str | Path, pretrained: Pretrained) -> MultiplexedClassifier:
    """Put an adapter on its backbone, in eval mode.

    Args:
        folder: an adapter folder.
        pretrained: the backbone that it was trained on. Where the method tuned it, the model gets a copy.

    Raises:
        UserError: another backbone, other labels, no readable weights, or missing, unexpected or misshaped weights.
    """
    config = load_config(folder)
    check_base(config, pretrained, folder)
    backbone: Backbone = pretrained.backbone
    method = build_method(config.method, BackboneShape.of(backbone), config.num_inputs, config.options)
    if method.tunes_backbone:
        backbone = copy.deepcopy(backbone)  # the one given stays what others were trained on
    model = MultiplexedClassifier(backbone, method, config.prefill_layers)
    weights = _load_weights(Path(folder) / WEIGHTS_NAME)
    expected = adapter_weights(model)
    problems = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(
            f"{Path(folder) / WEIGHTS_NAME} does not fit its config: {'; '.join(problems[:4])}; train it again"
        )
    method.load_state_dict(
        {name.removeprefix("method."): value for name, value in weights.items() if name.startswith("method.")}
    )
    tuned = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    if tuned:
        backbone.load_state_dict(tuned)
    method.to(backbone.device)
    return model.requires_grad_(False).eval()


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); the folder is damaged, write it again") from None


def check_base(config: AdapterConfig, pretrained: Pretrained, folder: str | Path) -> None:
    """Refuse an adapter on another backbone than its own.

    Raises:
        UserError: naming both backbones.
    """
    for key in ("sha256", "revision"):
        wanted, given = config.base_model.get(key), pretrained.identity.get(key)
        if wanted and given and wanted != given:
            raise UserError(
                f"adapter {str(folder)!r} was trained on {config.base_model['name']} ({key} {wanted[:12]}…), but the backbone "
                f"given is {pretrained.identity['name']} ({key} {given[:12]}…); load that backbone, or train the adapter on this one"
            )
        if wanted and given:
            break
    else:
        if config.base_model["name"] != pretrained.identity["name"]:
            raise UserError(
                f"adapter {str(folder)!r} was trained on {config.base_model['name']}, but the backbone given is "
                f"{pretrained.identity['name']}; load that backbone"
            )
    if config.label_names != pretrained.backbone.label_names:
        raise UserError(
            f"adapter {str(folder)!r} has the labels {', '.join(config.label_names)}, the backbone has "
            f"{', '.join(pretrained.backbone.label_names)}; load the task model that it was trained on"
        )


def model_card(config: AdapterConfig, tunable_parameters: int) -> str:
    """The README.md of an adapter folder."""
    template = resources.files("revmux").joinpath("model_card.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(config=config, tunable_parameters=tunable_parameters)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when all in it is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / "old")
            try:
                os.replace(temporary, folder)
            except BaseException:
                os.replace(old / "old", folder)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` under a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(value, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
