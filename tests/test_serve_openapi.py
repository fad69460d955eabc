"""Every operation keeps what the OpenAPI description promises, on generated requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving_http import listening

from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.web import create_app


@pytest.fixture(scope="module")
def api(serving_tasks: dict[str, Any]) -> Iterator[Any]:
    """The OpenAPI description of a server with one task, so that requests need not name it."""
    config = AppConfig.model_validate({**serving_tasks["mood"], "plain_load": 1})
    service = Service(config)
    service.serve(config.served)
    with listening(create_app(service)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    service.close()


_CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


_OPERATIONS = [
    ("/predict", "POST"),
    ("/tasks/{task}/predict", "POST"),
    ("/classify", "POST"),
    ("/v1/models", "GET"),
    ("/v2/models/{task}/infer", "POST"),
    ("/v2/models/{task}", "GET"),
    ("/v2/models/{task}/ready", "GET"),
    ("/v2", "GET"),
    ("/v2/health/live", "GET"),
    ("/v2/health/ready", "GET"),
    ("/health", "GET"),
    ("/info", "GET"),
    ("/metrics", "GET"),
]


def test_every_operation_is_fuzzed(api: Any) -> None:
    assert {(found.ok().path, found.ok().method.upper()) for found in api.get_all_operations()} == set(_OPERATIONS)


def _fuzz(api: Any, path: str, method: str, mode: GenerationMode, examples: int, repeatable: bool) -> set[int]:
    """The status codes of all replies."""
    statuses = set()

    @settings(max_examples=examples, derandomize=repeatable, deadline=None, suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if "task" in (case.path_parameters or {}) and len(case.path_parameters["task"]) > 1:
            case.path_parameters["task"] = "default"  # otherwise hardly any request would name a known task
        reply = case.call(timeout=60)
        assert reply.status_code not in (500, 503), reply.text
        statuses.add(reply.status_code)
        case.validate_response(reply, checks=_CHECKS)

    ask()
    return statuses


@pytest.mark.parametrize(("path", "method"), _OPERATIONS)
def test_valid_requests_get_the_replies_of_the_openapi_description(api: Any, path: str, method: str) -> None:
    statuses = _fuzz(api, path, method, GenerationMode.POSITIVE, 20 if method == "POST" else 4, True)
    assert 200 in statuses


@pytest.mark.parametrize(("path", "method"), [operation for operation in _OPERATIONS if "POST" in operation])
def test_invalid_requests_get_the_errors_of_the_openapi_description(api: Any, path: str, method: str) -> None:
    assert 422 in _fuzz(api, path, method, GenerationMode.NEGATIVE, 20, True)


@pytest.mark.long
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), [operation for operation in _OPERATIONS if "POST" in operation])
def test_the_openapi_description_holds_in_a_long_fuzz_run(
    api: Any, path: str, method: str, mode: GenerationMode
) -> None:
    _fuzz(api, path, method, mode, 300, False)
