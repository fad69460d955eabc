"""Files on the Hugging Face Hub: the local cache of a repository, downloads of single files, and pushes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError comes from its HTTP library
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
    """The folder that caches one commit of a repository on this machine. Its name is the commit.

    Args:
        repository: ``user/name``, or a name without a user.
        revision: branch, tag or commit. None means the default branch.
        file: a file that must be in the cache.

    Returns:
        The folder, or None if the file is not cached.
    """
    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def optional_file(repository: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a repository, from the cache or the hub; None if it does not exist or cannot be reached."""
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except _FAILURES:
        return None


def fetch(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download some files of a repository at one commit, except those that are already cached.

    Returns:
        The folder that contains the files.

    Raises:
        UserError: the repository or revision cannot be found or accessed, or there is no network and the files are not
            cached.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except _FAILURES as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"cannot get {repository!r}{at} from {constants.ENDPOINT} ({_reason(error)}); check its id and revision, the "
            "network, and HF_TOKEN if it is private"
        ) from None


def push(files: Sequence[Path], repository: str, revision: str | None, private: bool | None, message: str) -> str:
    """Push files to the root of a repository in one commit. A missing repository or branch is created.

    Args:
        files: the files. Each keeps its name.
        repository: ``user/name``.
        revision: branch. None means the default branch.
        private: whether a new repository is private. None means the account's setting.
        message: commit message.

    Returns:
        The commit.

    Raises:
        UserError: the repository is not of the form ``user/name``, there is no token, or the hub rejects the push.
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
        remedy = (
            "log in with hf auth login, or set HF_TOKEN"
            if _unauthorised(error)
            else "check its id, your permissions and the network"
        )
        raise UserError(f"cannot push to {repository!r} at {api.endpoint} ({_reason(error)}); {remedy}") from None


def weights_on_hub(repository: str, revision: str | None = None) -> tuple[str, str | None]:
    """Ask the hub for the commit of a repository and the sha256 of its weights, without downloading them.

    Returns:
        The commit, and :func:`combined_sha256` of the safetensors files, or None if there are none.

    Raises:
        UserError: the repository or revision cannot be found, or there is no network.
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
    """One digest for several files: the digest of a single file, or a digest of all digests in the given order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _unauthorised(error: Exception) -> bool:
    refused = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401
    return refused or isinstance(error, LocalTokenNotFoundError)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
