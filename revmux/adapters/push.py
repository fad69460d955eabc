"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from revmux.adapters.config import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    load_adapter_config,
    local_adapter_folder,
)
from revmux.adapters.folder import _write_description, save_adapter
from revmux.errors import UserError
from revmux.model import MultiplexedClassifier
from revmux.pretrained import hub


def push_to_hub(
    adapter: str | Path | MultiplexedClassifier,
    repository: str,
    config: AdapterConfig | None = None,
    revision: str | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    message: str = "Add adapter",
) -> str:
    """Put an adapter on the hub, in one commit; the token is that of ``HF_TOKEN`` or of ``hf auth login``.

    Args:
        adapter: a folder, or a model with its ``config``.
        repository: ``user/name``; made where it is missing.
        config: of a model, see :func:`describe`; a folder has its own.
        revision: branch; None is the default one.
        private: whether a new repository is private; None is the account's setting.
        base_model: id on the hub of the backbone, where the adapter was trained on a local copy: recorded with its
            revision, after its weights were found to be the same ones.
        message: of the commit.

    Returns:
        The commit, which ``from_pretrained(..., revision=commit)`` takes.

    Raises:
        UserError: no adapter, another base model, or the hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        if isinstance(adapter, MultiplexedClassifier):
            if config is None:
                raise UserError("a model alone does not say where it comes from; give its config too: describe(...)")
            save_adapter(adapter, config, folder)
        else:
            config = load_adapter_config(adapter)
            shutil.copytree(local_adapter_folder(adapter), folder)
        if base_model is not None:
            _write_description(replace(config, base_model=_on_hub(config, base_model)), folder)
        files = [folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)]
        if gone := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{str(adapter)!r} has no {', '.join(gone)}; the folder is damaged, write it again")
        return hub.push(files, repository, revision, private, message)


def _on_hub(config: AdapterConfig, name: str) -> dict[str, str | None]:
    """The base model of a config under its id on the hub."""
    revision, sha256 = hub.weights_on_hub(name)
    wanted = config.base_model.get("sha256")
    if wanted is None or wanted != sha256:
        raise UserError(
            f"the adapter was trained on {config.base_model['name']} (sha256 {wanted}), but {name} on the hub has sha256 "
            f"{sha256}; push that model first, or leave base_model out"
        )
    return config.base_model | {"name": name, "revision": revision}
