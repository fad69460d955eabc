"""Front ends with an engine on a real Ray Serve, and what happens when one of them dies."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from polling import wait_until
from serving_cluster import Cluster, Load, answers, deployed, kill_replica, replicas, update_under_load
from serving_http import figures, post

pytestmark = pytest.mark.cluster("serve")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One engine with two front ends."""
    with deployed("haproxy", tmp_path_factory, engines=1, front_ends=2) as found:
        yield found


def test_front_ends_answer_with_the_model_of_their_engine(cluster: Cluster) -> None:
    wait_until(cluster.complete)
    with Load(cluster) as clients:
        clients.wait_for(200)
    clients.check()
    assert set(clients.statuses) == {200}
    info = httpx.get(f"{cluster.url}/info", timeout=60).json()
    assert info["front_ends"] == 2
    assert info["front_end"] != info["replica"]["name"]
    assert post(f"{cluster.url}/predict", {"inputs": "w1", "task": "weather"}).status_code == 404


def test_the_metrics_have_all_front_ends_and_the_engine(cluster: Cluster) -> None:
    wait_until(cluster.complete)
    engine = httpx.get(f"{cluster.url}/info", timeout=60).json()["replica"]["name"]
    assert engine in replicas(cluster.url)
    counted = figures(cluster.url)
    assert counted["revmux_requests_total", "default"] > 0
    assert counted["revmux_queue_limit",] == 160


def test_a_killed_front_end_loses_no_answer(cluster: Cluster) -> None:
    with Load(cluster) as clients:
        clients.wait_for(50)
        kill_replica("classifier")
        clients.wait_for(100)
    clients.check()
    assert "broken" not in clients.statuses


def test_front_ends_find_the_engine_that_replaces_a_killed_one(cluster: Cluster) -> None:
    engine = httpx.get(f"{cluster.url}/info", timeout=60).json()["replica"]["name"]
    front_ends = replicas(cluster.url) - {engine}
    with Load(cluster) as clients:
        clients.wait_for(50)
        kill_replica("engine")
        wait_until(lambda: clients.statuses[503] > 0)
        clients.wait_for(100)
    clients.check()
    assert "broken" not in clients.statuses
    assert answers(cluster.url)
    assert front_ends <= replicas(cluster.url)
    assert engine not in replicas(cluster.url)


@pytest.mark.long
def test_an_update_of_the_only_engine_loses_no_request(cluster: Cluster) -> None:
    """The engine that stops goes on answering until the front ends reach another one, or its time is over."""
    clients = update_under_load(cluster)
    assert "broken" not in clients.statuses
