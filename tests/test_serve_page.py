"""The page at ``/`` in a real browser: typed texts get labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_http import listening, write_tasks
from serving_models import load, plain_scores

from benchmarks.browser import CHROMIUM, Browser, browser
from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.web import create_app

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed; install it, for example: apt install chromium"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def url(tasks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    secrets = tmp_path_factory.mktemp("secrets") / "tokens"
    secrets.write_text("let-me-in")
    config = AppConfig.model_validate({"tasks": tasks, "plain_load": 1, "token_file": str(secrets)})
    service = Service(config)
    service.serve(config.served)
    with listening(create_app(service)) as base:
        yield base
    service.close()


@pytest.fixture(scope="module", name="browser")
def opened_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def _answers(browser: Browser) -> list[list[str]]:
    rows = "[...document.querySelectorAll('#answers tbody tr')]"
    return browser.run(f"{rows}.map(row => [...row.cells].map(cell => cell.innerText))")


def test_the_page_shows_labels_and_groups_of_typed_texts(browser: Browser, url: str, tasks: dict[str, Any]) -> None:
    browser.open(f"{url}/")
    browser.wait("!document.getElementById('token-entry').hidden")  # the server requires a token
    browser.run("document.getElementById('token').focus()")
    browser.keys("let-me-in")
    browser.run("document.getElementById('token').dispatchEvent(new Event('change'))")
    browser.wait("document.getElementById('task').length === 2")
    browser.run("document.getElementById('task').value = 'topic'")
    browser.run("document.getElementById('texts').focus()")
    texts = ["w1 w2", "w3", "<b>w4</b>", "w5 w6 w7"]
    browser.keys("\n".join(texts))
    browser.complaints.clear()  # the refusals before the token was entered
    browser.run("document.querySelector('#ask button[type=submit]').click()")
    browser.wait("document.querySelectorAll('#answers tbody tr').length === 4")
    found = _answers(browser)
    assert [row[0] for row in found] == texts
    pretrained = load(Path(tasks["topic"]["model"]))
    best = plain_scores(pretrained, texts).argmax(-1).tolist()
    assert [row[1] for row in found] == [pretrained.backbone.label_names[index] for index in best]
    assert all(len(row[2].splitlines()) == 3 for row in found)
    assert [row[3] for row in found] == ["2"] * 4
    assert sorted(row[4] for row in found) == ["1", "1", "2", "2"]
    assert [row[5] for row in found] == ["token-split"] * 4
    assert "4 answered in" in browser.run("document.getElementById('status').textContent")
    browser.wait("Number(document.getElementById('replicas').textContent) === 1")
    assert browser.complaints == []


def test_the_page_shows_throughput_width_and_latency_while_there_is_load(browser: Browser, url: str) -> None:
    browser.run(
        "window.load = setInterval(() => fetch('predict', {method: 'POST', headers: {Authorization: 'Bearer let-me-in'},"
        "body: JSON.stringify({task: 'mood', inputs: Array(16).fill(['w1'])})}), 50)"
    )
    browser.wait("Number(document.getElementById('mean-width').textContent) > 1")
    browser.wait("Number(document.getElementById('throughput').textContent) > 1")
    browser.wait("Number(document.getElementById('latency').textContent) > 0")
    lines = ("throughput", "width", "latency")
    browser.wait(" && ".join(f"document.getElementById('{name}-line').points.length > 1" for name in lines))
    browser.run("clearInterval(window.load)")


def test_the_page_shows_the_plain_models_answer_below_each_other_one(
    browser: Browser, url: str, tasks: dict[str, Any]
) -> None:
    texts = ["w1 w2", "w3"]
    browser.run(f"document.getElementById('texts').value = {json.dumps(chr(10).join(texts))}")
    browser.run("document.getElementById('compare').click()")
    browser.run("document.querySelector('#ask button[type=submit]').click()")
    browser.wait("document.querySelectorAll('#answers tbody tr.exact').length === 2")
    found = _answers(browser)
    assert [row[0] for row in found] == [texts[0], "", texts[1], ""]
    assert [row[3] for row in found] == ["2", "1", "2", "1"]
    assert [row[5] for row in found] == ["token-split", "plain model, exact"] * 2
    pretrained = load(Path(tasks["topic"]["model"]))
    best = plain_scores(pretrained, texts).argmax(-1).tolist()
    assert [row[1] for row in found[1::2]] == [pretrained.backbone.label_names[index] for index in best]
    assert browser.run("document.querySelectorAll('#answers td.differs').length") == 0  # these adapters agree
    browser.run("document.getElementById('compare').click()")


def test_the_page_shows_which_stages_answer_and_their_cost(browser: Browser, url: str) -> None:
    rows = "[...document.querySelectorAll('#stages tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    browser.wait(f"{rows}.length === 4 && Number({rows}[1][4]) > 0")
    found = browser.run(rows)
    assert [row[:2] for row in found] == [["mood", "0"], ["", "1"], ["topic", "0"], ["", "1"]]
    info = httpx.get(f"{url}/info", headers={"Authorization": "Bearer let-me-in"}, timeout=60).json()
    costs = [f"{adapter['relative_cost']:.2f}" for adapter in info["tasks"]["mood"]["adapters"]]
    assert found[1][2] == "token-split, N = 2 / token-split, N = 4"
    assert found[1][3] == " / ".join(costs)
    assert found[0][2:4] == ["plain model", "1.00"]
    assert int(found[0][5].rstrip("% ")) + int(found[1][5].rstrip("% ")) in (99, 100, 101)


def test_a_refusal_is_shown_as_text(browser: Browser, url: str) -> None:
    browser.run(f"document.getElementById('texts').value = {json.dumps('w ' * 500)}")
    browser.run("document.querySelector('#ask button[type=submit]').click()")
    browser.wait("document.getElementById('status').className === 'error'")
    assert "at most 64 tokens are allowed" in browser.run("document.getElementById('status').textContent")


def test_the_sample_texts_can_be_classified(browser: Browser, url: str) -> None:
    browser.run("document.getElementById('sample').click()")
    texts = browser.run("document.getElementById('texts').value").split("\n")
    assert len(texts) > 1
    browser.run("document.querySelector('#ask button[type=submit]').click()")
    first = json.dumps(texts[0])
    browser.wait(f"document.querySelector('#answers tbody td').innerText === {first}")
    assert [row[0] for row in _answers(browser)] == texts


def test_the_page_contacts_no_other_server(browser: Browser, url: str) -> None:
    sources = browser.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert sources
    assert all(source.startswith((url, "data:")) for source in sources)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1000])
def test_the_page_is_accessible_and_fits_a_phone(browser: Browser, url: str, width: int, scheme: str) -> None:
    """axe-core checks the page with answers, charts and stages on it."""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.resize(width, 800)
    browser.run(f"document.getElementById('texts').value = {json.dumps('w1 ' * 40 + chr(10) + 'w' * 200)}")
    browser.run("document.querySelector('#ask button[type=submit]').click()")
    browser.wait("document.querySelectorAll('#answers tbody tr').length === 2")
    browser.wait("!document.getElementById('stages').hidden")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run((files("axe_core_python") / "axe.min.js").read_text() + "; 0")
    found = browser.run(
        "axe.run().then(found => found.violations.map(one => [one.id, one.nodes.map(node => node.html)]))"
    )
    assert found == []
