"""Archives of source distributions from a package registry, downloaded with pip once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from revmux.errors import UserError
from revmux.utils.files import atomic_file, make_folder, user_cache
from revmux.utils.redact import error_line

_LIMIT_S = 300


def source_package(package: str, version: str, sha256: str) -> Path:
    """The archive of a source distribution. The first use downloads it with pip, and later uses need no network.

    pip uses the registry and the proxies of its own configuration, and it checks the sha256 before it runs any code of
    the package. The package is not installed. If several processes ask at once, one of them downloads.

    Args:
        package: name on the registry, as in the name of the archive.
        version: exact version.
        sha256: digest of the archive. A cached file with another digest is downloaded again.

    Raises:
        UserError: the package cannot be downloaded, or the cache folder cannot be written.
    """
    file = Path(user_cache("packages")).expanduser() / f"{package}-{version}.tar.gz"
    if _has_digest(file, sha256):
        return file
    try:
        make_folder(file.parent)
        with FileLock(f"{file}.lock", timeout=2 * _LIMIT_S):
            if not _has_digest(file, sha256):
                _download(package, version, sha256, file)
    except (OSError, Timeout, subprocess.TimeoutExpired) as error:
        raise _failure(package, version, file, error_line(error)) from None
    return file


def _download(package: str, version: str, sha256: str, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        command += ["--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
        command += ["--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        found = Path(folder) / file.name
        if not _has_digest(found, sha256):
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no archive of that version"]
            raise _failure(package, version, file, error_line(OSError(errors[-1])))
        with atomic_file(file) as temporary:
            shutil.copyfile(found, temporary)


def _has_digest(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def _failure(package: str, version: str, file: Path, reason: str) -> UserError:
    return UserError(
        f"cannot download the package {package} {version} ({reason}); connect to a package registry, or run pip download "
        f"--no-deps --no-binary :all: {package}=={version} elsewhere and copy the archive to {file}"
    )
