"""Files on the Hugging Face hub: what is cached here of a repository, fetching a part of one, pushing a commit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of its HTTP library
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from revmux.errors import UserError

_FAILURES = (OSError, HTTPError, HFValidationError, EntryNotFoundError, OfflineModeIsEnabled)


def is_repository(name: str) -> bool:
    """Whether a name has the form ``user/repository``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def cached_folder(repository: str, revision: str | None = None, file: str = "config.json") -> Path | None:
    """Where this machine keeps one commit of a repository; the folder's name is the commit.

    Args:
        repository: ``user/name``, or a name without user.
        revision: branch, tag or commit; None is the default branch.
        file: that must be there.
    """
    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def fetch(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """A folder with some files of a repository at one commit; only what is not cached here is downloaded.

    Raises:
        UserError: no such repository or revision, no access, or no network and nothing cached.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except _FAILURES as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"cannot get {repository!r}{at} from {constants.ENDPOINT} ({_reason(error)}); check its id and revision, the "
            "network, and HF_TOKEN where it is private"
        ) from None


def push(files: Sequence[Path], repository: str, revision: str | None, private: bool | None, message: str) -> str:
    """Put files at the root of a repository, in one commit; repository and branch are made where they are missing.

    Args:
        files: what is pushed, by its own name.
        repository: ``user/name``.
        revision: branch; None is the default one.
        private: whether a new repository is private; None is the account's setting.
        message: of the commit.

    Returns:
        The commit.

    Raises:
        UserError: no ``user/name``, no token, or the hub refuses.
    """
    if not is_repository(repository):
        raise UserError(f"repository is {repository!r}; choose USER/NAME, such as me/revmux-n2")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        return str(api.create_commit(repository, operations, commit_message=message, revision=revision).oid)
    except _FAILURES as error:
        told = (
            "log in: hf auth login, or set HF_TOKEN"
            if _unauthorised(error)
            else "check its id, your rights and the network"
        )
        raise UserError(f"cannot push to {repository!r} at {api.endpoint} ({_reason(error)}); {told}") from None


def weights_on_hub(repository: str, revision: str | None = None) -> tuple[str, str | None]:
    """The commit of a repository and the sha256 of its weights there, as the hub tells them: nothing is downloaded.

    Returns:
        The commit, and :func:`combined_sha256` of the safetensors files, or None where there are none.

    Raises:
        UserError: no such repository or revision, or no network.
    """
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except _FAILURES as error:
        raise UserError(
            f"cannot read {repository!r} at {constants.ENDPOINT} ({_reason(error)}); check its id and the network"
        ) from None
    files = sorted(info.siblings or [], key=lambda file: file.rfilename)
    digests = [
        file.lfs.sha256
        for file in files
        if file.lfs is not None and file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
    ]
    return str(info.sha), combined_sha256(digests) if digests else None


def combined_sha256(digests: Sequence[str]) -> str:
    """One digest for several files: that of the one file, or of all digests in the order of the files' names."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _unauthorised(error: Exception) -> bool:
    refused = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401
    return refused or isinstance(error, LocalTokenNotFoundError)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
