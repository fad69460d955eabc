"""Backbones on the meta device, to estimate cost and memory: nothing is downloaded or allocated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from revmux.backbone import Backbone, cut, generative_model_types
from revmux.backbone.generative import language_model_class
from revmux.backbone.verbalizer import Verbalizer
from revmux.data.prompt import Prompt
from revmux.errors import UserError
from revmux.estimate.presets import PRESETS, check_shape_name
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.creation import CREATION
from revmux.pretrained.identity import load_model_config, resolve
from revmux.pretrained.loading import outline
from revmux.pretrained.task_model import read_prompt

GENERATIVE_TYPES = tuple(generative_model_types())
"""Model types that are language models unless their config lists another architecture."""


def config_of(model: str) -> Any:
    """The configuration of a preset, of an embedded model or of a local model folder.

    Raises:
        UserError: ``model`` is none of these, or its architecture is unsupported.
    """
    if model in PRESETS:
        settings = dict(PRESETS[model])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    check_shape_name(model)
    return load_model_config(resolve(model), BackboneConfig(model))


def meta_backbone(
    model: str,
    dtype: torch.dtype = torch.float32,
    prompt: str | Prompt | None = None,
    soft_prompt: int = 0,
    constant_tokens: int = 0,
) -> Backbone:
    """The cut backbone on the meta device, frozen.

    T5 and LLaMA classify by label words, as in the paper, unless a folder's architecture is a classifier.

    Args:
        model: a preset, an embedded model or a local model folder.
        dtype: type of the weights.
        prompt: prompt of a folder's language model; without one, it classifies by two words of one token each.
        soft_prompt: vectors before every input, in addition to those of a task model's own soft prompt.
        constant_tokens: number of first tokens that are the same in every input. 0 takes those of the prompt.

    Raises:
        UserError: an unknown model, a prompt for a preset, a prompt, soft prompt or constant tokens that do not fit the
            model, or constant tokens together with a prompt, which has its own.
    """
    if constant_tokens < 0:
        raise UserError(f"constant_tokens is {constant_tokens}; choose 0 or more")
    if constant_tokens and prompt is not None:
        raise UserError(
            f"constant_tokens is {constant_tokens}, but the tokens of the prompt are known; omit constant_tokens or prompt"
        )
    config = config_of(model)
    if model in PRESETS and prompt is not None:
        raise UserError(
            f"prompt is set for the preset {model!r}, which has no tokenizer; choose a model folder, or omit prompt"
        )
    if prompt is not None or (model not in PRESETS and read_prompt(resolve(model)) is not None):
        backbone = outline(BackboneConfig(model, prompt=prompt))[0].to(dtype)
    else:
        backbone = _from_config(config, dtype)
    if soft_prompt:
        backbone.add_soft_prompt(soft_prompt)
    if constant_tokens:
        backbone.keep_prefix([0] * constant_tokens)  # which tokens they are makes no difference
    return backbone.freeze()


def _from_config(config: Any, dtype: torch.dtype) -> Backbone:
    """A classifier, or a language model with two label words."""
    classifies = any("SequenceClassification" in name for name in config.architectures or [])
    words = Verbalizer(label_names=("no", "yes"), token_ids=((1,), (2,)))
    with CREATION, torch.device("meta"):
        if classifies or config.model_type not in GENERATIVE_TYPES:
            return cut(AutoModelForSequenceClassification.from_config(config, dtype=dtype))
        return cut(language_model_class(config).from_config(config, dtype=dtype), words)
