"""``adapter_config.json``: the description of an adapter and of its backbone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from revmux.data.prompt import Prompt
from revmux.deferral import Deferral
from revmux.errors import UserError
from revmux.pretrained import hub
from revmux.pretrained.config import EMBEDDED_MODELS, BackboneConfig, Dtype
from revmux.utils.copies import local_path
from revmux.utils.files import recover_folder
from revmux.utils.type_check import check_types
from revmux.version import __version__

if TYPE_CHECKING:  # adapters are checked before torch is imported
    import torch

FORMAT_VERSION = 3
"""2: deferral and the stages of a ladder. 3: methods read the normalized own states of families with a final norm."""
NORMALIZED_SINCE = 3


CONFIG_NAME = "adapter_config.json"


WEIGHTS_NAME = "adapter_model.safetensors"


CARD_NAME = "README.md"


MERGE_LIMIT = 512 * 2**20
"""Most bytes of an adapter's copy of the weights into which LoRA's updates are merged, by default."""


@dataclass(frozen=True)
class AdapterConfig:
    """All that is needed to load an adapter onto its backbone, and its origin.

    Attributes:
        method: registered name of the method.
        options: settings of the method.
        num_inputs: N.
        prefill_layers: l.
        max_length: maximum number of tokens per input in training.
        label_names: classes in the order of the scores.
        base_model: ``name``, ``revision`` and ``sha256`` of the backbone.
        task: identity of the data.
        training: loss, optimizer and seed.
        metrics: results on the test set.
        prompt: the prompt in training, as plain data; None if the backbone has a classification head.
        fallback_threshold: confidence below which a served input goes on to the next stage, or to the plain model after
            the last stage, see :mod:`revmux.ladder`; None means that all answers are final.
        deferral: the learned confidence of this stage, see :class:`revmux.deferral.Deferral`; None uses the plain one.
        stage: the stage of a ladder that the adapter serves, from 1.
        dtype: type of the backbone's weights in training, such as ``bfloat16``; None if it is not recorded.
        tunable_parameters: number of trained weights, without those of the backbone.
        format_version: version of the file format.
        library_version: version of revmux that wrote the files.
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
    deferral: dict[str, Any] | None = None
    stage: int = 1
    dtype: str | None = None
    tunable_parameters: int = 0
    format_version: int = FORMAT_VERSION
    library_version: str = ""

    @property
    def backbone_is_found(self) -> bool:
        """Whether any machine can find the backbone from ``base_model``: it is an embedded model, or on the hub."""
        return self.base_model.get("revision") is not None or self.base_model["name"] in EMBEDDED_MODELS

    @property
    def pairs(self) -> bool | None:
        """Whether the adapter was trained on pairs of texts; None if it does not record it."""
        recorded = self.task.get("pairs")
        return recorded if isinstance(recorded, bool) else None

    @property
    def learned(self) -> Deferral | None:
        """The learned confidence of this stage."""
        return None if self.deferral is None else Deferral.from_dict(self.deferral, self.stage, CONFIG_NAME)

    def recorded_prompt(self) -> Prompt | None:
        """The prompt, with its classes in the order of the scores."""
        return None if self.prompt is None else Prompt.from_dict(self.prompt, self.label_names)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in configurations, such as ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def local_adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter. An adapter on the hub or on an object store is downloaded if it is not cached.

    Args:
        adapter: a folder, its URI, or ``user/name`` or ``user/name@revision`` on the hub.
        revision: branch, tag or commit on the hub. Ignored for folders.

    Raises:
        UserError: there is no such folder, and the adapter cannot be downloaded from the hub.
    """
    folder = local_path(str(adapter))
    recover_folder(folder)
    name, _, inline = str(adapter).partition("@")
    if folder.exists() or not hub.is_repository(name):
        return folder
    try:
        return hub.fetch(name, revision or inline or None, [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME])
    except UserError as error:
        raise UserError(f"cannot find adapter folder {name!r}, and as an id on the hub: {error}") from None


def load_adapter_config(adapter: str | Path, revision: str | None = None) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        adapter: a folder, its URI or an id on the hub, see :func:`local_adapter_folder`.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: the adapter cannot be found, the folder is not an adapter, its format is newer than this version of
            revmux supports, or a value has the wrong type.
    """
    path = local_adapter_folder(adapter, revision) / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{str(adapter)!r} is not an adapter folder: it has no {CONFIG_NAME}; name a folder that training wrote"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); the folder is damaged, save the adapter again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} does not contain a JSON object; the folder is damaged, save the adapter again")
    version = raw.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version} (revmux {raw.get('library_version')}), but revmux {__version__} "
            f"supports format versions up to {FORMAT_VERSION}; run: pip install --upgrade revmux"
        )
    known = {item.name for item in fields(AdapterConfig)}
    if odd := sorted(raw.keys() - known):
        raise UserError(f"{path} has unknown keys {', '.join(odd)}; known: {', '.join(sorted(known))}; remove them")
    check_types(AdapterConfig, raw, str(path))
    try:
        config = AdapterConfig(**raw)
    except TypeError as error:
        raise UserError(f"{path} is incomplete ({error}); the folder is damaged, save the adapter again") from None
    if config.stage < 1:
        raise UserError(f"{path} has stage {config.stage}; the stages of a ladder start at 1, write 1 or more")
    if config.deferral is not None:
        Deferral.from_dict(config.deferral, config.stage, str(path))
    return config


def recorded_prompt(adapters: Sequence[str | Path]) -> Prompt | None:
    """The prompt that adapters of one backbone were trained with, which is needed to load the backbone.

    Raises:
        UserError: an adapter cannot be found or read.
    """
    prompts = (load_adapter_config(adapter).recorded_prompt() for adapter in adapters)
    return next((prompt for prompt in prompts if prompt is not None), None)


def recorded_backbone(config: AdapterConfig, adapter: str | Path) -> BackboneConfig:
    """The settings to load the backbone of an adapter.

    Raises:
        UserError: the backbone was a local folder, of which only the name is recorded.
    """
    base = config.base_model
    name, revision = str(base["name"]), base.get("revision")
    if not config.backbone_is_found:
        raise UserError(
            f"adapter {str(adapter)!r} was trained on the local model {name!r} (sha256 {str(base.get('sha256'))[:12]}…); "
            "pass its location: backbone=FOLDER, or its id on the hub"
        )
    return BackboneConfig(name, revision, dtype=recorded_dtype(config))


def recorded_dtype(config: AdapterConfig) -> Dtype:
    """The type of the backbone's weights in training, or float32 if it is not recorded."""
    return cast("Dtype", config.dtype or "float32")  # BackboneConfig checks the value
