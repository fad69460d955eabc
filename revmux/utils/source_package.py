"""Archives from a package registry, downloaded with pip, checked by their sha256 and never installed."""

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

LIMIT_S = 300
"""Seconds after which a download is given up."""


def source_package(package: str, version: str, sha256: str) -> Path:
    """The archive of a source distribution. The first use downloads it with pip, and later uses need no network.

    If several processes ask at once, one of them downloads.

    Args:
        package: name on the registry, as in the name of the archive.
        version: exact version.
        sha256: digest of the archive. A cached file with another digest is downloaded again.

    Raises:
        UserError: the package cannot be downloaded, or the cache folder cannot be written.
    """
    file = cached_archive(package, version)
    if has_digest(file, sha256):
        return file
    remedy = (
        f"connect to a package registry, or run pip download --no-deps --no-binary :all: {package}=={version} elsewhere "
        f"and copy the archive to {file}"
    )
    try:
        make_folder(file.parent)
        with FileLock(f"{file}.lock", timeout=2 * LIMIT_S), tempfile.TemporaryDirectory() as folder:
            if not has_digest(file, sha256):
                found = download_archive(package, version, sha256, Path(folder), remedy)
                with atomic_file(file) as temporary:
                    shutil.copyfile(found, temporary)
    except (OSError, Timeout) as error:
        raise _failure(package, version, error_line(error), remedy) from None
    return file


def cached_archive(package: str, version: str) -> Path:
    """Where the archive of a source distribution is kept."""
    return Path(user_cache("packages")).expanduser() / f"{package}-{version}.tar.gz"


def download_archive(
    package: str, version: str, sha256: str, folder: Path, remedy: str, kind: str = "--no-binary"
) -> Path:
    """Download one archive into a folder, without its dependencies.

    pip uses the registry and the proxies of its own configuration, and it checks the sha256 before it runs any code of
    the package.

    Args:
        package: name on the registry.
        version: exact version.
        sha256: digest of the archive.
        folder: an empty folder.
        remedy: what to do if this fails, for the error.
        kind: pip's option for source distributions (``--no-binary``) or wheels (``--only-binary``).

    Raises:
        UserError: the archive cannot be downloaded.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise _failure(package, version, error_line(error), remedy) from None
    found = next((file for file in folder.iterdir() if file != requirements and has_digest(file, sha256)), None)
    if found is None:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no archive of that version"]
        raise _failure(package, version, error_line(OSError(errors[-1])), remedy)
    return found


def file_sha256(file: Path) -> str:
    """The sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def has_digest(file: Path, sha256: str) -> bool:
    """Whether a file exists and has this sha256."""
    return file.is_file() and file_sha256(file) == sha256


def _failure(package: str, version: str, reason: str, remedy: str) -> UserError:
    return UserError(f"cannot download the package {package} {version} ({reason}); {remedy}")
