"""The accepted forms of a request, and the HTTP status of every error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fastapi import FastAPI

from revmux.errors import EmptyText, TextError, UserError
from revmux.serving import Answer, Draining, InferenceFailed, Overloaded
from serve_app import errors as failures
from serve_app.errors import TooLarge, Unhealthy
from serve_app.protocol import PredictRequest, parse


@pytest.mark.parametrize(
    ("inputs", "texts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b"], [("a", "b")]),
        ([["a"], ["b", "c"]], ["a", ("b", "c")]),
        ([["a", "b"]], [("a", "b")]),
    ],
)
def test_all_documented_input_forms_are_accepted(inputs: Any, texts: list[Any]) -> None:
    asked = parse(json.dumps({"inputs": inputs}).encode(), PredictRequest)
    assert asked.texts == texts
    answers = [Answer(torch.zeros(2), 1, "siso", 0.0, 0.0)] * len(texts)
    reply = asked.reply(answers, ["x", "y"])
    nested = isinstance(inputs, list) and isinstance(inputs[0], list)
    assert isinstance(reply[0], list) == nested


@pytest.mark.parametrize(
    "inputs", [None, 1, True, {"text": "a"}, ["a", "b", "c"], [["a"], "b"], [["a", 1]], [[]], [["a", "b", "c"]]]
)
def test_other_input_forms_are_refused(inputs: Any) -> None:
    with pytest.raises(TextError):
        _ = parse(json.dumps({"inputs": inputs}).encode(), PredictRequest).texts


def test_parameters_control_the_nesting_of_the_reply_and_the_scores() -> None:
    answers = [Answer(torch.tensor([0.0, 2.0]), 1, "siso", 0.0, 0.0)]
    empty = parse(b'{"inputs": "a", "parameters": {}}', PredictRequest)
    assert [len(ranking) for ranking in empty.reply(answers, ["x", "y"])] == [2]
    one = parse(b'{"inputs": "a", "parameters": {"top_k": 1, "function_to_apply": "sigmoid"}}', PredictRequest)
    assert one.reply(answers, ["x", "y"]) == [[{"label": "y", "score": pytest.approx(0.8808, abs=1e-4)}]]
    with pytest.raises(TextError, match="temperature"):
        parse(b'{"inputs": "a", "parameters": {"temperature": 1}}', PredictRequest)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EmptyText("m"), 400, "empty"),
        (TooLarge("m"), 413, "too_large"),
        (TextError("m"), 422, "validation"),
        (UserError("m"), 422, "validation"),
        (InferenceFailed("m"), 424, "backend"),
        (Overloaded("m"), 429, "overloaded"),
        (Draining("m"), 503, "unhealthy"),
        (Unhealthy("m"), 503, "unhealthy"),
        (KeyError("secret"), 500, "internal"),
    ],
)
def test_every_failure_has_its_http_status(error: Exception, status: int, kind: str) -> None:
    from fastapi.testclient import TestClient

    app = FastAPI()
    failures.install(app)

    @app.get("/")
    def fail() -> None:
        raise error

    reply = TestClient(app, raise_server_exceptions=False).get("/")
    assert reply.status_code == status
    assert reply.json()["error_type"] == kind
    assert "secret" not in reply.text
