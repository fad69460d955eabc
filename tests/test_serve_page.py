"""The page at ``/`` in a real browser: typed texts get labels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_http import listening, write_tasks
from serving_models import load, plain_scores
from websockets.sync.client import ClientConnection, connect

from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.web import create_app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed; install it, for example: apt install chromium"
)


class Browser:
    """A page of a headless Chromium, controlled over the DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"]["text"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; the browser evaluates it before each frame."""
        self.run(
            f"new Promise(done => {{ const look = () => ({condition}) ? done() : setTimeout(look, 20); look(); }})"
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def keys(self, text: str) -> None:
        """Type text into the focused element."""
        self.call("Input.insertText", text=text)


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0", "--window-size=1000,900"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"ws://([^/]+)/", line) for line in process.stderr)))
        with connect(f"ws://{found[1]}/devtools/browser" + _target(found.string), max_size=None) as control:
            control.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(control.recv(timeout=60))["result"]["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        with connect(f"ws://{found[1]}/devtools/page/{page}", max_size=None) as connection:
            yield Browser(connection)
    finally:
        process.terminate()
        process.wait()


def _target(line: str) -> str:
    return line.strip().rpartition("/devtools/browser")[2]


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


def test_the_page_shows_throughput_and_width_while_there_is_load(browser: Browser, url: str) -> None:
    browser.run(
        "window.load = setInterval(() => fetch('predict', {method: 'POST', headers: {Authorization: 'Bearer let-me-in'},"
        "body: JSON.stringify({task: 'mood', inputs: Array(16).fill(['w1'])})}), 50)"
    )
    browser.wait("Number(document.getElementById('mean-width').textContent) > 1")
    browser.wait("Number(document.getElementById('throughput').textContent) > 1")
    browser.wait("document.getElementById('throughput-line').points.length > 1")
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser: Browser, url: str, scheme: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    colours = browser.run(
        "['body', '#hint', 'a', '#ask button[type=submit]'].map(name => {"
        "const style = getComputedStyle(document.querySelector(name));"
        "const behind = name.includes('button') ? style : getComputedStyle(document.body);"
        "return [style.color, behind.backgroundColor]; })"
    )
    for ink, paper in colours:
        light, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, ink, paper)  # WCAG 2 AA


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_control_has_a_name_and_the_page_contacts_no_other_server(browser: Browser, url: str) -> None:
    unnamed = "[...document.querySelectorAll('textarea, select, input')].filter(field => !field.labels.length).length"
    assert browser.run(unnamed) == 0
    sources = browser.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert sources
    assert all(source.startswith((url, "data:")) for source in sources)
