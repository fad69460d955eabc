"""The life of a request in the engine: queued, cancelled, refused, or answered when the engine closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from serving_models import text

from revmux.errors import TextError
from revmux.serving import Draining, Engine, Overloaded

pytestmark = pytest.mark.numeric


def test_cancelled_requests_leave_the_queue_and_are_not_computed(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_queue=4)
    futures = [engine.submit([text(index)])[0] for index in range(4)]
    assert futures[1].cancel()
    assert futures[2].cancel()
    futures += engine.submit(["w1", "w2"])  # their places are free at once
    engine.start()
    assert all(future.result(60) for future in futures if not future.cancelled())
    assert sum(engine.stats()["inputs"].values()) == 4
    assert engine.stats()["cancelled"] == 2


def test_a_full_queue_refuses_the_whole_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_queue=5)
    kept = engine.submit(["w1", "w2", "w3"])
    with pytest.raises(Overloaded, match="the limit is 5"):
        engine.submit(["w4", "w5", "w6"])
    kept += engine.submit(["w4", "w5"])
    engine.start()
    assert [future.result(60).scores.shape for future in kept] == [(3,)] * 5
    assert engine.stats()["rejected"] == 3


def test_closing_answers_waiting_requests_and_refuses_new_ones(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    futures = engine.submit([text(index) for index in range(9)])
    engine.start()
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert not engine.alive
    with pytest.raises(Draining):
        engine.submit(["w1"])
    with pytest.raises(Draining):
        engine.probe()


def test_closing_an_engine_that_never_ran_fails_waiting_requests(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    future = engine.submit(["w1"])[0]
    engine.close()
    assert isinstance(future.exception(), Draining)


def test_a_probe_runs_ahead_of_a_full_queue(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine([], max_queue=3, max_batch=1)
    futures = engine.submit(["w1", "w2", "w3"])
    order: list[str] = []
    futures[0].add_done_callback(lambda future: order.append("first"))
    probe = engine.probe()
    assert engine.probe() is probe
    probe.add_done_callback(lambda future: order.append("probe"))
    engine.start()
    engine.close()
    assert order == ["probe", "first"]


def test_answering_does_not_block_the_event_loop_and_a_cancelled_call_is_not_computed(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()

    async def scenario() -> None:
        abandoned = asyncio.create_task(engine.answer(["w1", "w2"]))
        while engine.stats()["waiting"] < 2:
            await asyncio.sleep(0)
        abandoned.cancel()
        with pytest.raises(asyncio.CancelledError):
            await abandoned
        while engine.stats()["waiting"]:
            await asyncio.sleep(0)
        engine.start()
        answers = await asyncio.gather(*(engine.answer([text(index), text(index + 1)]) for index in range(20)))
        assert [len(found) for found in answers] == [2] * 20
        with pytest.raises(TextError):
            await engine.answer(["w1", ""])

    asyncio.run(scenario())
    assert sum(engine.stats()["inputs"].values()) == 40


def test_the_model_uses_as_many_threads_as_the_thread_that_built_the_engine(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    former, used = torch.get_num_threads(), []
    torch.set_num_threads(former + 2)
    try:
        engine = make_engine()
        forward = type(engine.task().backbone).forward
        monkeypatch.setattr(
            type(engine.task().backbone),
            "forward",
            lambda self, tokens: used.append(torch.get_num_threads()) or forward(self, tokens),
        )
        engine.start()
        engine.submit(["w1"])[0].result(60)
    finally:
        torch.set_num_threads(former)
    assert set(used) == {former + 2}
