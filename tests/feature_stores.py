"""Small backbones and splits for feature stores, and the comparison of a store with its backbone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from numeric import assert_close
from tiny_models import WORDS, tiny_classifier, tiny_config, word_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from revmux.backbone import Backbone
from revmux.backbone.llama import LlamaBackbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.data.tokens import TokenizedSplit
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.pretrained.pretrained import Pretrained
from revmux.utils.lease import Lease

LAYERS, WIDTH, INPUTS, SHARD = 3, 32, 23, 8


SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS) + 5,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def bert(seed: int = 0) -> Backbone:
    return tiny_classifier("bert", seed, **SHAPE)


def modernbert() -> Backbone:
    return tiny_classifier(
        "modernbert", **SHAPE, classifier_pooling="mean", local_attention=6, cls_token_id=2, sep_token_id=3
    )


def llama() -> Backbone:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **SHAPE))
    backbone = LlamaBackbone(model, Verbalizer(("no", "yes"), ((7,), (9, 10))))
    backbone.add_soft_prompt(2)
    return backbone.freeze()


def bart() -> Backbone:
    return tiny_classifier("bart", **SHAPE, decoder_layers=1, decoder_start_token_id=3)


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    core = word_tokenizer(names)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", padding_side=side)


def split(seed: int = 0, max_length: int = 16, side: str = "right") -> TokenizedSplit:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (INPUTS,), generator=random).tolist()
    texts = [
        " ".join(WORDS[word] for word in torch.randint(len(WORDS), (length,), generator=random)) for length in lengths
    ]
    labels = torch.randint(3, (INPUTS,), generator=random).tolist()
    return TokenizedSplit(Dataset.from_dict({"text": texts, "label": labels}), tokenizer(side), max_length)


def pretrained(backbone: Backbone) -> Pretrained:
    return Pretrained(backbone, tokenizer(), {"name": "tiny", "revision": None, "sha256": "same"}, has_head=True)


def small_store(folder: Path) -> StoreConfig:
    folders = {"root": str(folder / "features"), "copies": str(folder / "copies")}
    return StoreConfig(**folders, dtype="float32", batch_size=4, shard_inputs=SHARD)


def same(config: StoreConfig, **changes: Any) -> StoreConfig:
    return StoreConfig(**{**vars(config), **changes})


def shard_files(config: StoreConfig) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(Path(config.root).rglob("*.arrow"))}


def corrupt(path: Path) -> None:
    """Change one byte in the middle, but neither size nor time stamp."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(status.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def expect_equal(store: Any, backbone: Backbone, tokens: TokenizedSplit, layer: int, tolerance: float) -> None:
    """Check that the store's batches equal the backbone's, for rows in several orders."""
    view, online = store.at(layer), OnlineFeatures(tokens, backbone)
    orders = [torch.randperm(INPUTS, generator=torch.Generator().manual_seed(2))[:9], [3], [5, 5, 0], range(INPUTS)]
    for rows in orders:
        got, expected = view.batch(rows), online.batch(rows)
        with torch.no_grad():
            state = backbone.run(backbone.embed(expected.tokens), layer)
        assert got.tokens is None
        assert got.prefilled.depth == layer
        assert torch.equal(got.prefilled.mask, state.mask)
        assert torch.equal(got.prefilled.answer, state.answer)
        for name in ("positions", "segments", "spans"):
            own, true = getattr(got.prefilled, name), getattr(state, name)
            assert (own is None) == (true is None), name
            assert own is None or torch.equal(own, true), name
        assert got.prefilled.hidden.dtype == backbone.dtype
        difference = (got.prefilled.hidden - state.hidden)[state.mask].abs().max()
        assert difference <= tolerance * max(float(state.hidden[state.mask].abs().max()), 1.0)
        assert not got.prefilled.hidden[~state.mask].any()
        assert torch.equal(got.labels, expected.labels)
        assert_close(got.teacher_vectors, expected.teacher_vectors)
        assert_close(got.teacher_scores, expected.teacher_scores)


def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new lease does not wait for other processes; its clock stands still."""
    monkeypatch.setattr(Lease.__init__, "__defaults__", (100.0, 0.0, 0.0, lambda seconds: None, lambda: 0.0))
