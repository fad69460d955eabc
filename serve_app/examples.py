"""Schemas and examples of requests and replies for the OpenAPI page."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serve_app.errors import ERRORS

_PREDICT: dict[str, Any] = {
    "one text": {"inputs": "a gripping film"},
    "a sentence pair": {"inputs": ["A man plays a guitar.", "A person makes music."]},
    "a batch": {"inputs": [["a gripping film"], ["two hours that felt like four"]]},
    "with the plain model": {"inputs": "a gripping film", "max_multiplex": 1},
    "as huggingface_hub sends it": {"inputs": "a gripping film", "parameters": {"top_k": 1}},
    "urgent": {"inputs": "a gripping film", "priority": 5, "timeout_ms": 200},
}
SEVERAL_TASKS: dict[str, Any] = {"all tasks": {"inputs": "a gripping film", "tasks": "*"}}
_CLASSIFY: dict[str, Any] = {
    "one text": {"input": "a gripping film"},
    "a list of texts": {"input": ["a gripping film", "two hours that felt like four"]},
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
                "data": ["A man plays a guitar.", "A person makes music."],
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
RANKINGS_BY_TASK: dict[str, Any] = {"anyOf": [*RANKINGS["anyOf"], {"type": "object", "additionalProperties": RANKINGS}]}
CLASSES: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "data", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["list"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "label", "probs", "num_classes"],
                "properties": {
                    "index": {"type": "integer"},
                    "label": {"type": "string"},
                    "probs": {"type": "array", "items": {"type": "number"}},
                    "num_classes": {"type": "integer"},
                },
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "total_tokens", "completion_tokens"],
            "additionalProperties": {"type": "integer"},
        },
    },
}
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
    400: "there is nothing to classify",
    401: "the token is missing or unknown",
    404: "the task is unknown; the reply lists the known tasks",
    408: "the body did not arrive in time",
    413: "the request contains more bytes or texts than allowed",
    422: "the request does not match this description, or a text is too long",
    424: "the model failed on an input of this request; other requests are not affected",
    429: "the queue is full; retry after the time in `Retry-After`",
    503: "the server is shutting down or the model does not answer; retry after the time in `Retry-After`",
    504: "the timeout of the request passed before the model started",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error replies of an endpoint: these statuses, and 401 and 503, which every endpoint can return."""
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
    """Describe the successful reply of an endpoint."""
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}


def body(kind: type[BaseModel], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe the JSON body of an endpoint, with examples. The endpoints parse it themselves, not through FastAPI.

    Args:
        kind: the body.
        more: examples of this endpoint alone.
    """
    fields = kind.model_fields
    examples = (_PREDICT if "task" in fields else _CLASSIFY if "model" in fields else _INFER) | (more or {})
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    content = {"schema": schema, "examples": {name: {"value": value} for name, value in examples.items()}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def definitions(*kinds: type[BaseModel]) -> dict[str, Any]:
    """Return the schemas that these bodies refer to."""
    found: dict[str, Any] = {}
    for kind in kinds:
        found |= kind.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
    return found
