"""Fetch task models and adapters from folders, object stores, the model hub, and MLflow's registry and runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from revmux.adapters.config import CONFIG_NAME, local_adapter_folder
from revmux.errors import UserError
from revmux.pretrained.location import PEFT_CONFIG_NAME, peft_settings
from revmux.utils.extras import require
from revmux.utils.redact import error_line, without_passwords

_MODEL_CONFIG = "config.json"


def is_mlflow(name: str) -> bool:
    """Whether the name of a task model or an adapter is an MLflow URI."""
    return name.startswith(("models:/", "runs:/"))


def fetch_model(model: str, downloads: Path) -> str:
    """Return the local folder of a task model from MLflow. Other names are returned unchanged.

    Args:
        model: the name of a task model, or ``models:/name@alias``, ``models:/name/version`` or ``runs:/id/path``.
        downloads: an existing folder for downloads, which the caller removes after loading the model.

    Raises:
        UserError: the model cannot be found or downloaded, or the result does not contain exactly one.
    """
    if not is_mlflow(model):
        return model
    downloaded = _download(model, downloads, lambda _, uri: uri)
    found = {file.parent for file in downloaded.rglob(_MODEL_CONFIG)}
    found |= {file.parent for file in downloaded.rglob(PEFT_CONFIG_NAME) if peft_settings(file.parent) is not None}
    if len(found) != 1:
        raise UserError(
            f"{without_passwords(model)!r} contains {len(found)} task models (folders with a {_MODEL_CONFIG}, or with a PEFT adapter); name "
            "an artifact with exactly one, with its tokenizer beside it"
        )
    return str(found.pop())


def fetch_adapter(adapter: str, downloads: Path) -> Path:
    """Return the local folder of an adapter. Adapters from elsewhere are downloaded.

    Downloads from the hub and from object stores go to a cache. MLflow has none, so the caller provides a folder for its
    downloads and removes it after loading the adapter.

    Args:
        adapter: a folder, ``user/name`` or ``user/name@revision`` on the hub, a URI such as ``s3://bucket/folder``,
            ``models:/name@alias``, ``models:/name/version`` or ``runs:/id/path``.
        downloads: an existing folder for downloads from MLflow.

    Raises:
        UserError: the adapter cannot be found or downloaded, or the result does not contain exactly one adapter.
    """
    if not is_mlflow(adapter):
        return local_adapter_folder(adapter)
    downloaded = _download(adapter, downloads, _without_backbone)
    found = sorted(path.parent for path in downloaded.rglob(CONFIG_NAME))
    if len(found) != 1:
        raise UserError(f"{adapter!r} contains {len(found)} files {CONFIG_NAME}; name an artifact with exactly one")
    return found[0]


def _download(name: str, downloads: Path, artifact: Callable[[Any, str], str]) -> Path:
    """Download what an MLflow URI names.

    Args:
        name: the URI.
        downloads: folder of the downloads.
        artifact: returns the URI of the part that is needed, from MLflow's module and the URI.

    Raises:
        UserError: MLflow is not installed, or cannot download it.
    """
    mlflow = require("mlflow", "mlflow")
    try:
        target = tempfile.mkdtemp(dir=downloads)
        return Path(mlflow.artifacts.download_artifacts(artifact(mlflow, name), dst_path=target))
    except Exception as error:  # from MLflow, its database, or the library of an object store
        raise UserError(
            f"cannot download {without_passwords(name)!r} from MLflow at {without_passwords(mlflow.get_tracking_uri())} "
            f"({error_line(error)}); check the name, and MLFLOW_TRACKING_URI"
        ) from None


def _without_backbone(mlflow: Any, uri: str) -> str:
    """Return the URI of the adapter within a logged model, so that the model's backbone is not downloaded."""
    names = {PurePosixPath(file.path).name for file in mlflow.artifacts.list_artifacts(artifact_uri=uri)}
    return f"{uri.rstrip('/')}/artifacts/adapter" if "MLmodel" in names else uri
