"""Where adapters come from: folders, the model hub, and MLflow's registry and runs."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from revmux.adapters.config import CONFIG_NAME, local_adapter_folder
from revmux.errors import UserError
from revmux.utils.extras import require
from revmux.utils.redact import error_line, without_passwords


def is_mlflow(adapter: str) -> bool:
    """Whether an adapter is named by an MLflow URI."""
    return adapter.startswith(("models:/", "runs:/"))


def fetch_adapter(adapter: str, downloads: Path) -> Path:
    """The local folder of an adapter; those of the hub and of MLflow are downloaded.

    The hub's library keeps what it downloads in its cache. MLflow keeps nothing, so its downloads go to a folder of the
    caller's, who removes it once the adapter is loaded.

    Args:
        adapter: a folder, ``user/name`` or ``user/name@revision`` on the hub, ``models:/name@alias``,
            ``models:/name/version`` or ``runs:/id/path``.
        downloads: an existing folder for what MLflow downloads.

    Raises:
        UserError: the hub or MLflow cannot find it, or it holds no adapter, or several.
    """
    if not is_mlflow(adapter):
        return local_adapter_folder(adapter)
    mlflow = require("mlflow", "mlflow")
    try:
        target = tempfile.mkdtemp(dir=downloads)
        downloaded = Path(mlflow.artifacts.download_artifacts(_without_backbone(mlflow, adapter), dst_path=target))
    except Exception as error:  # of MLflow, its database, or the library of an object store
        raise UserError(
            f"MLflow at {without_passwords(mlflow.get_tracking_uri())} has no {adapter!r} ({error_line(error)}); check the "
            "name, and MLFLOW_TRACKING_URI"
        ) from None
    found = sorted(path.parent for path in downloaded.rglob(CONFIG_NAME))
    if len(found) != 1:
        raise UserError(f"{adapter!r} holds {len(found)} folders with {CONFIG_NAME}; name the artifact that holds one")
    return found[0]


def _without_backbone(mlflow: Any, uri: str) -> str:
    """The adapter alone of a model that may bring its backbone, which the server has already."""
    names = {PurePosixPath(file.path).name for file in mlflow.artifacts.list_artifacts(artifact_uri=uri)}
    return f"{uri.rstrip('/')}/artifacts/adapter" if "MLmodel" in names else uri
