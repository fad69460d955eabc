"""Traces of requests: their spans, the headers that join them to other traces, and the variables that configure them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from serving_http import listening
from serving_models import load, text, write_adapter, write_model

from revmux.errors import UserError
from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.tracing import Tracing
from serve_app.web import create_app

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, spans: InMemorySpanExporter) -> Iterator[str]:
    """A server whose groups always fall back to the plain model."""
    folder = tmp_path_factory.mktemp("model")
    model = write_model(folder)
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), load(model), 2)
    config = AppConfig.model_validate(
        {"model": str(model), "adapters": [str(adapter)], "threshold": 1.0, "plain_load": 1}
    )
    service = Service(config)
    assert service.tracing is None, "tracing is off by default"
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    service.tracing = Tracing(provider)
    service.serve(config.served)
    with listening(create_app(service)) as base:
        yield base
    service.close()


def ask(url: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/predict", json=body, headers=headers, timeout=60)


def take(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The finished spans by name, which are then forgotten."""
    found = {span.name: span for span in spans.get_finished_spans()}
    assert len(found) == len(spans.get_finished_spans())
    spans.clear()
    return found


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_continues_its_callers_trace_down_to_the_steps_of_its_pass(
    url: str, spans: InMemorySpanExporter
) -> None:
    body = {"inputs": [[text(index)] for index in range(4)]}
    reply = ask(url, body, traceparent=f"00-{TRACE}-{CALLER}-01")
    found = take(spans)
    assert found.keys() == {
        *("POST /predict", "tokenize", "queue", "pass"),
        *("pad", "prefill", "multiplex", "upper", "head", "resume", "reply"),
    }
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    root, ran = found["POST /predict"], found["pass"]
    assert reply.headers["traceparent"] == f"00-{TRACE}-{root.context.span_id:016x}-01"
    assert f"{root.parent.span_id:016x}" == CALLER  # type: ignore[union-attr]
    parents = {name: span.parent.span_id for name, span in found.items() if span.parent is not None}
    assert {name for name, parent in parents.items() if parent == root.context.span_id} == {"tokenize", "queue", "pass"}
    steps = [name for name, parent in parents.items() if parent == ran.context.span_id]
    assert len(steps) == 7
    assert root.attributes["http.route"] == "/predict"  # type: ignore[index]
    assert root.attributes["http.response.status_code"] == 200  # type: ignore[index]
    assert dict(ran.attributes or {}) == {
        "revmux.inputs": 4,
        "revmux.fell_back": 4,
        "revmux.widths": (2,),
        "revmux.methods": ("token-split",),
        "revmux.stages": (0,),
    }
    assert root.start_time <= found["queue"].start_time <= found["queue"].end_time  # type: ignore[operator]
    assert found["queue"].end_time == ran.start_time
    assert ran.end_time <= root.end_time  # type: ignore[operator]
    assert all(ran.start_time <= found[step].start_time < found[step].end_time for step in steps)  # type: ignore[operator]
    assert sum(seconds(found[step]) for step in steps) <= seconds(ran) + 1e-6
    assert seconds(ran) == pytest.approx(float(reply.headers["x-inference-time"]) / 1000, abs=1e-4)
    assert seconds(found["queue"]) == pytest.approx(float(reply.headers["x-queue-time"]) / 1000, abs=1e-4)


def test_a_request_without_a_caller_begins_a_trace(url: str, spans: InMemorySpanExporter) -> None:
    for traceparent in ({}, {"traceparent": "00-not-a-trace"}):
        reply = ask(url, {"inputs": "w1", "max_multiplex": 1}, **traceparent)
        found = take(spans)
        root = found["POST /predict"]
        assert root.parent is None
        assert f"{root.context.trace_id:032x}" == reply.headers["traceparent"].split("-")[1] != TRACE
        assert "plain" in found


def test_a_caller_that_does_not_sample_gets_no_spans_but_its_trace_goes_on(
    url: str, spans: InMemorySpanExporter
) -> None:
    reply = ask(url, {"inputs": "w1"}, traceparent=f"00-{TRACE}-{CALLER}-00")
    assert reply.headers["traceparent"].split("-")[1] == TRACE
    assert reply.headers["traceparent"].endswith("-00")
    assert not take(spans)


def test_a_refused_request_is_one_span(url: str, spans: InMemorySpanExporter) -> None:
    assert ask(url, {"inputs": 7}).status_code == 422
    (root,) = take(spans).values()
    assert root.attributes["http.response.status_code"] == 422  # type: ignore[index]
    assert root.status.status_code is StatusCode.UNSET  # the client is at fault


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP collector on this machine: its URL, and what it received."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            assert "Content-Encoding" not in self.headers
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


def test_an_endpoint_in_the_environment_turns_tracing_on(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", where)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "moderation")
    service = Service(AppConfig(model="not-loaded"), "replica-1")
    with listening(create_app(service)) as url:
        assert ask(url, {"inputs": "w1"}).status_code == 404  # no task is loaded
    service.close()
    (found,) = [part for request in received for part in request.resource_spans]
    resource = {pair.key: pair.value.string_value for pair in found.resource.attributes}
    assert resource["service.name"] == "moderation"
    assert resource["service.instance.id"] == "replica-1"
    assert [span.name for scope in found.scope_spans for span in scope.spans] == ["POST /predict"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "console"},
    ],
)
def test_tracing_is_off_without_an_exporter(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    service = Service(AppConfig(model="not-loaded"))
    assert service.tracing is None
    service.close()


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaegr"}, "'jaegr'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"},
            "'otlp over carrier-pigeon'",
        ),
    ],
)
def test_an_exporter_that_is_not_installed_is_refused(
    variables: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"tracing needs the exporter {missing}.*pip install 'revmux\[tracing\]'"):
        Service(AppConfig(model="not-loaded"))
