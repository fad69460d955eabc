"""What the OpenAPI page shows of requests and replies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serve_app.errors import ERRORS

_PREDICT: dict[str, Any] = {
    "one text": {"inputs": "a gripping film"},
    "a sentence pair": {"inputs": ["A man plays a guitar.", "Somebody makes music."]},
    "a batch": {"inputs": [["a gripping film"], ["two hours that felt like four"]]},
    "exactly as the plain model": {"inputs": "a gripping film", "max_multiplex": 1},
    "as huggingface_hub asks": {"inputs": "a gripping film", "parameters": {"top_k": 1}},
    "urgent": {"inputs": "a gripping film", "priority": 5, "timeout_ms": 200},
}
_INFER: dict[str, Any] = {
    "two texts": {
        "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a gripping film", "a dull one"]}]
    },
    "a sentence pair": {
        "inputs": [
            {
                "name": "text",
                "shape": [1, 2],
                "datatype": "BYTES",
                "data": ["A man plays a guitar.", "Somebody makes music."],
            }
        ],
        "outputs": [{"name": "labels"}],
        "parameters": {"top_k": 1},
    },
}
_RANKING = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
        "required": ["label", "score"],
    },
}
RANKINGS: dict[str, Any] = {"anyOf": [_RANKING, {"type": "array", "items": _RANKING}]}
TENSORS: dict[str, Any] = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"enum": ["BYTES", "FP32"]},
                    "data": {"type": "array"},
                },
            },
        },
    },
}
_FAILURE: dict[str, Any] = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
}
_REASONS = {
    400: "nothing to classify",
    401: "no known token",
    404: "an unknown task; the reply lists the known ones",
    408: "the body came too slowly",
    413: "more bytes or texts than one request may hold",
    422: "not as described here, or a text that is too long",
    424: "the model failed on this batch; other batches are not touched",
    429: "the queue is full; `Retry-After` says when to come back",
    503: "shutting down, or the model does not answer; `Retry-After` says when to come back",
    504: "the request's own time had passed before the model began",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of an endpoint; 401 and 503 can meet any."""
    return {
        status: {
            "description": _REASONS[status],
            "content": {
                "application/json": {
                    "schema": _FAILURE,
                    "example": {"error": _REASONS[status], "error_type": ERRORS[status]},
                }
            },
        }
        for status in sorted({*statuses, 401, 503})
    }


def reply(schema: dict[str, Any], description: str) -> dict[int | str, dict[str, Any]]:
    """The good reply of an endpoint."""
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}


def body(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON body of an endpoint that reads it itself, with examples."""
    examples = _PREDICT if "task" in kind.model_fields else _INFER
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    content = {"schema": schema, "examples": {name: {"value": value} for name, value in examples.items()}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def definitions(*kinds: type[BaseModel]) -> dict[str, Any]:
    """The schemas that these bodies refer to."""
    found: dict[str, Any] = {}
    for kind in kinds:
        found |= kind.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
    return found
