"""Hostile, large and slow bodies: each is refused with JSON, and the server keeps running."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving_http import HOSTILE, USUAL, listening, post, serving, talk

from serve_app.web import create_app


@pytest.fixture(scope="module")
def url(serving_tasks: dict[str, Any]) -> Iterator[str]:
    with serving({"tasks": serving_tasks, **USUAL}) as service, listening(create_app(service)) as base:
        yield base


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_a_json_error_and_the_server_keeps_running(url: str, name: str) -> None:
    body, status = HOSTILE[name]
    reply = httpx.post(f"{url}/tasks/mood/predict", content=body, timeout=60)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    if status != 200:
        assert set(reply.json()) == {"error", "error_type"}
        assert len(reply.text) < 1000
    assert post(f"{url}/tasks/mood/predict", {"inputs": "w1"}).status_code == 200


def test_a_declared_length_above_the_limit_is_refused_without_reading_the_body(url: str) -> None:
    reply = talk(url, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_is_limited_too(url: str) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    reply = talk(url, head, *[b"4000\r\n" + b"w" * 0x4000 + b"\r\n"] * 10)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b'"error_type":"too_large"' in reply


def test_a_slow_body_is_refused_and_its_connection_closed(url: str) -> None:
    never = threading.Event()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
    reply = talk(url, head, *[b"w"] * 30, pause=never)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in reply.lower()
    assert b'"error_type":"timeout"' in reply


def test_bodies_are_parsed_as_json_whatever_their_content_type(url: str) -> None:
    body = json.dumps({"inputs": "w1", "task": "mood"})
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        assert httpx.post(f"{url}/predict", content=body, headers={"content-type": kind}).status_code == 200
