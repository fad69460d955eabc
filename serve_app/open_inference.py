"""Request and reply bodies of the Open Inference Protocol, version 2. Each task is a model of the protocol.

One input tensor of type BYTES contains the texts, shape [B] or [B, 1], or sentence pairs, shape [B, 2]. The reply
contains ``labels`` (BYTES) and ``scores`` (FP32), both of shape [B, K], best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import revmux
from revmux.errors import EmptyText, TextError
from revmux.labels import ScoreFunction
from revmux.serving import Answer
from revmux.serving.answer import rank_answers
from revmux.text import Text
from serve_app.protocol import RequestOptions

Nested = list[Any]


class InputTensor(BaseModel):
    """The texts of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    shape: list[int] = Field(
        fail_fast=True, min_length=1, max_length=2, description="[B] or [B, 1] texts, or [B, 2] sentence pairs"
    )
    datatype: Literal["BYTES"]
    data: list[str | Annotated[list[str], Field(fail_fast=True)]] = Field(
        fail_fast=True, description="the texts, flat or nested according to the shape"
    )
    parameters: dict[str, Any] | None = None

    @property
    def texts(self) -> list[Text]:
        """The B texts or pairs.

        Raises:
            TextError: the shape is not supported, or does not match the number of texts.
        """
        if self.shape[0] == 0 and not self.data:
            raise EmptyText(f"input {self.name!r} is empty; send at least one text")
        columns = self.shape[1] if len(self.shape) == 2 else 1
        if columns not in (1, 2) or min(self.shape) < 1:
            raise TextError(f"input {self.name!r} has shape {self.shape}; send [B] or [B, 1] texts or [B, 2] pairs")
        flat = [part for item in self.data for part in ([item] if isinstance(item, str) else item)]
        if len(flat) != prod(self.shape):
            raise TextError(
                f"input {self.name!r} has {len(flat)} texts, but its shape {self.shape} requires {prod(self.shape)}"
            )
        if columns == 1:
            return list(flat)
        return [(first, second) for first, second in zip(islice(flat, 0, None, 2), islice(flat, 1, None, 2))]


class OutputTensor(BaseModel):
    """A tensor that the client requests."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["labels", "scores"]
    parameters: dict[str, Any] | None = None


class InferParameters(RequestOptions):
    """Optional parameters of an inference request."""

    top_k: int | None = Field(default=None, ge=1, description="labels in the reply; all by default")
    function_to_apply: ScoreFunction | None = Field(default=None, description="applied to the scores")


class InferRequest(BaseModel):
    """Body of ``POST /v2/models/{task}/infer``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = None
    inputs: list[InputTensor] = Field(fail_fast=True, min_length=1, max_length=1)
    outputs: Annotated[list[OutputTensor], Field(fail_fast=True)] | None = None
    parameters: InferParameters = InferParameters()

    def reply(self, task: str, answers: Sequence[Answer], label_names: Sequence[str]) -> dict[str, Any]:
        """Return the body of the reply."""
        parameters = self.parameters
        function = parameters.function_to_apply or ("none" if parameters.raw_scores else None)
        rankings = rank_answers(answers, label_names, function, parameters.top_k)
        shape = [len(rankings), len(rankings[0])]
        tensors: dict[str, dict[str, Any]] = {
            "labels": {"datatype": "BYTES", "data": [label for ranking in rankings for label, _ in ranking]},
            "scores": {"datatype": "FP32", "data": [score for ranking in rankings for _, score in ranking]},
        }
        requested = [output.name for output in self.outputs] if self.outputs else list(tensors)
        outputs = [{"name": name, "shape": shape, **tensors[name]} for name in requested]
        request_id = {} if self.id is None else {"id": self.id}
        return {"model_name": task, "model_version": "1", **request_id, "outputs": outputs}


def server_metadata() -> dict[str, Any]:
    """Return the reply to ``GET /v2``."""
    return {"name": "revmux", "version": revmux.__version__, "extensions": []}


def model_metadata(task: str, num_labels: int) -> dict[str, Any]:
    """Return the reply to ``GET /v2/models/{task}``."""
    return {
        "name": task,
        "versions": ["1"],
        "platform": "revmux",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "labels", "datatype": "BYTES", "shape": [-1, num_labels]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, num_labels]},
        ],
    }
