"""Label words in place of a classification head: a class is scored by its tokens' rows of the output embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revmux.errors import UserError
from revmux.utils.autocast import without_autocast


@dataclass(frozen=True)
class Verbalizer:
    """The tokens that stand for each class in a language model's vocabulary.

    Args:
        label_names: class names in the order of the scores.
        token_ids: the tokens of each class. The score of a class is the mean over its tokens.
        answer_prefix: tokens that the decoder of an encoder-decoder receives after its start token, before the answer
            is read. If empty, the answer is read at the start token (step 0). For a decoder-only model, put such
            tokens at the end of the prompt instead.
        bias: what is added to the score of each class; empty for nothing.

    Raises:
        UserError: a class without tokens, two classes with the same first token, or not one bias per class.
    """

    label_names: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    answer_prefix: tuple[int, ...] = ()
    bias: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.label_names) != len(self.token_ids):
            raise UserError(
                f"the verbalizer has {len(self.label_names)} class names but tokens for {len(self.token_ids)} classes; "
                "give tokens for every class"
            )
        if self.bias and len(self.bias) != len(self.label_names):
            raise UserError(
                f"the verbalizer has {len(self.label_names)} classes but {len(self.bias)} biases; give one per class, or none"
            )
        owners: dict[int, str] = {}
        for name, ids in zip(self.label_names, self.token_ids, strict=True):
            if not ids:
                raise UserError(f"class {name!r} of the verbalizer has no token; give it one or more token ids")
            if ids[0] in owners:
                raise UserError(
                    f"classes {owners[ids[0]]!r} and {name!r} of the verbalizer have the same first token {ids[0]}; "
                    "choose words that begin with different tokens"
                )
            owners[ids[0]] = name


class VerbalizerHead(nn.Module):
    """Label scores from a few rows of a model's output embedding, without weights of its own.

    Args:
        verbalizer: the tokens of each class.
        vocab_size: number of rows of the output embedding.

    Raises:
        UserError: a token id outside the vocabulary.
    """

    rows: Tensor
    average: Tensor
    bias: Tensor | None

    def __init__(self, verbalizer: Verbalizer, vocab_size: int) -> None:
        super().__init__()
        tokens = [token for ids in verbalizer.token_ids for token in ids]
        for token in (*tokens, *verbalizer.answer_prefix):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"token id {token} of the verbalizer is outside the vocabulary 0..{vocab_size - 1}; "
                    "build the verbalizer with this model's tokenizer"
                )
        average = torch.zeros(len(verbalizer.token_ids), len(tokens), dtype=torch.float32)
        start = 0
        for label, ids in enumerate(verbalizer.token_ids):
            average[label, start : start + len(ids)] = 1 / len(ids)
            start += len(ids)
        self.one_token_each = len(tokens) == len(verbalizer.token_ids)
        self.register_buffer("rows", torch.tensor(tokens), persistent=False)  # (K,)
        self.register_buffer("average", average, persistent=False)  # (C, K)
        bias = torch.tensor(verbalizer.bias, dtype=torch.float32) if verbalizer.bias else None
        self.register_buffer("bias", bias, persistent=False)  # (C,)

    def forward(self, vector: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Scores of the classes only, never of the whole vocabulary.

        They have at least the precision of float32. Logits of 20 and more would be rounded to eighths in bfloat16,
        which is more than what often separates two label words.

        Args:
            vector: (..., d).
            weight: (V, d), the output embedding.
            bias: (V,), or None.

        Returns:
            (..., C).
        """
        exact = torch.promote_types(vector.dtype, torch.float32)
        with without_autocast(vector.device):
            own = None if bias is None else bias[self.rows].to(exact)
            scores = nn.functional.linear(vector.to(exact), weight[self.rows].to(exact), own)  # (..., K)
            if not self.one_token_each:
                scores = scores @ self.average.to(exact).T
            return scores if self.bias is None else scores + self.bias.to(exact)
