"""A tiny task model, and adapters that give every input the same answer as the plain model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config
from torch import Tensor
from transformers import BertForSequenceClassification, BertTokenizerFast

from revmux.adapters.folder import describe_adapter, save_adapter
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine, Limits

WORDS = [f"w{index}" for index in range(60)]
CUT = 1


def write_model(folder: Path, labels: Sequence[str] = ("LABEL_0", "LABEL_1", "LABEL_2")) -> Path:
    """A tiny BERT whose layers above the cut do not change a state.

    An untrained token-split adapter then gives every input the same answer as the plain model, whatever its group, so
    an answer for the wrong input is detected.
    """
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ok", *WORDS]))
    torch.manual_seed(0)
    config = tiny_config(
        "bert",
        vocab_size=66,
        num_hidden_layers=4,
        intermediate_size=128,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config)
    for layer in model.bert.encoder.layer[CUT:]:
        for part in (layer.attention.output.dense, layer.output.dense):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


def load(folder: Path) -> Pretrained:
    return load_pretrained(BackboneConfig(model=str(folder), max_length=64))


def write_adapter(
    folder: Path,
    pretrained: Pretrained,
    num_inputs: int,
    prefill_layers: int = CUT,
    method: str = "token-split",
    **more: Any,
) -> Path:
    torch.manual_seed(num_inputs)
    adapters = build_method(method, BackboneShape.of(pretrained.backbone), num_inputs, more)
    model = MultiplexedClassifier(pretrained.backbone, adapters, prefill_layers)
    return save_adapter(
        model, describe_adapter(model, pretrained, 64, {"source": "toy"}), folder / f"{method}-{num_inputs}"
    )


def text(index: int) -> str:
    """Texts of 1 to 20 words, most of them different."""
    return " ".join(WORDS[(index * 7 + place * (index % 11 + 1)) % 60] for place in range(1 + index % 20))


def plain_scores(pretrained: Pretrained, texts: list[str]) -> Tensor:
    """Return the scores of the plain model on one padded batch, (B, C)."""
    with torch.inference_mode():
        return pretrained.backbone(dict(pretrained.tokenizer(texts, padding=True, return_tensors="pt")))


def write_identifying_model(folder: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """A task model with one label per text, so that an answer identifies its text.

    The head is the solution of a linear system, so that each text of :func:`known_texts` scores 10 at its own label and 0 at the others.
    All layers are those of :func:`write_model`, the same for every seed, but each seed labels the texts in another
    order.

    Returns:
        The folder, and the label of each text.
    """
    write_model(folder)
    model = BertForSequenceClassification.from_pretrained(folder)
    texts = known_texts()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        pretrained = load(folder)
        tokens = pretrained.tokenizer(texts, padding=True, return_tensors="pt")
        states = pretrained.backbone.run(pretrained.backbone.embed(dict(tokens)), pretrained.backbone.num_layers)
        vectors = pretrained.backbone.readout(pretrained.backbone.answers(states)[:, 0])  # (M, d)
        head = torch.nn.Linear(vectors.shape[1], len(texts))
        head.weight.copy_((torch.linalg.pinv(vectors.double()) @ (10 * torch.eye(len(texts)).double()[order])).T)
        head.bias.zero_()
    model.classifier, model.num_labels = head, len(texts)
    labels = [f"label {place}" for place in range(len(texts))]
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: place for place, name in enumerate(labels)}
    model.save_pretrained(folder)
    return folder, {text: labels[place] for text, place in zip(texts, order.tolist())}


def known_texts() -> list[str]:
    """Texts of many lengths that tiny models distinguish."""
    return [text(index) for index in range(0, 56, 2)]


def write_stage(
    folder: Path,
    pretrained: Pretrained,
    stage: int,
    num_inputs: int,
    prefill_layers: int = CUT,
    threshold: float | None = None,
    metrics: dict[str, float] | None = None,
    method: str = "token-split",
    **more: Any,
) -> Path:
    """Write an adapter that records its stage of a ladder and its threshold."""
    written = write_adapter(folder / f"stage-{stage}", pretrained, num_inputs, prefill_layers, method, **more)
    config = json.loads((written / "adapter_config.json").read_text())
    config |= {"stage": stage, "fallback_threshold": threshold, "metrics": metrics or {}}
    (written / "adapter_config.json").write_text(json.dumps(config))
    return written


@contextmanager
def engines_not_started(pretrained: Pretrained, folder: Path) -> Iterator[Callable[..., Engine]]:
    """Build engines that are not started, so that a test can fill the queue first; all are closed at the end.

    Their adapters are for N = 2 and 4, unless a test passes others.
    """
    adapters = [write_adapter(folder, pretrained, num_inputs) for num_inputs in (2, 4)]
    made: list[Engine] = []

    def make(folders: list[Path] | None = None, **limits: Any) -> Engine:
        made.append(Engine(pretrained, adapters if folders is None else folders, Limits(**limits)))
        return made[-1]

    try:
        yield make
    finally:
        for engine in made:
            engine.close()
