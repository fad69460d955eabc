"""The serving benchmark: its load sends the described requests, and its figures measure what they are named after."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from serving_http import listening
from tiny_models import tiny_config
from transformers import AutoTokenizer

from benchmarks.rows import kept_rows, ratio_row, unmeasured_row
from benchmarks.serving import wrk
from benchmarks.serving.__main__ import main
from benchmarks.serving.alone import compare, random_backbone, random_tokens
from benchmarks.serving.latency import poisson
from benchmarks.serving.load import Leg, Load, Reply, send
from benchmarks.serving.page import path_words, serving_words
from benchmarks.serving.settings import Sizes
from benchmarks.serving.shares import PARTS, share_rows, shares
from benchmarks.serving.workloads import texts_of_length
from revmux.pretrained.config import EMBEDDED_NAME
from revmux.pretrained.identity import resolve


class Seen:
    """An endpoint that answers four requests at a time, the lead (-1) with the first four, and records the order."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.four = threading.Barrier(4, action=self._came)
        self.came = threading.Event()

    def _came(self) -> None:
        self.came.set()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/ask")
        def ask(body: dict[str, Any]) -> JSONResponse:
            number = body["n"]
            self.numbers.append(number)
            if number < 0:
                assert self.came.wait(30)
            elif "status" not in body:
                self.four.wait(30)
            return JSONResponse({}, status_code=body.get("status", 200), headers={"x-n": str(number)})

        return app


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def url(seen: Seen) -> Iterator[str]:
    with listening(seen.app()) as base:
        yield f"{base}/ask"


def test_a_closed_loop_keeps_its_connections_busy_after_a_lead(seen: Seen, url: str) -> None:
    leg = send(Load(url, [{"n": n} for n in range(20)], connections=4, lead=(url, {"n": -1})))
    assert -1 in seen.numbers[:5]  # the four connections may overtake it inside the server, their replies may not
    assert sorted(seen.numbers) == list(range(-1, 20))
    assert sorted(int(reply.headers["x-n"]) for reply in leg.replies) == list(range(20))
    assert leg.per_second > 0


def test_arrivals_do_not_wait_for_replies(seen: Seen, url: str) -> None:
    arrivals = [0.0, 0.1, 0.2, 0.3]
    leg = send(Load(url, [{"n": n} for n in range(4)], arrivals=arrivals))
    assert seen.numbers == [0, 1, 2, 3]
    assert all(reply.ended >= arrivals[-1] for reply in leg.replies), (
        "no request is answered before the last one arrived"
    )
    assert [reply.ended - reply.seconds for reply in leg.replies] == pytest.approx(arrivals)


def test_a_refused_request_ends_the_load(url: str) -> None:
    with pytest.raises(RuntimeError, match="answered 429"):
        send(Load(url, [{"n": 0, "status": 200}, {"n": 1, "status": 429}]))


def test_percentiles_use_the_nearest_rank() -> None:
    leg = Leg([Reply(float(n), float(n), {}) for n in range(1, 201)])
    assert (leg.p50, leg.p99, leg.per_second) == (100.5, 198.0, 1.0)
    assert Leg(leg.replies[:10]).p99 == 10.0


def test_poisson_arrivals_have_their_rate_and_their_seed() -> None:
    arrivals = poisson(4000, 50.0, 1)
    assert arrivals == sorted(arrivals)
    assert 4000 / arrivals[-1] == pytest.approx(50, rel=0.1)
    assert arrivals == poisson(4000, 50.0, 1) != poisson(4000, 50.0, 2)


def test_shares_sum_to_the_whole_time_of_a_request() -> None:
    headers = {"x-total-time": "800", "x-tokenization-time": "10", "x-queue-time": "300", "x-inference-time": "400"}
    leg = Leg([Reply(1.0, 1.0, headers)] * 3)
    after = {"tokenize": 9.0, "queue": 9.0, "pad": 1.1, "prefill": 2.0, "upper": 5.0, "head": 1.0, "reply": 1.0}
    found = shares(leg, {"pad": 0.1, "queue": 5.0}, after)
    expected = {
        "proxy": 0.2,
        "queue": 0.3,
        "tokenise": 0.05,
        "prefill": 0.08,
        "upper": 0.2,
        "head": 0.04,
        "reply": 0.13,
    }
    assert {part: share for part, share in found.items() if share} == pytest.approx(expected)
    assert [row["part"] for row in share_rows("b", "quiet", [found])] == [part for part in found if part in expected]


def test_texts_have_the_given_length() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED_NAME))
    texts = texts_of_length(tokenizer, 128, 5)
    assert {len(tokens) for tokens in tokenizer(texts)["input_ids"]} == {128}
    assert len(set(texts)) == 5


def test_legs_consist_of_whole_passes() -> None:
    sizes = Sizes(max_batch=16, alone=24, plain=16, grouped=48, rivals=32, quiet=10, half=20)
    assert sizes.times(1) == sizes
    small = sizes.times(0.1)
    assert (small.alone, small.plain, small.grouped, small.rivals, small.quiet, small.half) == (8, 16, 16, 16, 3, 3)


def test_a_stage_is_kept_until_its_settings_change(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> list[dict[str, Any]]:
        calls.append(1)
        return [ratio_row("r", [float(len(calls))])]

    first = kept_rows(tmp_path, "stage", {"pairs": 1}, measure)
    assert kept_rows(tmp_path, "stage", {"pairs": 1}, measure) == first
    assert kept_rows(tmp_path, "stage", {"pairs": 2}, measure)[0]["ratio_median"] == 2.0
    assert len(calls) == 2


def test_the_model_alone_is_compared_at_every_n_and_l(tmp_path: Path) -> None:
    tiny_config("bert", num_hidden_layers=4, max_position_embeddings=512).save_pretrained(tmp_path)
    backbone = random_backbone(str(tmp_path), torch.device("cpu"), torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    rows = list(compare("b", backbone, [random_tokens(backbone, 8)], 128, 1, 0.95))
    assert [(row["num_inputs"], row["prefill_layers"]) for row in rows] == [
        (n, cut) for cut in (1, 3) for n in (2, 4, 8)
    ]
    for row in rows:
        assert row["ratio_median"] == pytest.approx(row["throughput_ratio"] * row["cost_counted"], abs=2e-3)


def test_the_page_shows_which_targets_were_met_missed_and_not_measured() -> None:
    rows = [
        ratio_row("grouped", [0.8, 0.85, 0.95], 0.9) | {"throughput_ratio": 1.7, "cost_counted": 0.5},
        ratio_row("quiet", [1.0], 1.05) | {"bound": "at most"},
        ratio_row("slow", [1.2], 1.0) | {"bound": "at most"},
        unmeasured_row("rival", "not installed", 1.0),
        ratio_row("free", [0.5]),
        *share_rows("b", "quiet", [dict.fromkeys(PARTS, 0.0) | {"upper": 0.75, "queue": 0.25}]),
    ]
    meta = {
        "machine": {"cores": 2},
        "settings": {"pairs": 3, "threads": 1},
        "versions": {"torch": "2", "ray": "2"},
        "commit": None,
    }
    words = serving_words({"meta": meta, "rows": rows})["serving"]
    assert "| grouped | ≥ 0.9 | 0.85 (0.80–0.95) | 1.70× of 2.00× | missed |" in words
    assert "| quiet | ≤ 1.05 | 1.00 (1.00–1.00) | – | met |" in words
    assert "| slow | ≤ 1 | 1.20 (1.20–1.20) | – | missed |" in words
    assert "| rival | ≥ 1 | – | – | not measured: not installed |" in words
    assert "| free | – | 0.50 (0.50–0.50) | – | – |" in words
    assert "1 of 3 targets met" in words
    assert "| b, quiet | 25.0% | 75.0% |" in words


def test_the_page_shows_the_request_path_with_its_cpu_time() -> None:
    rows = [
        ratio_row("HAProxy / before", [5.0, 6.5, 7.0], 6.0),
        ratio_row("requests per second", [1300.0], 1200.0) | {"cpu_ms": {"replica": 0.5, "proxy": 0.051}},
        ratio_row("CPU ms per text", [0.2], 0.1) | {"bound": "at most"},
        ratio_row("HAProxy", [1300.0], None) | {"cpu_ms": {"replica": 0.7, "proxy": 0.1}, "engine_ms": 0.1, "texts": 2},
        ratio_row("HAProxy, 2 front ends", [900.0], None)
        | {"cpu_ms": {"front_ends": 0.4, "engine": 0.45, "proxy": 0.1}, "engine_ms": 0.1, "texts": 2},
    ]
    meta = {"machine": {"cores": 2}, "legs": 3, "versions": {"ray": "2"}, "commit": None, "before": "a" * 40}
    words = path_words({"meta": meta, "rows": rows})["serving-path"]
    assert "| HAProxy / before | ≥ 6 | 6.5 (5–7) | – | met |" in words
    assert "| requests per second | ≥ 1200 | 1300 (1300–1300) | 0.50, 0.05 | met |" in words
    assert "| CPU ms per text | ≤ 0.1 | 0.2 (0.2–0.2) | – | missed |" in words
    assert "| HAProxy, 2 front ends | – | 900 (900–900) | 0.40 + 0.45, 0.10 | – |" in words
    assert (
        "a request with 2 texts takes 0.50 ms of CPU time in one process, or 0.40 ms in a front end and 0.25 ms in"
        in words
    )
    assert "one process to 2000 requests per second, each front end to 2500, and an engine to 4000" in words
    assert "**before** is commit `aaaaaaaa`" in words


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_sends_the_bodies_in_turn_and_reports_errors(tmp_path: Path) -> None:
    app = FastAPI()
    received: list[Any] = []

    @app.post("/echo")
    async def echo(request: Request) -> None:
        received.append(await request.json())

    with listening(app) as url:
        leg = wrk.load(f"{url}/echo", [{"inputs": 'a "quoted" é'}, {"inputs": "b"}], 1, 1, tmp_path)
        assert leg.requests > 0
        assert leg.per_second > 0
        assert 0 < leg.p50 <= leg.p99
        assert {one["inputs"] for one in received[:2]} == {'a "quoted" é', "b"}
        with pytest.raises(RuntimeError, match="Non-2xx"):
            wrk.load(f"{url}/missing", [{}], 1, 1, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--glue", "/nowhere"], "no folder SST-2"),
        (["--infinity", "/nowhere/infinity_emb"], "name ENVIRONMENT/bin/infinity_emb"),
        (["--pairs", "0"], "pairs is 0; choose 1 or more"),
    ],
)
def test_a_user_error_is_reported_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
