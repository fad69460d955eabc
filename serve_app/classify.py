"""Request and reply bodies of vLLM's ``POST /classify`` and ``GET /v1/models``. Each task is a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import uuid4

import torch
from pydantic import Field

from revmux.errors import EmptyText
from revmux.labels import activate
from revmux.serving import Answer
from revmux.text import Text
from serve_app.protocol import RequestOptions


class ClassifyRequest(RequestOptions):
    """Body of ``POST /classify``."""

    input: str | Annotated[list[str], Field(fail_fast=True)] = Field(description="one text, or a list of texts")
    model: str | None = Field(default=None, description="name of the task; required if the server has several")
    user: str | None = Field(default=None, description="accepted but ignored")

    @property
    def texts(self) -> list[Text]:
        """The inputs.

        Raises:
            EmptyText: the list is empty.
        """
        if not self.input:
            raise EmptyText("input is empty; send at least one text")
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def reply(self, task: str, answers: Sequence[Answer], label_names: Sequence[str]) -> dict[str, Any]:
        """Return the body of the reply: per input the best label and the probabilities of all labels, in their order."""
        scores = torch.stack([answer.scores for answer in answers])  # (B, C)
        probabilities = activate(scores, "none" if self.raw_scores else None).tolist()
        best = scores.argmax(-1).tolist()
        tokens = sum([answer.tokens for answer in answers])
        return {
            "id": f"classify-{uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": task,
            "data": [
                {"index": index, "label": label_names[label], "probs": row, "num_classes": len(label_names)}
                for index, (label, row) in enumerate(zip(best, probabilities))
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }


def model_list(tasks: Sequence[str], started: float) -> dict[str, Any]:
    """Return the reply to ``GET /v1/models``.

    Args:
        tasks: names of the served tasks.
        started: when the replica started, in seconds since 1970.
    """
    models = [{"id": name, "object": "model", "created": int(started), "owned_by": "revmux"} for name in tasks]
    return {"object": "list", "data": models}
