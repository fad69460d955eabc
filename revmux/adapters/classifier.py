"""Texts to label scores in a few lines: an adapter on its backbone, for notebooks and batch jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from revmux.adapters.config import load_adapter_config, local_adapter_folder, recorded_backbone, recorded_dtype
from revmux.adapters.folder import load_adapter
from revmux.errors import UserError
from revmux.grouping import consecutive_groups, local_rows
from revmux.labels import ScoreFunction, rank_labels
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.encoder import Encoder, Text
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained


class TextClassifier:
    """Classifies texts, N of like length in each pass.

    Args:
        model: an adapter on its backbone, as :func:`revmux.adapters.folder.load_adapter` gives it.
        pretrained: the backbone with its tokenizer.
        max_length: tokens that an input may have.

    Attributes:
        label_names: classes in the order of the scores.
        num_inputs: N.
    """

    def __init__(self, model: MultiplexedClassifier, pretrained: Pretrained, max_length: int) -> None:
        self.model = model.eval()
        self.label_names = pretrained.backbone.label_names
        self.num_inputs = model.num_inputs
        self.max_length = min(max_length, model.backbone.max_length - model.method.added_tokens)
        self._encoder = Encoder(pretrained, self.max_length)
        self._tokenizer = pretrained.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        backbone: str | Path | BackboneConfig | Pretrained | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> TextClassifier:
        """Load an adapter and the backbone that it was trained on.

        Args:
            adapter: a folder, or ``user/name`` on the hub.
            backbone: a folder, an id on the hub, settings, or a loaded one; by default the one that the adapter
                records, at its recorded revision. Settings and a loaded one have their own dtype, else it is the
                recorded one.
            revision: of the adapter on the hub: branch, tag or commit.
            device: where both run.

        Raises:
            UserError: no such adapter, a recorded backbone that is only known by the name of its folder, or one that
                the adapter was not trained on.
        """
        folder = local_adapter_folder(adapter, revision)
        config = load_adapter_config(folder)
        if backbone is None:
            backbone = recorded_backbone(config, adapter)
        elif isinstance(backbone, (str, Path)):
            backbone = BackboneConfig(str(backbone), dtype=recorded_dtype(config))
        if isinstance(backbone, BackboneConfig):
            prompt = backbone.prompt or config.recorded_prompt()
            pretrained = load_pretrained(replace(backbone, max_length=config.max_length, prompt=prompt))
        else:
            pretrained = backbone
        pretrained.backbone.freeze().to(device)
        return cls(load_adapter(folder, pretrained), pretrained, config.max_length)

    @torch.inference_mode()
    def scores(self, texts: Sequence[Text], truncate: bool = True, batch_size: int = 64) -> Tensor:
        """Label scores before softmax.

        Texts of like length share a group, the longest first; the last group is filled with its own members again.
        Who shares a group with whom moves the scores a little, so the same list gives the same scores.

        Args:
            texts: strings, or pairs of strings.
            truncate: cut long texts as in training; otherwise they are refused.
            batch_size: texts a forward pass.

        Returns:
            (M, C) float32 on the CPU, in the order of ``texts``.

        Raises:
            UserError: something that is no list of texts, an empty text, or one that is too long.
        """
        if isinstance(texts, str):
            raise UserError(f"texts is the one text {texts!r:.80}; give a list, such as [text]")
        scores = torch.zeros(len(texts), len(self.label_names))
        if not len(texts):
            return scores
        encoded = [self._encoder.encode(text, truncate).tokens for text in texts]
        lengths = torch.tensor([len(tokens["input_ids"]) for tokens in encoded])  # (M,)
        order = lengths.argsort(descending=True, stable=True)
        groups = order[consecutive_groups(len(texts), self.num_inputs)]  # (G, N)
        for chunk in groups.split(max(1, batch_size // self.num_inputs)):
            rows, inside = local_rows(chunk)
            columns = {name: [encoded[row][name] for row in rows.tolist()] for name in encoded[0]}
            padded = self._tokenizer.pad(columns, return_tensors="pt")
            tokens = {name: tensor.to(self.model.backbone.device) for name, tensor in padded.items()}
            scores[rows] = self.model(tokens, inside.to(self.model.backbone.device)).float().cpu()
        return scores

    def __call__(
        self,
        texts: Sequence[Text],
        function: ScoreFunction | None = None,
        top_k: int | None = None,
        truncate: bool = True,
        batch_size: int = 64,
    ) -> list[list[tuple[str, float]]]:
        """Labels with their scores, best first, a list a text.

        Args:
            texts: as in :meth:`scores`.
            function: ``softmax``, ``sigmoid`` or ``none``; None is softmax, or sigmoid where there is one class only.
            top_k: how many labels; None is all.
            truncate: as in :meth:`scores`.
            batch_size: as in :meth:`scores`.
        """
        scores = self.scores(texts, truncate, batch_size)
        return [rank_labels(own, self.label_names, function, top_k) for own in scores]
