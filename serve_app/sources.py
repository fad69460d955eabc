"""Fetch adapters from folders, object stores, the model hub, and MLflow's registry and runs."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from revmux.adapters.config import CONFIG_NAME, local_adapter_folder
from revmux.errors import UserError
from revmux.utils.extras import require
from revmux.utils.redact import error_line, without_passwords


def is_mlflow(adapter: str) -> bool:
    """Whether the name of an adapter is an MLflow URI."""
    return adapter.startswith(("models:/", "runs:/"))


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
    mlflow = require("mlflow", "mlflow")
    try:
        target = tempfile.mkdtemp(dir=downloads)
        downloaded = Path(mlflow.artifacts.download_artifacts(_without_backbone(mlflow, adapter), dst_path=target))
    except Exception as error:  # from MLflow, its database, or the library of an object store
        raise UserError(
            f"cannot download {without_passwords(adapter)!r} from MLflow at {without_passwords(mlflow.get_tracking_uri())} "
            f"({error_line(error)}); check the name, and MLFLOW_TRACKING_URI"
        ) from None
    found = sorted(path.parent for path in downloaded.rglob(CONFIG_NAME))
    if len(found) != 1:
        raise UserError(f"{adapter!r} contains {len(found)} files {CONFIG_NAME}; name an artifact with exactly one")
    return found[0]


def _without_backbone(mlflow: Any, uri: str) -> str:
    """Return the URI of the adapter within a logged model, so that the model's backbone is not downloaded."""
    names = {PurePosixPath(file.path).name for file in mlflow.artifacts.list_artifacts(artifact_uri=uri)}
    return f"{uri.rstrip('/')}/artifacts/adapter" if "MLmodel" in names else uri
