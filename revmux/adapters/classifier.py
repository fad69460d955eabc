"""Classification of texts with an adapter and its backbone, for notebooks and batch jobs."""

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
from revmux.pretrained.encoder import Encoder
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.text import Text


class TextClassifier:
    """Classifies texts, N of similar length per forward pass.

    Args:
        model: an adapter on its backbone, as returned by :func:`revmux.adapters.folder.load_adapter`.
        pretrained: the backbone with its tokenizer.
        max_length: maximum number of tokens per input.
        pairs: whether the adapter was trained on pairs of texts; None is what the task model records, if it does.

    Attributes:
        label_names: classes in the order of the scores.
        num_inputs: N.
    """

    def __init__(
        self, model: MultiplexedClassifier, pretrained: Pretrained, max_length: int, pairs: bool | None = None
    ) -> None:
        self.model = model.eval()
        self.label_names = pretrained.backbone.label_names
        self.num_inputs = model.num_inputs
        self.max_length = min(max_length, model.backbone.max_length - model.method.added_tokens)
        self._encoder = Encoder(pretrained, self.max_length, pairs)
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
            backbone: a folder, an id on the hub, settings, or a loaded backbone. By default, the backbone that the
                adapter records, at its recorded revision. Settings and a loaded backbone have their own dtype;
                otherwise the recorded dtype is used.
            revision: branch, tag or commit of the adapter on the hub.
            device: the device of adapter and backbone.

        Raises:
            UserError: the adapter cannot be found, its recorded backbone is a local folder that must be named, or the
                adapter was not trained on the given backbone.
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
        return cls(load_adapter(folder, pretrained), pretrained, config.max_length, config.pairs)

    @torch.inference_mode()
    def scores(self, texts: Sequence[Text], truncate: bool = True, batch_size: int = 64) -> Tensor:
        """Label scores before softmax.

        Texts of similar length share a group, the longest first. The last group repeats its members to fill its slots.
        The other members of a group affect a score slightly. The same list of texts always has the same scores.

        Args:
            texts: strings, or pairs of strings.
            truncate: whether to truncate long texts, as in training. Otherwise they are an error.
            batch_size: texts per forward pass.

        Returns:
            (M, C) float32 on the CPU, in the order of ``texts``.

        Raises:
            UserError: ``texts`` is not a list of texts, or a text is empty or too long.
        """
        if isinstance(texts, str):
            raise UserError(f"texts is a single string, {texts!r:.80}; pass a list, such as [text]")
        scores = torch.zeros(len(texts), len(self.label_names))
        if not len(texts):
            return scores
        encoded = [self._encoder.encode(text, truncate).tokens for text in texts]
        lengths = torch.tensor([len(tokens["input_ids"]) for tokens in encoded])  # (M,)
        order = lengths.argsort(descending=True, stable=True)
        groups = order[consecutive_groups(len(texts), self.num_inputs)]  # (G, N)
        for chunk in groups.split(max(1, batch_size // self.num_inputs)):
            rows, local_groups = local_rows(chunk)
            columns = {name: [encoded[row][name] for row in rows.tolist()] for name in encoded[0]}
            padded = self._tokenizer.pad(columns, return_tensors="pt")
            tokens = {name: tensor.to(self.model.backbone.device) for name, tensor in padded.items()}
            scores[rows] = self.model(tokens, local_groups.to(self.model.backbone.device)).float().cpu()
        return scores

    def __call__(
        self,
        texts: Sequence[Text],
        function: ScoreFunction | None = None,
        top_k: int | None = None,
        truncate: bool = True,
        batch_size: int = 64,
    ) -> list[list[tuple[str, float]]]:
        """One list per text of labels with their scores, highest score first.

        Args:
            texts: as in :meth:`scores`.
            function: ``softmax``, ``sigmoid`` or ``none``. None means softmax, or sigmoid if there is only one class.
            top_k: number of labels per text. None means all.
            truncate: as in :meth:`scores`.
            batch_size: as in :meth:`scores`.

        Raises:
            UserError: as in :meth:`scores`, or the function is unknown.
        """
        scores = self.scores(texts, truncate, batch_size)
        return [rank_labels(own, self.label_names, function, top_k) for own in scores]
