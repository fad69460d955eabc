"""Front ends and engines in one process, over real sockets: the same answers and errors as without, and no lost request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import pytest
import torch
import uvloop
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError
from serving_http import USUAL, held_in_a_pass, serving
from serving_models import text

import serve_app.front_end
import serve_app.wire
from revmux.errors import EmptyText, TextError, UserError
from revmux.serving import Answer, Draining, Expired, InferenceFailed, Overloaded, UnknownTask
from serve_app.backend import Backend, TaskNames
from serve_app.config import AppConfig, TaskConfig
from serve_app.engine_link import EngineLink
from serve_app.engine_server import EngineServer
from serve_app.errors import TooLarge, Unhealthy, refusal
from serve_app.front_end import FrontEnd
from serve_app.interface import replica_interface
from serve_app.protocol import RequestOptions
from serve_app.service import Service
from serve_app.tracing import Tracing
from serve_app.web import create_app
from serve_app.wire import Address, in_frames, pack_error, unpack_error

T = TypeVar("T")
SECONDS = 60
TIMES = {"tokenize_seconds", "queue_seconds", "inference_seconds", "started", "group", "steps", "scores"}


@pytest.fixture(scope="module")
def service(serving_tasks: dict[str, Any]) -> Iterator[Service]:
    with serving({"tasks": serving_tasks, **USUAL}, "engine-1") as made:
        yield made


@pytest.fixture
def held(serving_tasks: dict[str, Any]) -> Iterator[tuple[Service, threading.Event]]:
    with held_in_a_pass({**serving_tasks["mood"], "max_queue": 40, "max_texts": 32}) as found:
        yield found


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app.front_end, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(serve_app.front_end, "BALANCE_SECONDS", 0.02)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in the event loop of Serve's replicas, which differs from Python's own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main, SECONDS))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@asynccontextmanager
async def engines(*services: Service) -> AsyncIterator[list[EngineServer]]:
    """Engines with these services, named engine-0, engine-1 and so on."""
    servers = [EngineServer(service, "127.0.0.1", "127.0.0.1") for service in services]
    for server in servers:
        await server.start()
    try:
        yield servers
    finally:
        for server in servers:
            stop(server)


def stop(server: EngineServer) -> None:
    """End all that an engine's process holds, as its death would."""
    assert server._server is not None
    server._server.close()
    for session in list(server.sessions):
        session.connection.abort()


@asynccontextmanager
async def front_end(
    config: AppConfig, find: Callable[[], Awaitable[list[Address]]], name: str = "front-1"
) -> AsyncIterator[FrontEnd]:
    made = FrontEnd(config, name, find)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def attached(service: Service) -> AsyncIterator[tuple[FrontEnd, EngineServer]]:
    async with engines(service) as [server], front_end(service.config, addresses(server)) as made:
        yield made, server


def addresses(*servers: EngineServer) -> Callable[[], Awaitable[list[Address]]]:
    async def find() -> list[Address]:
        return [
            server.address()._replace(engine=f"engine-{number}")
            for number, server in enumerate(servers)
            if server._server is not None and server._server.is_serving()
        ]

    return find


async def classify(backend: Backend, names: TaskNames, texts: list[Any], **options: Any) -> list[list[Answer]]:
    found = await (await backend.find(names))(texts, RequestOptions(**options))
    return [one.answers for one in found]


def test_answers_are_equal_to_the_bit_in_both_forms(service: Service) -> None:
    batches: list[list[Any]] = [[text(index)] for index in range(12)]
    batches += [[("w1 w2", "w3")], [text(index) for index in range(5)]]

    async def main() -> None:
        async with attached(service) as (front, _):
            for texts in batches:
                for more in ({"max_multiplex": 1}, {"truncate": True}):
                    names: TaskNames = ["mood", "topic"]
                    here = await (await service.find(names))(texts, RequestOptions(**more))
                    there = await (await front.find(names))(texts, RequestOptions(**more))
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
            front = FrontEnd(service.config, "front-1", addresses(server))
            front.tracing = Tracing(provider)
            await front.start()
            transport = httpx.ASGITransport(create_app(front))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"inputs": "w1", "task": "mood", "max_multiplex": 1}
                reply = await client.post("/predict", json=body, headers={"traceparent": f"00-{trace}-{caller}-01"})
            assert reply.headers["traceparent"].startswith(f"00-{trace}-")
            found = {span.name: span for span in spans.get_finished_spans()}
            assert {"POST /predict", "tokenize", "queue", "pass", "plain"} <= found.keys()
            assert {f"{span.context.trace_id:032x}" for span in found.values()} == {trace}
            root, ran = found["POST /predict"], found["pass"]
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


def test_what_is_asked_at_the_same_time_is_in_one_frame(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held

    async def main() -> None:
        async with attached(service) as (front, _):
            assert front._link is not None
            asked = front._link.connection.frames_sent
            waiting = [asyncio.create_task(classify(front, [None], [text(index)])) for index in range(20)]
            await until(lambda: service.engine.stats()["waiting"] == 20)
            assert front._link.connection.frames_sent == asked + 1
            go_on.set()
            await asyncio.gather(*waiting)

    run(main())


def test_frames_stay_below_their_limit() -> None:
    messages = [b'{"a":%d}' % number for number in range(50)]
    frames = list(in_frames(messages, 100))
    assert all(len(frame) <= 104 for frame in frames)
    assert 3 < len(frames) < 10
    assert b"".join(frame[5:-1] + b"," for frame in frames) == b",".join(messages) + b","


def test_a_cancelled_request_leaves_the_queue(held: tuple[Service, threading.Event]) -> None:
    service, _ = held

    async def main() -> None:
        async with attached(service) as (front, server):
            task = asyncio.create_task(classify(front, [None], ["w1", "w2"]))
            await until(lambda: service.engine.stats()["waiting"] == 2)
            task.cancel()
            await until(lambda: service.engine.stats()["waiting"] == 0)
            assert service.engine.stats()["cancelled"] == 2
            [session] = server.sessions
            await until(lambda: not session.running)

    run(main())


def test_a_front_end_that_dies_takes_its_own_requests_along(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held

    async def main() -> None:
        async with attached(service) as (front, server), front_end(service.config, addresses(server), "front-2") as two:
            others = asyncio.create_task(classify(two, [None], ["w3"]))
            task = asyncio.create_task(classify(front, [None], ["w1", "w2"]))
            await until(lambda: service.engine.stats()["waiting"] == 3)
            assert front._link is not None
            front._link.connection.abort()
            await until(lambda: service.engine.stats()["waiting"] == 1)
            with pytest.raises(Unhealthy):
                await task
            go_on.set()
            assert len(await others) == 1
            await until(lambda: front.engine is not None)  # it finds the engine again
            assert len(await classify(front, [None], ["w1"])) == 1

    run(main())


def test_deadlines_and_a_full_queue_refuse_requests_of_front_ends(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held

    async def main() -> None:
        async with attached(service) as (front, _):
            late = asyncio.create_task(classify(front, [None], ["w1"], timeout_ms=0.0001))
            rest = asyncio.create_task(classify(front, [None], ["w4"] * 32))
            await until(lambda: service.engine.stats()["waiting"] == 33)
            with pytest.raises(Overloaded, match="the limit is 40"):
                await classify(front, [None], ["w4"] * 8)
            go_on.set()
            with pytest.raises(Expired):
                await late
            assert len((await rest)[0]) == 32

    run(main())


def test_options_arrive_unchanged(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def answer_tasks(*given: Any, **named: Any) -> list[list[Answer]]:
        asked.append((given[0], [task.name for task in given[1]], given[2:], named))
        return [[]]

    async def main() -> None:
        async with attached(service) as (front, _):
            for options in ({}, {"truncate": True, "max_multiplex": 2, "priority": -1.5, "timeout_ms": 30.0}):
                for backend in (service, front):
                    await (await backend.find(["mood"]))(["w1", ("w2", "w3")], RequestOptions(**options))

    monkeypatch.setattr(service.engine, "answer_tasks", answer_tasks)
    run(main())
    assert asked[0] == asked[1]
    assert asked[2] == asked[3] != asked[0]


def test_an_unknown_secret_and_what_is_no_frame_are_refused(service: Service) -> None:
    async def main() -> None:
        async with engines(service) as [server]:
            address = server.address()
            for wrong in ("", "guess", "é" * 64):
                with pytest.raises(Unhealthy, match="closed"):
                    await EngineLink.open(address._replace(secret=wrong), "front-1", False, lambda _: None)
            for bad in (
                b"GET / HTTP/1.1\r\n\r\n",
                (2**20).to_bytes(4, "big"),
                b"\0\0\0\2{}",
                b"\0\0\0\3[1]",
                b"\0\0\0\0",
            ):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(bad)
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
            assert not server.sessions
            assert (await EngineLink.open(address, "front-1", False, lambda _: None)).connection.is_open

    run(main())


def test_a_silent_connection_is_closed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine_server.HELLO_SECONDS", 0.05)

    async def main() -> None:
        async with engines(service) as [server]:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.address().port)
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()

    run(main())


def test_a_message_that_fits_into_no_frame_is_refused_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with attached(service) as (front, _):
            monkeypatch.setattr(serve_app.wire, "FRAME_BYTES", 2_000)
            other = asyncio.create_task(classify(front, ["mood"], ["w1"]))
            with pytest.raises(TooLarge, match="fewer or shorter texts"):
                await classify(front, ["mood"], ["w1 " * 1000])
            with pytest.raises(TooLarge, match="fewer or shorter texts"):  # the reply is larger than the request
                await classify(front, ["mood"], ["w1"] * 60)
            assert len(await other) == 1

    run(main())


def test_a_lost_engine_fails_its_requests_with_503_and_another_one_is_found(
    held: tuple[Service, threading.Event], service: Service
) -> None:
    first, _ = held

    async def main() -> None:
        async with engines(first, service) as [dying, later]:
            known = [dying]

            async def find() -> list[Address]:
                return await addresses(*known)()

            async with front_end(first.config, find) as front:
                task = asyncio.create_task(classify(front, [None], ["w1"]))
                await until(lambda: first.engine.stats()["waiting"] == 1)
                stop(dying)
                with pytest.raises(Unhealthy, match="retry"):
                    await task
                assert refusal(Unhealthy()).headers["retry-after"]
                assert front.engine is None
                with pytest.raises(Unhealthy, match="lost its engine"):
                    await front.probe()
                with pytest.raises(Unhealthy, match="lost its engine"):
                    await classify(front, [None], ["w1"])
                known.append(later)
                await until(lambda: front.engine is not None)
                await front.probe()
                assert front.task_names == ["mood", "topic"]
                assert len(await classify(front, ["topic"], ["w1"])) == 1

    run(main())


def test_a_draining_engine_answers_what_it_holds_while_its_front_end_goes_to_another(
    held: tuple[Service, threading.Event], service: Service
) -> None:
    first, go_on = held

    async def main() -> None:
        async with engines(first, service) as [stopping, other]:
            known = [stopping]

            async def find() -> list[Address]:
                return await addresses(*known)()

            async with front_end(first.config, find) as front:
                task = asyncio.create_task(classify(front, [None], ["w1"]))
                await until(lambda: first.engine.stats()["waiting"] == 1)
                known.append(other)
                draining = asyncio.create_task(stopping.drain(SECONDS))
                await until(lambda: len(other.sessions) == 1)
                assert len(await classify(front, ["topic"], ["w2"])) == 1  # only the other engine has this task
                assert not draining.done()
                go_on.set()
                assert len(await task) == 1
                await draining
                await until(lambda: not stopping.sessions)

    run(main())


def test_a_draining_engine_goes_on_answering_while_there_is_no_other_until_its_time_is_over(service: Service) -> None:
    async def main() -> None:
        async with attached(service) as (front, server):
            draining = asyncio.create_task(server.drain(SECONDS))
            await until(lambda: front._link is not None and front._link.is_draining)
            assert len(await classify(front, ["mood"], ["w1"])) == 1
            draining.cancel()
            await server.drain(0)
            with pytest.raises((Unhealthy, Draining)):
                await classify(front, ["mood"], ["w1"])

    run(main())


def test_front_ends_spread_over_the_engines(service: Service) -> None:
    config = service.config.model_copy(update={"front_ends": 2})

    async def main() -> None:
        async with engines(service, service) as [first, second]:
            known = [first]

            async def find() -> list[Address]:
                return await addresses(*known)()

            made = [FrontEnd(config, f"front-{number}", find) for number in range(4)]
            await asyncio.gather(*(one.start() for one in made))
            assert len(first.sessions) == 4
            known.append(second)
            await until(lambda: len(first.sessions) == len(second.sessions) == 2)
            assert sorted(first.address().front_ends + second.address().front_ends) == [one.replica for one in made]
            for one in made:
                await one.close()

    run(main())


def test_a_front_end_prefers_engines_that_lack_front_ends_and_then_its_own_machine() -> None:
    front = FrontEnd.__new__(FrontEnd)
    front.config, front._node = AppConfig(model="m", front_ends=2), "here"

    def engine(name: str, node: str, *names: str) -> Address:
        return Address(name, node, "", 0, "", 1, names, False)

    found = [
        engine("full here", "here", "a", "b"),
        engine("away", "there"),
        engine("here", "here", "c"),
        engine("away, busier", "there", "d"),
    ]
    chosen = [one.engine for one in sorted(found, key=front._preference)]
    assert chosen == ["here", "away", "away, busier", "full here"]


def test_front_ends_know_at_once_which_tasks_are_served(serving_tasks: dict[str, Any]) -> None:
    mood, topic = (TaskConfig.model_validate(serving_tasks[task]) for task in ("mood", "topic"))
    told: list[list[str]] = []

    async def main() -> None:
        with serving(serving_tasks["mood"]) as service:
            async with engines(service) as [server]:
                service.tasks.on_loaded = server.announce_tasks
                front = FrontEnd(service.config, "front-1", addresses(server), on_tasks=told.append)
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


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", ("127.0.0.1", "127.0.0.1")),
        ("10.0.0.7", ("10.0.0.7", "10.0.0.7")),
        ("0.0.0.0", ("0.0.0.0", "10.0.0.5")),
        (None, ("10.0.0.5", "10.0.0.5")),
    ],
)
def test_engines_listen_where_the_http_servers_of_replicas_do(
    monkeypatch: pytest.MonkeyPatch, host: str | None, found: tuple[str, str]
) -> None:
    """None stands for a version of Ray that does not tell."""
    client = None if host is None else SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.5")
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    assert replica_interface() == found


@pytest.mark.parametrize("number", [0, -1, 1.5, "many"])
def test_the_number_of_front_ends_is_checked(number: Any) -> None:
    with pytest.raises(ValidationError, match="front_ends"):
        AppConfig.model_validate({"model": "m", "front_ends": number})


def test_front_ends_and_autoscaling_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="set front_ends to 1, or num_replicas instead of autoscaling"):
        AppConfig.model_validate({"model": "m", "front_ends": 2, "autoscaling": {"max_replicas": 2}})
