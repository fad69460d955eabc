"""Replicas report their tasks to Serve, and work on where a version of Ray lacks the parts that this takes."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray.serve.context
from ray import serve

from serve_app import held_tasks
from serve_app.held_tasks import report_held_tasks


class Client:
    def __init__(self) -> None:
        self.reported: list[Any] = []

    def record_request_routing_info(self, info: Any) -> None:
        self.reported.append(info)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """Serve's client, in a replica."""
    made = Client()
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(replica_id="replica"))
    monkeypatch.setattr(ray.serve.context, "_get_global_client", lambda: made)
    held_tasks._warn_once.cache_clear()
    return made


def test_a_replica_reports_its_tasks(client: Client) -> None:
    report_held_tasks(["mood", "topic"])
    [info] = client.reported
    assert (info.replica_id, info.multiplexed_model_ids) == ("replica", ["mood", "topic"])


@pytest.mark.parametrize("missing", ["message", "client", "method", "controller"])
def test_a_ray_without_the_mechanism_costs_one_warning(
    client: Client, missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_controller() -> None:
        raise RuntimeError("there is no controller")

    if missing == "message":
        monkeypatch.setitem(sys.modules, "ray.serve._private.common", None)
    elif missing == "client":
        monkeypatch.delattr(ray.serve.context, "_get_global_client")
    elif missing == "method":
        monkeypatch.delattr(Client, "record_request_routing_info")
    else:
        monkeypatch.setattr(ray.serve.context, "_get_global_client", no_controller)
    with caplog.at_level(logging.WARNING):
        for names in (["mood"], ["mood", "topic"]):
            report_held_tasks(names)
    [warning] = caplog.messages
    assert "cannot report the loaded tasks to Serve" in warning
    assert client.reported == []
