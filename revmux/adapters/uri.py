"""Adapters on object stores."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSystem, FileType

from revmux.adapters.config import CONFIG_NAME, WEIGHTS_NAME, local_adapter_folder
from revmux.errors import UserError
from revmux.utils.redact import error_line


def download_adapter(adapter: str, downloads: Path) -> Path:
    """The local folder of an adapter. Adapters from the hub and from object stores are downloaded.

    Args:
        adapter: a folder, an id on the hub, or a URI that pyarrow opens, such as ``s3://bucket/adapters/revmux-n4-l2``.
        downloads: an existing folder for downloads from object stores.

    Raises:
        UserError: the adapter cannot be found or downloaded.
    """
    if "://" not in adapter:
        return local_adapter_folder(adapter)
    target = Path(tempfile.mkdtemp(dir=downloads))
    try:
        filesystem, path = FileSystem.from_uri(adapter)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            file = f"{path.rstrip('/')}/{name}"
            if filesystem.get_file_info(file).type != FileType.File:
                raise FileNotFoundError(f"there is no {file}")
            with filesystem.open_input_file(file) as stream:
                (target / name).write_bytes(stream.read())
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot download adapter {adapter!r} ({error_line(error)}); name a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from None
    return target
