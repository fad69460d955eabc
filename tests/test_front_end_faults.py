"""Cancelled, late and refused requests, and front ends and engines that stop: no other request fails."""

from __future__ import annotations

import asyncio
import threading

import pytest
from front_ends import SECONDS, addresses, attached, classify, engines, front_end, run, stop, until

from revmux.serving import Draining, Expired, Overloaded
from serve_app.errors import Unhealthy, refusal
from serve_app.service import Service

pytestmark = pytest.mark.usefixtures("impatient_front_ends")


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
        async with (
            attached(service) as (front, server),
            front_end(service.config, addresses([server]), "front-2") as two,
        ):
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


def test_a_lost_engine_fails_its_requests_with_503_and_another_one_is_found(
    held: tuple[Service, threading.Event], service: Service
) -> None:
    first, _ = held

    async def main() -> None:
        async with engines(first, service) as [dying, later]:
            known = [dying]

            async with front_end(first.config, addresses(known)) as front:
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

            async with front_end(first.config, addresses(known)) as front:
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
