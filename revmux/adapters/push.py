"""Publication of adapters on the Hugging Face Hub."""

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
    """Push an adapter to the hub in one commit. The token comes from ``HF_TOKEN`` or ``hf auth login``.

    Args:
        adapter: a folder, or a model with its ``config``.
        repository: ``user/name``, created if it is missing.
        config: the config of a model, see :func:`describe_adapter`. A folder contains its own.
        revision: branch. None means the default branch.
        private: whether a new repository is private. None means the account's setting.
        base_model: id of the backbone on the hub, if the adapter was trained on a local copy. It is recorded with its
            revision, after a check that its weights are the same.
        message: commit message.

    Returns:
        The commit, for ``from_pretrained(..., revision=commit)``.

    Raises:
        UserError: the adapter cannot be found or is damaged, the base model differs, or the hub rejects the push.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        if isinstance(adapter, MultiplexedClassifier):
            if config is None:
                raise UserError("config is None, but a model needs one; pass config=describe_adapter(...)")
            save_adapter(adapter, config, folder)
        else:
            config = load_adapter_config(adapter)
            shutil.copytree(local_adapter_folder(adapter), folder)
        if base_model is not None:
            _write_description(replace(config, base_model=_on_hub(config, base_model)), folder)
        files = [folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{str(adapter)!r} has no {', '.join(missing)}; the folder is damaged, save the adapter again"
            )
        return hub.push(files, repository, revision, private, message)


def _on_hub(config: AdapterConfig, name: str) -> dict[str, str | None]:
    """The base model of a config, identified by its id on the hub.

    Raises:
        UserError: the weights on the hub differ.
    """
    revision, sha256 = hub.weights_on_hub(name)
    wanted = config.base_model.get("sha256")
    if wanted is None or wanted != sha256:
        raise UserError(
            f"the adapter was trained on {config.base_model['name']} (sha256 {wanted}), but {name} on the hub has sha256 "
            f"{sha256}; push that model first, or omit base_model"
        )
    return config.base_model | {"name": name, "revision": revision}
