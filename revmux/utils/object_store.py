"""Open the filesystem that a URI names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revmux.errors import UserError
from revmux.utils.redact import error_line, without_passwords

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def open_uri(uri: str) -> tuple[FileSystem, str]:
    """The filesystem of a URI and the path in it. pyarrow itself opens all but ``fsspec+PROTOCOL://``.

    Raises:
        UserError: pyarrow cannot open the URI, or the package of its protocol is not installed.
    """
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
    except ImportError as error:  # fsspec names the package
        raise UserError(
            f"cannot open {without_passwords(uri)!r} ({error_line(error)}); install that package on every machine, or choose "
            "s3://, gs:// or abfs://, which need none"
        ) from None
    except (ValueError, NotImplementedError, OSError) as error:
        raise UserError(
            f"cannot open {without_passwords(uri)!r} ({error_line(error)}); name a folder, or a URI such as s3://, gs://, "
            "abfs://, hdfs:// or file://"
        ) from None
    return filesystem, path
