"""Request and reply bodies of text-embeddings-inference and of huggingface_hub's InferenceClient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from revmux.errors import EmptyText, TextError
from revmux.labels import ScoreFunction
from revmux.serving import Answer
from revmux.serving.answer import rank_answers
from revmux.serving.limits import HIGHEST_PRIORITY, WIDEST
from revmux.text import Text
from serve_app.config import explain

Ranking = list[dict[str, str | float]]
"""``[{"label", "score"}, …]``, best first."""

Body = TypeVar("Body", bound=BaseModel)

_TEXT = {"type": "string", "minLength": 1}
_PAIR = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2}
INPUTS_SCHEMA = {"anyOf": [_TEXT, _PAIR, {"type": "array", "items": _PAIR, "minItems": 1}]}


class Parameters(BaseModel):
    """Parameters that InferenceClient sends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: int | None = Field(default=None, ge=1, description="labels in the reply; all by default")
    function_to_apply: ScoreFunction | None = Field(default=None, description="applied to the scores")


class RequestOptions(BaseModel):
    """Options that requests of both protocols accept."""

    model_config = ConfigDict(extra="forbid", strict=True)

    truncate: bool | None = Field(default=False, description="cut texts that are too long; otherwise they are refused")
    raw_scores: bool | None = Field(default=False, description="return the model's scores without softmax")
    max_multiplex: int | None = Field(
        default=None, ge=1, le=WIDEST, description="maximum group width; 1 uses the plain model"
    )
    priority: float | None = Field(
        default=None, ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY, description="higher runs earlier; 0 by default"
    )
    timeout_ms: float | None = Field(
        default=None, gt=0, le=86_400_000, description="return 504 if the model has not started within this time"
    )


class PredictRequest(RequestOptions):
    """Body of ``POST /predict``."""

    inputs: Annotated[Any, WithJsonSchema(INPUTS_SCHEMA)] = Field(
        description='one text "a", one sentence pair ["a", "b"], or a batch of a text and a pair [["a"], ["b", "c"]]'
    )
    task: str | None = Field(
        default=None, description="name of the task; required, or tasks, if the server has several"
    )
    tasks: Annotated[list[str], Field(min_length=1, fail_fast=True)] | Literal["*"] | None = Field(
        default=None,
        description='names of tasks that all answer the inputs, or "*" for all tasks; the reply is then an object with '
        "one member per task",
    )
    parameters: Parameters | None = Field(default=None, description="if present, the reply is nested even for one text")

    @property
    def texts(self) -> list[Text]:
        """The inputs as strings and pairs.

        Raises:
            TextError: ``inputs`` has none of the three forms.
        """
        if isinstance(self.inputs, list) and not self.inputs:
            raise EmptyText("inputs is an empty list; send at least one text")
        if not self._is_batch:
            return [_text(self.inputs)]
        if mixed := [item for item in self.inputs if not isinstance(item, list)]:
            raise TextError(f"inputs mixes {mixed[0]!r:.80} with lists; in a batch, write every input as a list")
        return [_text(item) for item in self.inputs]

    @property
    def _is_batch(self) -> bool:
        return isinstance(self.inputs, list) and any(isinstance(item, list) for item in self.inputs)

    def reply(self, answers: Sequence[Answer], label_names: Sequence[str]) -> Ranking | list[Ranking]:
        """Return the body of the reply: one ranking for a single input, a list of rankings for a batch."""
        parameters = self.parameters or Parameters()
        function = parameters.function_to_apply or ("none" if self.raw_scores else None)
        rankings: list[Ranking] = [
            [{"label": label, "score": score} for label, score in ranking]
            for ranking in rank_answers(answers, label_names, function, parameters.top_k)
        ]
        return rankings if self._is_batch or "parameters" in self.model_fields_set else rankings[0]


def _text(item: Any) -> Text:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and len(item) in (1, 2) and all(isinstance(part, str) for part in item):
        return item[0] if len(item) == 1 else (item[0], item[1])
    raise TextError(
        f"inputs contains {item!r:.80}; send a string, two strings for one sentence pair, or a batch of lists such as "
        '[["one text"], ["a", "pair"]]'
    )


def parse(body: bytes, kind: type[Body]) -> Body:
    """Parse the body of a request.

    Raises:
        EmptyText: the body is empty.
        TextError: the body is not JSON, or has an unknown key or a value of the wrong type.
    """
    if not body:
        raise EmptyText('the body is empty; send JSON such as {"inputs": "a text"}')
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise TextError(f"{explain(error)}; known keys: {', '.join(kind.model_fields)}") from None
