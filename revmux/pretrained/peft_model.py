"""Task models that are PEFT adapters.

The adapter is merged into the model that it was tuned on. A server, which has many adapters on one base, leaves those of
LoRA unmerged: they then take the memory of their own weights, see :mod:`revmux.backbone.low_rank`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from revmux.backbone.low_rank import LowRankFactors, can_update, updated_model
from revmux.errors import UserError
from revmux.pretrained.creation import CREATION
from revmux.pretrained.peft_adapter import HEADS, PeftAdapter
from revmux.pretrained.shared_base import SharedBase
from revmux.utils.extras import require


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
    heads = {f"{head}.{part}" for head in HEADS for part in ("weight", "bias")}
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
