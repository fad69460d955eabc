"""Traces of classification requests for OpenTelemetry, configured by the variables ``OTEL_…`` of its specification.

A request is one span, which continues the trace of its header ``traceparent``. Its children are ``tokenize``, and for
each forward pass that answered inputs of the request ``queue`` and ``pass``. The children of a pass are its steps, with
the names of :mod:`revmux.serving.forward`; ``resume`` is the fallback. The engine measures steps in any case, so spans
are made from its answers, after the reply.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from time import perf_counter, time_ns

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

import revmux
from revmux.errors import UserError
from revmux.serving import Answer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class Tracing:
    """Makes the spans of requests.

    Args:
        provider: exports them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("revmux", revmux.__version__)

    @contextmanager
    def request(self, scope: Scope, route: str) -> Iterator[RequestTrace]:
        """Trace the request that is answered inside the context.

        Args:
            scope: the request, in ASGI's form.
            route: the pattern of its path.
        """
        parent = propagate.extract(Headers(scope=scope))
        attributes = {"http.request.method": scope["method"], "http.route": route, "url.path": scope["path"]}
        span = self.tracer.start_span(f"{scope['method']} {route}", parent, SpanKind.SERVER, attributes)
        traced = RequestTrace(self.tracer, span)
        try:
            yield traced
        finally:
            traced.end()

    def close(self) -> None:
        """Export the remaining spans."""
        self.provider.shutdown()


class RequestTrace:
    """The trace of one request.

    Args:
        tracer: makes the spans.
        span: the span of the whole request.
    """

    def __init__(self, tracer: trace.Tracer, span: Span) -> None:
        self.tracer = tracer
        self.span = span
        self.answers: Sequence[Answer] = ()
        self.status: int | None = None
        self._context = trace.set_span_in_context(span)
        self._epoch = time_ns() - int(perf_counter() * 1e9)  # of the clock of the engine's times

    def replied(self, reply: Response, answers: Sequence[Answer]) -> None:
        """Name the trace in the headers of the reply, before it is sent.

        Args:
            reply: the reply.
            answers: the answers in it; none if the request was refused.
        """
        self.status, self.answers = reply.status_code, answers
        propagate.inject(reply.headers, self._context)

    def end(self) -> None:
        """End the span, and make those of the passes."""
        if self.span.is_recording():
            if self.status is None or self.status >= 500:
                self.span.set_status(Status(StatusCode.ERROR))
            if self.status is not None:
                self.span.set_attribute("http.response.status_code", self.status)
            self.span.set_attribute("revmux.inputs", len(self.answers))
            self._add_passes()
        self.span.end()

    def _add_passes(self) -> None:
        passes: defaultdict[float, list[Answer]] = defaultdict(list)  # by their start
        for answer in self.answers:
            passes[answer.started].append(answer)
        if passes:
            queued = min(answer.started - answer.queue_seconds for answer in self.answers)
            # Texts of several requests are tokenized together, so this is the request's share, just before the queue.
            self._add(
                "tokenize", self._context, queued - sum(answer.tokenize_seconds for answer in self.answers), queued
            )
        for started, answers in passes.items():
            self._add("queue", self._context, started - max(answer.queue_seconds for answer in answers), started)
            self._add_pass(started, answers)

    def _add_pass(self, started: float, answers: Sequence[Answer]) -> None:
        attributes: dict[str, AttributeValue] = {
            "revmux.inputs": len(answers),
            "revmux.fell_back": sum(answer.fell_back for answer in answers),
            "revmux.widths": sorted({answer.width for answer in answers}),
            "revmux.methods": sorted({answer.method for answer in answers}),
            "revmux.stages": sorted({answer.stage for answer in answers}),
        }
        span = self.tracer.start_span("pass", self._context, attributes=attributes, start_time=self._at(started))
        context = trace.set_span_in_context(span)
        # A step that ran several times, such as once per stage of a ladder, is one span with the time of all.
        begin = started
        for step, seconds in answers[0].steps.items():
            self._add(step, context, begin, begin + seconds)
            begin += seconds
        span.end(self._at(started + answers[0].inference_seconds))

    def _add(self, name: str, parent: Context, begin: float, end: float) -> None:
        self.tracer.start_span(name, parent, start_time=self._at(begin)).end(self._at(end))

    def _at(self, seconds: float) -> int:
        """The time of the engine's clock in nanoseconds since 1970."""
        return self._epoch + int(seconds * 1e9)


def tracing_from_environment(replica: str) -> Tracing | None:
    """Return the tracing that the environment configures, or None.

    Tracing is on if ``OTEL_TRACES_EXPORTER`` names exporters, or if an OTLP endpoint is set. The SDK itself reads the
    other variables: samplers, propagators, limits, batches, headers and certificates.

    Args:
        replica: name of this replica.

    Raises:
        UserError: an exporter is not installed.
    """
    names = _exporters()
    if not names:
        return None
    own = {"service.name": "revmux", "service.version": revmux.__version__, "service.instance.id": replica}
    provider = TracerProvider(resource=Resource.create(own).merge(OTELResourceDetector().detect()))
    for name in names:
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise UserError(
                f"tracing needs the exporter {name!r} (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_PROTOCOL), which is not "
                "installed; run: pip install 'revmux[tracing]' for OTLP over HTTP, or set OTEL_TRACES_EXPORTER=none"
            )
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    return Tracing(provider)


def _exporters() -> list[str]:
    """The names of the exporters' entry points."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    named = os.environ.get("OTEL_TRACES_EXPORTER", "")
    names = [name.strip() for name in named.split(",") if name.strip()]
    if not names and any(os.environ.get(endpoint) for endpoint in _ENDPOINTS):
        names = ["otlp"]
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = _PROTOCOLS.get(protocol or "http/protobuf", f"otlp over {protocol}")
    return [otlp if name == "otlp" else name for name in names if name != "none"]
