"""Loading of a backbone from the embedded package, a local folder or the hub."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from revmux.backbone import Backbone, Verbalizer, cut, generative_model_types
from revmux.backbone.decoder import DecoderBackbone
from revmux.backbone.generative import GenerativeBackbone, language_model_class
from revmux.data.constant_prefix import constant_tokens
from revmux.data.prompt import Prompt
from revmux.errors import UserError
from revmux.methods import BackboneShape
from revmux.pretrained import hub
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.creation import CREATION
from revmux.pretrained.identity import identify, load_model_config, resolve, weights_sha256
from revmux.pretrained.location import has_head, no_answers
from revmux.pretrained.peft_adapter import PeftAdapter, read_peft_adapter
from revmux.pretrained.peft_model import add_updates, load_base, load_merged
from revmux.pretrained.pretrained import Pretrained
from revmux.pretrained.shared_base import SharedBase, SharedBases
from revmux.pretrained.task_model import read_pairs, read_prompt, read_soft_prompt

_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")


def inspect(config: BackboneConfig) -> tuple[BackboneShape, list[str] | None]:
    """The shape and classes of a model, from its configuration and tokenizer. No weights are loaded.

    Returns:
        The shape, and the classes of the checkpoint's own head or of the prompt, or None if neither has classes.

    Raises:
        UserError: the model is unknown, its family is unsupported, or the prompt does not fit it.
    """
    backbone, names = outline(config)
    return BackboneShape.of(backbone), names


def outline(config: BackboneConfig) -> tuple[Backbone, list[str] | None]:
    """The cut model on the meta device, to count its cost, and its classes; see :func:`inspect`."""
    location = resolve(config.model)
    model_config = load_model_config(location, config)
    prompt = _prompt_of(config, location, model_config)
    if prompt is None:
        backbone = _classifier_outline(model_config)
        return backbone, backbone.label_names if _has_head(model_config) else None
    names = list(prompt.labels) or None
    tokenizer = _load_tokenizer(config, location)
    placeholder = Verbalizer(("0", "1"), ((0,), (1,)))  # the data determines the classes of a prompt without labels
    verbalizer = placeholder if names is None else prompt.verbalizer(tokenizer)
    return _language_model_outline(config, location, model_config, prompt, tokenizer, verbalizer), names


def load_outline(config: BackboneConfig, label_names: list[str]) -> Pretrained:
    """What :func:`load_pretrained` returns, with the backbone on the meta device, so that it needs no memory.

    Args:
        config: the model, with a head or a prompt, and its settings.
        label_names: classes for a prompt that lists none.

    Raises:
        UserError: see :func:`load_pretrained`.
    """
    location = resolve(config.model)
    model_config = load_model_config(location, config)
    tokenizer, prompt = load_tokenizer(config, label_names)
    if prompt is None:
        check_answers(config)
        backbone = _classifier_outline(model_config)
    else:
        verbalizer = prompt.verbalizer(tokenizer)
        backbone = _language_model_outline(config, location, model_config, prompt, tokenizer, verbalizer)
    check_length(config, backbone)
    identity = identify(config.model, location, config.revision)
    return Pretrained(backbone, tokenizer, identity, _has_head(model_config), prompt, read_pairs(location))


def _classifier_outline(model_config: Any) -> Backbone:
    with CREATION, torch.device("meta"):
        return cut(AutoModelForSequenceClassification.from_config(model_config))


def _language_model_outline(
    config: BackboneConfig,
    location: str,
    model_config: Any,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    verbalizer: Verbalizer,
) -> Backbone:
    with CREATION, torch.device("meta"):
        backbone = cut(language_model_class(model_config).from_config(model_config), verbalizer)
        if (soft_prompt := read_soft_prompt(location, config.revision)) is not None:
            backbone.add_soft_prompt(len(soft_prompt))
    _keep_prefix(backbone, prompt, tokenizer)
    return backbone


def check_answers(config: BackboneConfig) -> None:
    """Check that a model has a trained classification head or a prompt. No weights are loaded.

    Raises:
        UserError: it has neither.
    """
    location = resolve(config.model)
    model_config = load_model_config(location, config)
    if _has_head(model_config) or _prompt_of(config, location, model_config) is not None:
        return
    raise no_answers(config.model, model_config.architectures)


def load_pretrained(
    config: BackboneConfig,
    label_names: list[str] | None = None,
    bases: SharedBases | None = None,
    device: torch.device | str | None = None,
) -> Pretrained:
    """Load a model with its head, or with the label words of its prompt, and cut it.

    Args:
        config: the model and its settings.
        label_names: class names for a new head, or for a prompt that lists none. With None, the checkpoint must have a
            head, or the prompt its own classes.
        bases: bases of PEFT adapters, and tokenizers, that the result may share. Nothing of it may be trained then. LoRA
            is not merged. Without it, everything is the result's own, and PEFT adapters are merged.
        device: where saved weights are loaded to without a copy on the CPU, which needs accelerate. Everything else is on
            the CPU, and the caller moves it.

    Raises:
        UserError: the model is unknown, its family is unsupported, its head, weights or tokenizer are missing, the
            prompt does not fit, or ``max_length`` is above the model's limit.
    """
    location = resolve(config.model)
    model_config = load_model_config(location, config)
    prompt = _prompt_of(config, location, model_config)
    if label_names is None:
        check_answers(config)
    if Path(location).is_dir():
        weights_sha256(Path(location))  # raises an error for a folder without weights
    elif (cached := hub.cached_folder(location, config.revision)) is not None:
        # The commit is fixed, so that the recorded revision is the loaded one even after a new push.
        config = replace(config, revision=cached.name)
    tokenizer = _load_tokenizer(config, location, bases)
    base: SharedBase | None = None
    if prompt is None:
        model, base = _load_classifier(config, location, model_config, label_names, tokenizer, bases, device)
        backbone = cut(model)
    else:
        prompt = prompt.with_labels(label_names)
        verbalizer = prompt.verbalizer(tokenizer)
        backbone = cut(_load_language_model(config, location, model_config, device), verbalizer)
        _keep_prefix(backbone, prompt, tokenizer)
    if isinstance(backbone, GenerativeBackbone):
        backbone.soft_prompt = read_soft_prompt(location, config.revision)
    check_length(config, backbone)
    identity = identify(config.model, location, config.revision)
    return Pretrained(backbone, tokenizer, identity, _has_head(model_config), prompt, read_pairs(location), base)


def load_tokenizer(config: BackboneConfig, label_names: list[str]) -> tuple[PreTrainedTokenizerBase, Prompt | None]:
    """The tokenizer and the prompt of a model, without its weights.

    Args:
        config: the model and its settings.
        label_names: classes for a prompt that lists none.

    Raises:
        UserError: the tokenizer or the prompt is missing or does not fit.
    """
    location = resolve(config.model)
    prompt = _prompt_of(config, location, load_model_config(location, config))
    if prompt is not None:
        prompt = prompt.with_labels(label_names)
    return _load_tokenizer(config, location), prompt


def check_length(config: BackboneConfig, backbone: Backbone) -> None:
    """Check that ``max_length`` is not above the model's limit.

    Raises:
        UserError: it is above.
    """
    if config.max_length > backbone.max_length:
        raise UserError(
            f"max_length is {config.max_length}, but {config.model} accepts at most {backbone.max_length} tokens; "
            f"choose {backbone.max_length} or fewer"
        )


def _load_classifier(
    config: BackboneConfig,
    location: str,
    model_config: Any,
    label_names: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    bases: SharedBases | None,
    device: torch.device | str | None,
) -> tuple[Any, SharedBase | None]:
    """Load a model with the checkpoint's head, or with a newly initialized head for these classes.

    Returns:
        The model, and the base that it shares, if any.
    """
    arguments: dict[str, Any] = {}
    if (adapter := read_peft_adapter(location, config.revision)) is not None:
        if model_config.pad_token_id is None:
            model_config.pad_token_id = tokenizer.pad_token_id
        if bases is not None and adapter.is_plain_lora:
            base = _shared_base(config, adapter, bases)
            if (model := add_updates(adapter, base, model_config)) is not None:
                return model, base
        options = {**_weights(config), "revision": adapter.base_revision}
        with _quiet():
            return load_merged(adapter, resolve(adapter.base), model_config, **options), None
    if not _has_head(model_config):
        names = label_names or []
        arguments = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if model_config.pad_token_id is None:
            arguments["pad_token_id"] = tokenizer.pad_token_id  # a decoder's head needs it to find the end of a text
    with CREATION, _quiet():
        return AutoModelForSequenceClassification.from_pretrained(
            location, **_weights(config, device), **arguments
        ), None


def _shared_base(config: BackboneConfig, adapter: PeftAdapter, bases: SharedBases) -> SharedBase:
    location = resolve(adapter.base)
    own = replace(config, model=adapter.base, revision=adapter.base_revision)
    model_config = load_model_config(location, own)
    weights = identify(adapter.base, location, own.revision)["sha256"]

    def load() -> SharedBase:
        with CREATION, _quiet():
            return load_base(location, model_config, **_weights(own))

    return bases.base((weights, model_config.to_json_string(), config.dtype, config.attention), load)


def _load_language_model(
    config: BackboneConfig, location: str, model_config: Any, device: torch.device | str | None
) -> Any:
    with CREATION, _quiet():
        model, loading = language_model_class(model_config).from_pretrained(
            location, **_weights(config, device), output_loading_info=True
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{config.model} is a {', '.join(model_config.architectures or ['model'])} without the weights that score its "
            f"vocabulary ({', '.join(missing[:3])}); a prompt needs a language model, such as ...ForCausalLM"
        )
    return model


def _weights(config: BackboneConfig, device: torch.device | str | None = None) -> dict[str, Any]:
    straight = device is not None and importlib.util.find_spec("accelerate") is not None
    return {
        **({"device_map": {"": device}} if straight else {}),
        "revision": config.revision,
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attention,
        "trust_remote_code": False,
        "use_safetensors": True,
    }


def _keep_prefix(backbone: Backbone, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a decoder run the constant beginning of a prompt once. Encoder-decoders read it in both directions."""
    if isinstance(backbone, DecoderBackbone):
        backbone.keep_prefix(constant_tokens(prompt, tokenizer))


def _prompt_of(config: BackboneConfig, location: str, model_config: Any) -> Prompt | None:
    """The prompt of a model: the prompt that it was tuned with, otherwise the configured prompt.

    Raises:
        UserError: the configured prompt differs from the model's own, or the model cannot answer by label words.
    """
    prompt = config.prompt
    assert not isinstance(prompt, str)
    answers_by_words = model_config.model_type in generative_model_types() and not _has_head(model_config)
    own = read_prompt(location, config.revision) if answers_by_words else None
    if own is not None:
        if prompt is not None and prompt.with_labels(list(own.labels)) != own:
            raise UserError(
                f"{config.model} was tuned with prompt {own.name}, not {prompt.name} ({own.difference(prompt)}); "
                "omit --backbone.prompt"
            )
        return own
    if prompt is None:
        return None
    if model_config.model_type not in generative_model_types():
        raise UserError(
            f"prompt is {prompt.name}, but {config.model} is a {model_config.model_type}, which cannot answer by words; "
            f"omit --backbone.prompt, or choose a model of type {', '.join(generative_model_types())}"
        )
    if _has_head(model_config):
        raise UserError(
            f"prompt is {prompt.name}, but {config.model} answers by a trained classification head; "
            "omit --backbone.prompt, or name the language model from which it was tuned"
        )
    return prompt


def _load_tokenizer(config: BackboneConfig, location: str, bases: SharedBases | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: there is no tokenizer, or it has no token that can be used for padding.
    """
    adapter = read_peft_adapter(location, config.revision)
    if adapter is not None and not _has_tokenizer(adapter.folder):
        return _load_tokenizer(replace(config, revision=adapter.base_revision), resolve(adapter.base), bases)
    _check_tokenizer(config.model, location)
    folder = Path(location) if Path(location).is_dir() else hub.cached_folder(location, config.revision)
    if bases is not None and folder is not None:
        return bases.tokenizer(folder, lambda: _read_tokenizer(config, location))
    return _read_tokenizer(config, location)


def _read_tokenizer(config: BackboneConfig, location: str) -> PreTrainedTokenizerBase:
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {config.model} has neither a padding nor an end-of-sequence token; set its pad_token "
                "and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token can be used
    return tokenizer


def _check_tokenizer(name: str, location: str) -> None:
    """Check that a folder contains a tokenizer. Without one, transformers would create a tokenizer with no vocabulary."""
    folder = Path(location)
    if folder.is_dir() and not _has_tokenizer(folder):
        raise UserError(
            f"folder {name!r} contains no tokenizer ({', '.join(_TOKENIZER_FILES)}); save it there with "
            "tokenizer.save_pretrained(folder)"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _has_head(model_config: Any) -> bool:
    return has_head(model_config.architectures)


class _quiet:
    """Context manager that suppresses warnings about new heads and the progress bars of weight loading."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()
