"""The connection between a front end and its engine: frames and their limit, the secret, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
from front_ends import attached, classify, engines, run, until
from serving_models import text

import serve_app.wire
from serve_app.engine_link import EngineLink
from serve_app.errors import TooLarge, Unhealthy
from serve_app.service import Service
from serve_app.wire import in_frames

pytestmark = pytest.mark.usefixtures("impatient_front_ends")


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
