"""``adapter_config.json``: what an adapter is, and the backbone that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from revmux.data.prompt import Prompt
from revmux.errors import UserError
from revmux.pretrained import hub
from revmux.pretrained.config import EMBEDDED_NAME, BackboneConfig, Dtype
from revmux.utils.files import recover_folder
from revmux.utils.type_check import check_types
from revmux.version import __version__

if TYPE_CHECKING:  # adapters are checked before torch is imported
    import torch

FORMAT_VERSION = 1


CONFIG_NAME = "adapter_config.json"


WEIGHTS_NAME = "adapter_model.safetensors"


CARD_NAME = "README.md"


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
        prompt: what every input was put into, as plain data; None with a classification head.
        fallback_threshold: confidence below which a server lets an answer fall back, see :mod:`revmux.fallback`;
            None is never.
        dtype: type of the backbone's weights in training, such as ``bfloat16``; None where it is not recorded.
        tunable_parameters: how many weights were trained, the backbone's not counted.
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
    prompt: dict[str, Any] | None = None
    fallback_threshold: float | None = None
    dtype: str | None = None
    tunable_parameters: int = 0
    format_version: int = FORMAT_VERSION
    library_version: str = ""

    @property
    def backbone_is_found(self) -> bool:
        """Whether ``base_model`` leads to the backbone on any machine: it is the embedded one, or one of the hub."""
        return self.base_model.get("revision") is not None or self.base_model["name"] == EMBEDDED_NAME

    def recorded_prompt(self) -> Prompt | None:
        """The prompt, with its classes in the order of the scores."""
        return None if self.prompt is None else Prompt.from_dict(self.prompt, self.label_names)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``, as configurations name it."""
    return str(dtype).removeprefix("torch.")


def local_adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: the one named, or one of the hub, downloaded once.

    Args:
        adapter: a folder; or on the hub ``user/name``, also with its revision as ``user/name@revision``.
        revision: branch, tag or commit on the hub; ignored for folders.

    Raises:
        UserError: no such folder, and the hub has no such adapter either.
    """
    folder = Path(adapter).expanduser()
    recover_folder(folder)
    name, _, inline = str(adapter).partition("@")
    if folder.exists() or not hub.is_repository(name):
        return folder
    try:
        return hub.fetch(name, revision or inline or None, [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME])
    except UserError as error:
        raise UserError(f"no adapter folder {name!r} here, and as an id of the hub: {error}") from None


def load_adapter_config(adapter: str | Path, revision: str | None = None) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        adapter: a folder or an id of the hub, see :func:`adapter_folder`.
        revision: on the hub.

    Raises:
        UserError: no such adapter, not an adapter, written in a newer format, or with values of another type.
    """
    path = local_adapter_folder(adapter, revision) / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{str(adapter)!r} is no adapter folder: it has no {CONFIG_NAME}; name a folder that training wrote"
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
            f"{__version__} that reads up to {FORMAT_VERSION}; run: pip install --upgrade revmux"
        )
    known = {item.name for item in fields(AdapterConfig)}
    if odd := sorted(raw.keys() - known):
        raise UserError(f"{path} has unknown keys {', '.join(odd)}; known: {', '.join(sorted(known))}")
    check_types(AdapterConfig, raw, str(path))
    try:
        return AdapterConfig(**raw)
    except TypeError as error:
        raise UserError(f"{path} is incomplete: {error}") from None


def recorded_prompt(adapters: Sequence[str | Path]) -> Prompt | None:
    """The prompt that adapters of one backbone were trained with, so that whoever loads the backbone can give it.

    Raises:
        UserError: no such adapter, or not an adapter.
    """
    prompts = (load_adapter_config(adapter).recorded_prompt() for adapter in adapters)
    return next((prompt for prompt in prompts if prompt is not None), None)


def recorded_backbone(config: AdapterConfig, adapter: str | Path) -> BackboneConfig:
    """Where the backbone of an adapter is found again.

    Raises:
        UserError: it was a local folder, of which only the name is recorded.
    """
    base = config.base_model
    name, revision = str(base["name"]), base.get("revision")
    if not config.backbone_is_found:
        raise UserError(
            f"adapter {str(adapter)!r} was trained on the local model {name!r} (sha256 {str(base.get('sha256'))[:12]}…); "
            "say where it is: backbone=FOLDER, or its id on the hub"
        )
    return BackboneConfig(name, revision, dtype=recorded_dtype(config))


def recorded_dtype(config: AdapterConfig) -> Dtype:
    """The type that the backbone's weights had in training; float32 where it is not recorded."""
    return cast("Dtype", config.dtype or "float32")  # BackboneConfig refuses others
