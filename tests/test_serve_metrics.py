"""The metrics of a replica, of several replicas, and those that the dashboard reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from dashboard_queries import needed
from prometheus_client.parser import text_string_to_metric_families
from serving_http import USUAL, figures, listening, post, serving
from serving_models import text

from serve_app.metrics import page
from serve_app.service import Service
from serve_app.web import create_app


@pytest.fixture(scope="module")
def service(serving_tasks: dict[str, Any]) -> Iterator[Service]:
    with serving({"tasks": serving_tasks, **USUAL}, "r1") as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(create_app(service)) as base:
        yield base


def test_metrics_count_requests_groups_and_stages(url: str) -> None:
    before = figures(url)
    batch = [[text(index)] for index in range(8)]
    post(f"{url}/tasks/mood/predict", {"inputs": batch})
    post(f"{url}/tasks/mood/predict", {"inputs": ""})
    after = figures(url)
    gained = {key: value - before.get(key, 0) for key, value in after.items()}
    assert gained["revmux_http_requests_total", "/tasks/{task}/predict", "200"] == 1
    assert gained["revmux_http_requests_total", "/tasks/{task}/predict", "400"] == 1
    assert gained["revmux_inputs_total", "mood", "4"] == 8
    assert gained["revmux_groups_total", "mood", "4"] == 2
    assert gained["revmux_group_width_bucket", "4.0", "mood"] == gained["revmux_group_width_count", "mood"] == 2
    assert gained["revmux_group_width_bucket", "2.0", "mood"] == 0
    assert gained["revmux_tokens_total", "mood"] > 8
    assert gained["revmux_step_seconds_count", "tokenize", "mood"] == 8
    assert gained["revmux_step_seconds_count", "upper", "mood"] >= 1
    assert gained["revmux_queue_inputs", "mood"] == 0
    assert after["revmux_queue_limit",] == 512


def test_an_internal_error_counts_as_such(url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures(url)
    monkeypatch.setattr(service, "info", lambda: {}["missing"])
    assert httpx.get(f"{url}/info", timeout=60).status_code == 500
    name = ("revmux_http_requests_total", "/info", "500")
    assert figures(url)[name] - before.get(name, 0) == 1


def test_every_metric_and_label_of_the_dashboard_is_exported(url: str) -> None:
    post(f"{url}/tasks/mood/predict", {"inputs": [[text(index)] for index in range(8)]})
    shown = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    exported = {sample.name: set(sample.labels) for family in shown for sample in family.samples}
    wanted = needed()
    assert len(wanted) > 15
    missing = {name: labels - exported.get(name, set()) for name, labels in wanted.items()}
    assert wanted.keys() <= exported.keys()
    assert not any(missing.values()), missing


def test_the_metrics_of_several_replicas_are_merged_into_one_page(service: Service) -> None:
    text = page({"b": service.metrics.families(), "a": service.metrics.families()}).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        replicas = [sample.labels["replica"] for sample in family.samples]
        assert replicas.count("a") == replicas.count("b") > 0
    assert text.count("# TYPE revmux_queue_inputs gauge") == 1
