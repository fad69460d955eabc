"""What is served: a task model with randomly initialised adapters, and the texts of the requests."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from benchmarks.serving.settings import WIDTHS, Settings, Shape, Sizes
from revmux.adapters.folder import describe_adapter, save_adapter
from revmux.backbone import Backbone, TokenBatch
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.estimate.flops import relative_cost
from revmux.methods import BackboneShape, Siso, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import EMBEDDED_NAME, BackboneConfig
from revmux.pretrained.identity import resolve
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained

LENGTH = 128
LABELS = ("negative", "positive")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Workload:
    """A backbone in a folder, with the texts of the requests.

    Attributes:
        key: name in file names.
        name: name in the rows.
        folder: folder of the task model; its adapters are written beside it.
        texts: texts of the requests, at least one.
        sizes: sizes of the measurements.
        has_targets: whether the speed-up over HTTP has a target on this backbone.
    """

    key: str
    name: str
    folder: Path
    texts: list[str]
    sizes: Sizes
    has_targets: bool

    @cached_property
    def pretrained(self) -> Pretrained:
        """The task model, loaded once."""
        return load_pretrained(BackboneConfig(str(self.folder), max_length=LENGTH))

    @cached_property
    def mean_length(self) -> int:
        """Mean number of tokens per text, rounded."""
        encoded = self.pretrained.tokenizer(self.texts)["input_ids"]
        return round(sum(map(len, encoded)) / len(encoded))

    @property
    def digest(self) -> str:
        """SHA-256 of the texts."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    def counted_speedup(self, num_inputs: int, cut: int) -> float:
        """Return the speed-up by counted operations at the mean length."""
        return counted_speedup(random_revmux(self.pretrained.backbone, num_inputs, cut), self.mean_length)

    def adapters(self, cut: int) -> list[str]:
        """Return an adapter folder for each N; missing ones are written."""
        folders = []
        for num_inputs in WIDTHS:
            folder = self.folder.with_name(f"{self.key}-n{num_inputs}-l{cut}")
            if not folder.is_dir():
                model = random_revmux(self.pretrained.backbone, num_inputs, cut)
                save_adapter(model, describe_adapter(model, self.pretrained, LENGTH, {"source": "none"}), folder)
            folders.append(str(folder))
        return folders

    def batches(self, inputs: int, batch_size: int) -> list[TokenBatch]:
        """Return tokenized texts in batches of similar length, each tensor (B, S)."""
        texts = [self.texts[index % len(self.texts)] for index in range(inputs)]
        texts.sort(key=lambda text: len(self.pretrained.tokenizer(text)["input_ids"]))
        return [
            self.pretrained.encode(texts[start : start + batch_size], max_length=LENGTH)
            for start in range(0, inputs, batch_size)
        ]


def random_revmux(backbone: Backbone, num_inputs: int, cut: int) -> MultiplexedClassifier:
    """Return RevMUX with random weights on a frozen backbone; N = 1 is the plain model."""
    torch.manual_seed(num_inputs)
    name = Siso.name if num_inputs == 1 else "revmux"
    method = build_method(name, BackboneShape.of(backbone), num_inputs).to(backbone.device)
    return MultiplexedClassifier(backbone.freeze(), method, cut).eval()


def counted_speedup(model: MultiplexedClassifier, length: int) -> float:
    """Return the speed-up by counted operations for inputs of ``length`` tokens."""
    return 1 / relative_cost(model.backbone, model.method, model.prefill_layers, length)


def shape_workload(settings: Settings, folder: Path) -> Workload:
    """Return a BERT with random weights and texts of 128 tokens each."""
    shape = settings.shape
    model = write_shape(folder / "shape", shape)
    tokenizer = load_pretrained(BackboneConfig(str(model))).tokenizer
    sizes = Sizes(max_batch=32, alone=24, plain=64, grouped=256, rivals=64, quiet=20, half=40)
    texts = texts_of_length(tokenizer, LENGTH, 64)
    return Workload("shape", shape.name, model, texts, sizes.times(settings.scale), shape == Shape())


def embedded_workload(settings: Settings, folder: Path) -> Workload:
    """Return the embedded encoder with a new head and real sentences."""
    model, pretrained = write_embedded(folder / "embedded")
    source = DataConfig("docstrings") if settings.glue is None else DataConfig(str(settings.glue / "SST-2"), limit=1)
    found = list(load_task(source).test["text"])
    lengths = map(len, pretrained.tokenizer(found)["input_ids"])
    texts = [text for text, length in zip(found, lengths) if length <= LENGTH]  # so that no server truncates any
    sizes = Sizes(max_batch=64, alone=128, plain=256, grouped=768, rivals=256, quiet=100, half=400)
    return Workload("embedded", EMBEDDED_NAME, model, texts, sizes.times(settings.scale), False)


def write_shape(folder: Path, shape: Shape) -> Path:
    """Write a BERT with random weights and the tokenizer of the embedded encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder


def write_embedded(folder: Path) -> tuple[Path, Pretrained]:
    """Write the embedded encoder with a new head; returns the folder and the loaded model."""
    torch.manual_seed(0)
    pretrained = load_pretrained(BackboneConfig(), list(LABELS))
    pretrained.backbone.model.save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder, pretrained


def _copy_tokenizer(folder: Path) -> None:
    """Copy the embedded encoder's original files, because other servers may use an older transformers."""
    source = Path(resolve(EMBEDDED_NAME))
    for name in _TOKENIZER:
        shutil.copy(source / name, folder / name)


def texts_of_length(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[str]:
    """Return texts of exactly ``length`` tokens each, made of words that are single tokens.

    Args:
        tokenizer: a tokenizer with whole words in its vocabulary, such as BERT's.
        length: tokens per text, special tokens included.
        count: number of texts.
    """
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and word.islower())
    inner = length - tokenizer.num_special_tokens_to_add()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (count, inner), generator=generator)
    texts = [" ".join(words[index] for index in row) for row in chosen.tolist()]
    _check_lengths(tokenizer, texts, length)
    return texts


def _check_lengths(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> None:
    found = {len(tokens) for tokens in tokenizer(list(texts))["input_ids"]}
    if found != {length}:
        raise ValueError(f"texts have {sorted(found)} tokens, not {length}")
