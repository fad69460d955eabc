"""PEFT adapters with a classification head, as PEFT and the hub have them, as task models.

The adapter is merged into the model that it was tuned on. A server, which has many adapters on one base, leaves those of
LoRA unmerged: they then take the memory of their own weights, see :mod:`revmux.backbone.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from revmux.backbone.low_rank import LowRankFactors, can_update, updated_model
from revmux.errors import UserError
from revmux.pretrained import hub
from revmux.pretrained.creation import CREATION
from revmux.pretrained.location import CONFIG_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, check_task_type, peft_settings
from revmux.pretrained.shared_base import SharedBase
from revmux.utils.extras import require

_HEADS = ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")
"""The last linear map of the heads of Transformers, whose rows are the classes."""
_FILES = (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    CONFIG_NAME,
    "task.json",
    "token*",
    "special_tokens*",
    "vocab*",
    "merges*",
)
_PREFIX = "base_model.model."
_PLAIN_LORA = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings of LoRA that may have any value, because the saved weights already reflect them or because they are read here."""
_PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}
"""Values of other settings, besides those that mean no, that change nothing once the adapter is trained."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that PEFT saved.

    Attributes:
        folder: its local folder.
        settings: the content of ``adapter_config.json``.
    """

    folder: Path
    settings: dict[str, Any]

    @property
    def base(self) -> str:
        """Folder or hub id of the model that it was tuned on."""
        return str(self.settings["base_model_name_or_path"])

    @property
    def base_revision(self) -> str | None:
        """Branch, tag or commit of that model on the hub."""
        revision = self.settings.get("revision")
        return None if revision is None else str(revision)

    def saved_weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the saved weights, by their names in the model.

        Raises:
            UserError: the file is missing or damaged.
        """
        file = self.folder / PEFT_WEIGHTS_NAME
        try:
            with safe_open(file, "pt") as weights:
                return {
                    name.removeprefix(_PREFIX): tuple(weights.get_slice(name).get_shape())
                    for name in weights.keys()  # noqa: SIM118  # it is no dictionary
                }
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None

    def weights(self) -> dict[str, Tensor]:
        """The saved weights, by their names in the model. They are in memory, so the file may change afterwards.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            found = load((self.folder / PEFT_WEIGHTS_NAME).read_bytes())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from None
        return {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}

    def _unreadable(self, error: Exception) -> UserError:
        file = self.folder / PEFT_WEIGHTS_NAME
        return UserError(f"cannot read {file} ({error}); save the adapter again, with safe serialization")

    @property
    def is_plain_lora(self) -> bool:
        """Whether the adapter consists of low-rank updates of weights, and of whole weights, alone."""
        settings = self.settings
        return settings["peft_type"] == "LORA" and all(
            name in _PLAIN_LORA or not value or value in _PLAIN_VALUES.get(name, ()) for name, value in settings.items()
        )

    def factor(self, rank: int) -> float:
        """The factor of LoRA's updates of a rank."""
        alpha = self.settings["lora_alpha"]
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def label_names(self) -> list[str] | None:
        """The classes: those of ``config.json`` beside the adapter, or ``LABEL_0`` and so on; None without a saved head."""
        if (self.folder / CONFIG_NAME).is_file():
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            return [config.id2label[index] for index in range(config.num_labels)]
        saved = self.saved_weights()
        classes = next((saved[f"{head}.weight"][0] for head in _HEADS if f"{head}.weight" in saved), None)
        return None if classes is None else [f"LABEL_{index}" for index in range(classes)]


def read_peft_adapter(location: str, revision: str | None = None) -> PeftAdapter | None:
    """The adapter in a folder or hub repository, or None if it contains a whole model.

    Args:
        location: a folder, or a Hugging Face id.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: it is an adapter, but not one with a classification head, or its files cannot be downloaded.
    """
    folder: Path | None = Path(location)
    if not Path(location).is_dir():
        if hub.cached_folder(location, revision, "model.safetensors") is not None:
            return None
        if hub.optional_file(location, PEFT_CONFIG_NAME, revision) is None:
            return None
        folder = hub.fetch(location, revision, _FILES)
    assert folder is not None
    settings = peft_settings(folder)
    if settings is None:
        return None
    check_task_type(location, settings)
    return PeftAdapter(folder, settings)


def merged_config(adapter: PeftAdapter, base: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the merged model.

    Args:
        adapter: the adapter.
        base: the configuration of its base model.

    Raises:
        UserError: neither the adapter nor its base model has a classification head.
    """
    names = adapter.label_names()
    if names is None:
        if not any("SequenceClassification" in name for name in base.architectures or []):
            raise UserError(
                f"adapter {str(adapter.folder)!r} contains no classification head, and neither does {adapter.base}; save "
                "it with modules_to_save, or with task_type SEQ_CLS"
            )
        return base
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(base)]
    base.architectures = [classifier.__name__]
    base.id2label = dict(enumerate(names))
    base.label2id = {name: index for index, name in enumerate(names)}
    return base


def load_merged(
    adapter: PeftAdapter, base_location: str, config: PretrainedConfig, **arguments: Any
) -> PreTrainedModel:
    """Load the base model and merge the adapter into it.

    Args:
        adapter: the adapter.
        base_location: folder or hub id of its base model.
        config: the configuration of the merged model.
        arguments: arguments of ``from_pretrained``.

    Raises:
        UserError: the package peft is missing, PEFT cannot load or merge the adapter, or weights of the head are missing.
    """
    peft = require("peft", "peft")
    with CREATION:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            base_location, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **arguments
        )
    saved = adapter.saved_weights()
    new = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    _check_complete(adapter, [name for name in new if name not in saved])
    try:
        tuned = peft.PeftModel.from_pretrained(model, str(adapter.folder))
        merged = tuned.merge_and_unload(safe_merge=True)
    except (AttributeError, ImportError, NotImplementedError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"PEFT cannot merge adapter {str(adapter.folder)!r} of type {adapter.settings['peft_type']} into "
            f"{adapter.base} ({type(error).__name__}: {error}); only adapters that change weights, such as LoRA, can be "
            "merged"
        ) from None
    assert isinstance(merged, PreTrainedModel)
    return merged


def load_base(location: str, config: PretrainedConfig, **arguments: Any) -> SharedBase:
    """Load a base model for :func:`add_updates`.

    Args:
        location: folder or hub id of the model.
        config: its own configuration.
        arguments: arguments of ``from_pretrained``.
    """
    with CREATION:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            location, config=config, output_loading_info=True, **arguments
        )
    return SharedBase(model, loading["missing_keys"])


def add_updates(adapter: PeftAdapter, base: SharedBase, config: PretrainedConfig) -> PreTrainedModel | None:
    """The base model with the adapter, unmerged. All weights that the adapter does not change are the base's own.

    Args:
        adapter: the adapter.
        base: its base model.
        config: the configuration of the new model.

    Returns:
        The model, or None if the adapter does more than low-rank updates of linear maps and whole weights, so that only
        :func:`load_merged` can load it.

    Raises:
        UserError: weights of the head are missing, or the file is damaged.
    """
    if not adapter.is_plain_lora:
        return None
    device = base.model.device
    saved = {name: tensor.to(device) for name, tensor in adapter.weights().items()}
    _check_complete(adapter, [name for name in base.missing if name not in saved])
    updates: dict[str, LowRankFactors] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        linear, is_down, _ = name.partition(".lora_A.")
        if is_down:
            up = saved.get(f"{linear}.lora_B.weight")
            if up is None or tensor.ndim != 2:
                return None
            updates[linear] = LowRankFactors(tensor, up * adapter.factor(len(tensor)))
        elif ".lora_" not in name:
            whole[name] = tensor
    if 2 * len(updates) + len(whole) != len(saved) or not _fit(base.model, config, updates, whole):
        return None
    dtype = next(base.model.parameters()).dtype
    whole = {name: tensor.to(dtype) for name, tensor in whole.items()}
    config.dtype, config._attn_implementation = base.model.config.dtype, base.model.config._attn_implementation
    model = updated_model(base.model, config, updates, whole)
    assert isinstance(model, PreTrainedModel)
    return model


def _fit(
    model: nn.Module, config: PretrainedConfig, updates: Mapping[str, LowRankFactors], whole: Mapping[str, Tensor]
) -> bool:
    """Whether all updates and weights belong to the model and have the right shapes."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())  # of tied weights only the first
    heads = {f"{head}.{part}" for head in _HEADS for part in ("weight", "bias")}
    for name, tensor in whole.items():
        if name not in parameters:
            return False
        rows, *others = parameters[name].shape
        expected = (config.num_labels if name in heads else rows, *others)
        if tuple(tensor.shape) != expected:
            return False
    return all(name in modules and can_update(modules[name], update) for name, update in updates.items())


def _check_complete(adapter: PeftAdapter, missing: Sequence[str]) -> None:
    """Refuse an adapter whose answers would depend on weights that nobody trained."""
    if missing:
        raise UserError(
            f"neither adapter {str(adapter.folder)!r} nor {adapter.base} contains {', '.join(sorted(missing)[:3])}, so its "
            "answers would be random; train it with modules_to_save that names these modules"
        )
