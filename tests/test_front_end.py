"""A server with front ends gives the same answers, replies, errors and traces as one without, for the same tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch
from front_ends import addresses, attached, classify, engines, run, until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving_http import serving
from serving_models import text

from revmux.errors import EmptyText, TextError, UserError
from revmux.serving import Answer, Draining, Expired, InferenceFailed, Overloaded, UnknownTask
from serve_app.backend import TaskNames
from serve_app.config import TaskConfig
from serve_app.errors import TooLarge, Unhealthy, refusal
from serve_app.front_end import FrontEnd
from serve_app.protocol import RequestOptions
from serve_app.service import Service
from serve_app.tracing import Tracing
from serve_app.web import create_app
from serve_app.wire import pack_error, unpack_error

pytestmark = pytest.mark.usefixtures("impatient_front_ends")

TIMES = {"tokenize_seconds", "queue_seconds", "inference_seconds", "started", "group", "steps", "scores"}


def test_answers_are_equal_to_the_bit_in_both_forms(service: Service) -> None:
    batches: list[list[Any]] = [[text(index)] for index in range(12)]
    batches += [[("w1 w2", "w3")], [text(index) for index in range(5)]]

    async def main() -> None:
        async with attached(service) as (front, _):
            for texts in batches:
                for more in ({"max_multiplex": 1}, {"truncate": True}):
                    names: TaskNames = ["mood", "topic"]
                    here = await service.classify(names, texts, RequestOptions(**more))
                    there = await front.classify(names, texts, RequestOptions(**more))
                    assert [(one.task, list(one.label_names)) for one in there] == [
                        (one.task, list(one.label_names)) for one in here
                    ]
                    for ours, theirs in zip(here, there):
                        for one, other in zip(ours.answers, theirs.answers, strict=True):
                            assert torch.equal(one.scores, other.scores)
                            assert one.scores.dtype == other.scores.dtype
                            assert [list(part) for part in one.ranking or ()] == [*(other.ranking or ())]
                            for field in set(Answer._fields) - TIMES - {"ranking"}:
                                assert getattr(one, field) == getattr(other, field), field

    run(main())


REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/predict", {"inputs": "w1 w2", "task": "mood", "max_multiplex": 1}),
    ("POST", "/predict", {"inputs": [["w1"], ["w2", "w3"]], "tasks": "*", "max_multiplex": 1}),
    ("POST", "/predict", {"inputs": "w1 w2", "task": "mood", "max_multiplex": 1, "raw_scores": True}),
    ("POST", "/tasks/topic/predict", {"inputs": "w1", "parameters": {"top_k": 1, "function_to_apply": "sigmoid"}}),
    ("POST", "/v2/models/mood/infer", {"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": ["w4"]}]}),
    ("POST", "/predict", {"inputs": "w1"}),
    ("POST", "/predict", {"inputs": "w1", "task": "weather"}),
    ("POST", "/predict", {"inputs": "w1", "tasks": ["mood", "weather"]}),
    ("POST", "/predict", {"inputs": "w1", "tasks": ["mood", "mood"]}),
    ("POST", "/predict", {"inputs": "", "task": "mood"}),
    ("POST", "/predict", {"inputs": "w1 " * 200, "task": "mood"}),
    ("POST", "/predict", {"inputs": [["w1"]] * 65, "task": "mood"}),
    ("POST", "/predict", {"inputs": [["w1"]] * 64, "task": "mood", "timeout_ms": 0.0001}),
    ("POST", "/v2/models/weather/infer", {"inputs": []}),
    ("GET", "/health", None),
    ("GET", "/v1/models", None),
    ("GET", "/v2/models/topic", None),
    ("GET", "/v2/models/weather", None),
    ("GET", "/v2/models/topic/ready", None),
    ("GET", "/v2/models/weather/ready", None),
]


def test_http_replies_are_the_same_in_both_forms(service: Service) -> None:
    def shown(reply: httpx.Response) -> tuple[Any, ...]:
        headers = {name: value for name, value in reply.headers.items() if not name.endswith("-time")}
        content = reply.json()
        if reply.status_code == 504:
            content["error"] = content["error"].partition(" after ")[0]
        for model in content.get("data", []) if isinstance(content, dict) else []:
            model.pop("created")
        return reply.status_code, {**headers, "content-length": ""}, content

    async def main() -> None:
        async with attached(service) as (front, _):
            found = []
            for backend in (service, front):
                transport = httpx.ASGITransport(create_app(backend))  # type: ignore[arg-type]
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    found.append([shown(await client.request(way, path, json=body)) for way, path, body in REQUESTS])
                    info = (await client.get("/info")).json()
                    assert info["tasks"]["mood"]["model_type"]["classifier"]["id2label"]["0"] == "LABEL_0"
                    counted = (await client.get("/metrics")).text
                    assert "revmux_http_requests_total" in counted
            for request, here, there in zip(REQUESTS, *found):
                assert here == there, request

    run(main())


def test_a_front_end_traces_requests_down_to_the_steps_of_the_engine(service: Service) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))

    async def main() -> None:
        async with engines(service) as [server]:
            front = FrontEnd(service.config, "front-1", addresses([server]))
            front.tracing = Tracing(provider)
            await front.start()
            transport = httpx.ASGITransport(create_app(front))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"inputs": [["w1"], ["w2"]], "task": "mood", "max_multiplex": 1}
                reply = await client.post("/predict", json=body, headers={"traceparent": f"00-{trace}-{caller}-01"})
            assert reply.headers["traceparent"].startswith(f"00-{trace}-")
            found = {span.name: span for span in spans.get_finished_spans()}
            assert {"POST /predict", "tokenize", "queue", "pass", "plain"} <= found.keys()
            assert {f"{span.context.trace_id:032x}" for span in found.values()} == {trace}
            root, ran = found["POST /predict"], found["pass"]
            assert [span.name for span in spans.get_finished_spans()].count("pass") == 1
            assert ran.attributes["revmux.inputs"] == 2  # type: ignore[index]
            assert root.start_time <= ran.start_time < ran.end_time <= root.end_time  # type: ignore[operator]
            await front.close()

    run(main())


@pytest.mark.parametrize(
    "error",
    [
        *(EmptyText("a"), TextError("b"), UserError("c"), UnknownTask("d", ["e"]), InferenceFailed("f")),
        *(Overloaded("g"), Expired("h"), Draining("i"), Unhealthy("j"), TooLarge("k"), KeyError("secret")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_become_the_same_replies(error: Exception) -> None:
    here, there = refusal(error), refusal(unpack_error(pack_error(error)))
    assert (here.status_code, here.body, here.raw_headers) == (there.status_code, there.body, there.raw_headers)
    assert b"secret" not in there.body


def test_options_arrive_unchanged(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def answer_tasks(*given: Any, **named: Any) -> list[list[Answer]]:
        asked.append((given[0], [task.name for task in given[1]], given[2:], named))
        return [[]]

    async def main() -> None:
        async with attached(service) as (front, _):
            for options in ({}, {"truncate": True, "max_multiplex": 2, "priority": -1.5, "timeout_ms": 30.0}):
                for backend in (service, front):
                    await backend.classify(["mood"], ["w1", ("w2", "w3")], RequestOptions(**options))

    monkeypatch.setattr(service.engine, "answer_tasks", answer_tasks)
    run(main())
    assert asked[0] == asked[1]
    assert asked[2] == asked[3] != asked[0]


def test_front_ends_know_at_once_which_tasks_are_served(serving_tasks: dict[str, Any]) -> None:
    mood, topic = (TaskConfig.model_validate(serving_tasks[task]) for task in ("mood", "topic"))
    told: list[list[str]] = []

    async def main() -> None:
        with serving(serving_tasks["mood"]) as service:
            async with engines(service) as [server]:
                service.tasks.on_loaded = server.announce_tasks
                front = FrontEnd(service.config, "front-1", addresses([server]), on_tasks=told.append)
                await front.start()
                assert len(await classify(front, [None], ["w1"])) == 1
                await asyncio.to_thread(service.serve, {"default": mood, "second": topic})
                assert len(await classify(front, ["second"], ["w1"])) == 1  # even before the front end was told
                await until(lambda: front.task_names == ["default", "second"])
                with pytest.raises(UnknownTask, match="no task is named; known tasks: default, second"):
                    await classify(front, [None], ["w1"])
                assert len(await classify(front, "*", ["w1"])) == 2
                await front.close()

    run(main())
    assert told == [["default"], ["default", "second"]]
