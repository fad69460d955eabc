"""What clients send and get: the forms of text-embeddings-inference and of huggingface_hub's InferenceClient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from revmux.serving import Answer, EmptyText, TextError, rank_labels
from revmux.serving.answer import ScoreFunction
from revmux.serving.texts import Text
from serve_app.config import explain

Ranking = list[dict[str, str | float]]
"""``[{"label", "score"}, …]``, best first."""


class Parameters(BaseModel):
    """What InferenceClient asks for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: int | None = Field(default=None, ge=1, description="labels in the reply; all by default")
    function_to_apply: ScoreFunction | None = Field(default=None, description="applied to the scores")


class PredictRequest(BaseModel):
    """Body of ``POST /predict``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: Any = Field(
        description='"a" is one text, ["a", "b"] one sentence pair, [["a"], ["b", "c"]] a batch of a text and a pair'
    )
    truncate: bool | None = Field(default=False, description="cut long texts; otherwise they are refused")
    raw_scores: bool | None = Field(default=False, description="scores as the model gives them, no softmax")
    max_multiplex: int | None = Field(default=None, ge=1, description="widest group to ride in; 1 is the plain model")
    parameters: Parameters | None = Field(default=None, description="if present, the reply is nested even for one text")

    @property
    def texts(self) -> list[Text]:
        """The inputs, strings and pairs.

        Raises:
            TextError: not one of the three forms.
        """
        if isinstance(self.inputs, list) and not self.inputs:
            raise EmptyText("inputs is an empty list; send at least one text")
        if not self._is_batch:
            return [_text(self.inputs)]
        if mixed := [item for item in self.inputs if not isinstance(item, list)]:
            raise TextError(
                f"inputs has {mixed[0]!r:.80} among lists; nest every input of a batch in a list of its own"
            )
        return [_text(item) for item in self.inputs]

    @property
    def _is_batch(self) -> bool:
        return isinstance(self.inputs, list) and any(isinstance(item, list) for item in self.inputs)

    def reply(self, answers: Sequence[Answer], label_names: Sequence[str]) -> Ranking | list[Ranking]:
        """The body of the reply, flat or nested as the request wants it."""
        parameters = self.parameters or Parameters()
        function = parameters.function_to_apply or ("none" if self.raw_scores else None)
        rankings: list[Ranking] = [
            [
                {"label": label, "score": score}
                for label, score in rank_labels(answer.scores, label_names, function, parameters.top_k)
            ]
            for answer in answers
        ]
        return rankings if self._is_batch or "parameters" in self.model_fields_set else rankings[0]


def _text(item: Any) -> Text:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and len(item) in (1, 2) and all(isinstance(part, str) for part in item):
        return item[0] if len(item) == 1 else (item[0], item[1])
    raise TextError(
        f"inputs has {item!r:.80}; send a string, two strings for one sentence pair, or a batch of nested lists such as "
        '[["one text"], ["a", "pair"]]'
    )


def parse_request(body: bytes) -> PredictRequest:
    """A request from its bytes.

    Raises:
        EmptyText: no bytes at all.
        TextError: not JSON, an unknown key, or a value of the wrong type.
    """
    if not body:
        raise EmptyText('the body is empty; send JSON such as {"inputs": "a text"}')
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        raise TextError(f"{explain(error)}; known keys: {', '.join(PredictRequest.model_fields)}") from None


def timing_headers(answers: Sequence[Answer], total_seconds: float) -> dict[str, str]:
    """How the inputs rode: group widths and truncation an input, and times in milliseconds, the longest of all inputs."""
    return {
        "x-group-width": ",".join(str(answer.width) for answer in answers),
        "x-truncated": ",".join(str(answer.truncated).lower() for answer in answers),
        "x-queue-time": _milliseconds(max(answer.queue_seconds for answer in answers)),
        "x-inference-time": _milliseconds(max(answer.inference_seconds for answer in answers)),
        "x-total-time": _milliseconds(total_seconds),
    }


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
