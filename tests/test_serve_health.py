"""The health check of a replica: it asks the next task, and distinguishes a long pass from a stuck model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving_http import USUAL, held_in_a_pass, serving

from serve_app.config import AppConfig
from serve_app.errors import Unhealthy
from serve_app.service import Service


@pytest.fixture(scope="module")
def service(serving_tasks: dict[str, Any]) -> Iterator[Service]:
    with serving({"tasks": serving_tasks, **USUAL}, "r1") as made:
        yield made


@pytest.fixture
def held(serving_tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, threading.Event]]:
    monkeypatch.setattr("serve_app.service.PROBE_SECONDS", 0.05)
    with held_in_a_pass(serving_tasks["mood"]) as found:
        yield found


def test_each_health_check_asks_the_next_task(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    original = service.engine.probe
    monkeypatch.setattr(service.engine, "probe", lambda task: asked.append(task) or original(task))
    for _ in range(4):
        asyncio.run(service.probe())
    assert asked[:2] == asked[2:]
    assert set(asked) == {"mood", "topic"}
    monkeypatch.setattr(service.engine.task("topic").backbone, "embed", lambda _: 1 / 0)
    failures = 0
    for _ in range(2):
        try:
            asyncio.run(service.probe())
        except Unhealthy:
            failures += 1
    assert failures == 1
    with pytest.raises(Unhealthy, match="the model of task 'topic' does not answer"):
        asyncio.run(service.probe("topic"))


def test_a_model_in_a_long_pass_is_healthy(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held
    asyncio.run(service.probe())
    go_on.set()
    asyncio.run(service.probe())
    assert service.engine.silent_seconds < service.config.stuck_seconds


def test_a_stuck_model_is_unhealthy(held: tuple[Service, threading.Event]) -> None:
    service, go_on = held
    service.config = service.config.model_copy(update={"stuck_seconds": 0.01})
    with pytest.raises(Unhealthy, match="neither begun nor ended a pass"):
        asyncio.run(service.probe())
    go_on.set()
    assert service.engine.probe().result(60)
    asyncio.run(service.probe())


def test_a_model_whose_thread_has_ended_is_unhealthy_at_once(
    serving_tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AppConfig.model_validate(serving_tasks["mood"])
    service = Service(config)
    service.serve(config.served)
    thread = service.engine._worker._thread
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(service.engine._queue, "charge", lambda *_: 1 / 0)  # a bug in our code that no pass would catch
    assert service.engine.submit(["w1"])[0].result(60)
    thread.join(60)
    with pytest.raises(Unhealthy, match="thread has ended"):
        asyncio.run(service.probe())
    service.close()
