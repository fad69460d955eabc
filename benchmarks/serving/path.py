"""python -m benchmarks.serving.path [--before CHECKOUT] [--infinity ENVIRONMENT/bin/infinity_emb]

The request path: a model so small that nothing else costs time, and the embedded encoder, under load by ``wrk``.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import torch
from jsonargparse import ArgumentParser
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.rows import kept_rows, ratio_row
from benchmarks.serving.servers import free_port, infinity_server
from benchmarks.serving.settings import Row, Settings, Shape
from benchmarks.serving.workloads import Workload, embedded_workload
from benchmarks.serving.wrk import WrkLeg, check_wrk, load
from revmux.errors import UserError
from revmux.utils.environment import replica_environment
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path("benchmarks/results/serving-path.json")
KEPT = Path("runs/serving-path")
TINY = "BERT, 2 layers, d = 64"
EMBEDDED_BATCH = 128
"""Inputs per forward pass, for both servers. While a pass runs, the inputs of the next one wait."""
FASTER, FASTER_BATCH, PER_SECOND, ENGINE_MS, OF_COUNTED, OF_INFINITY = 6.0, 3.0, 1200.0, 0.1, 0.75, 1.0


@dataclass(frozen=True)
class Form:
    """One way to run the server.

    Attributes:
        name: name in the rows.
        checkout: folder of the source code.
        flags: flags of the server.
    """

    name: str
    checkout: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class PathSettings:
    """Settings of this benchmark.

    Args:
        before: checkout of the code to compare with; without it, only the forms of this code are compared.
        infinity: path of the executable ``infinity_emb`` in its own environment; without it, Infinity is not measured.
        legs: runs of wrk per figure.
        seconds: seconds per run.
    """

    before: Path | None = None
    infinity: Path | None = None
    legs: int = 3
    seconds: float = 6.0


@contextmanager
def serving(form: Form, flags: Sequence[str], folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server in a process of its own; yield its base URL and the process."""
    port = free_port()
    command = [sys.executable, "-m", "serve_app", "--port", str(port), *flags, *form.flags]
    environment = os.environ | {"PYTHONPATH": str(form.checkout)}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=form.checkout, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 180
            while "serving on" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-500:]}")
                time.sleep(0.2)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(120)


def cpu_seconds(server: psutil.Process) -> dict[str, float]:
    """CPU seconds so far of the replica and of the proxy. A replica with front ends is ``front_ends`` and ``engine``."""
    found = {"classifier": 0.0, "engine": 0.0, "proxy": 0.0}
    for process in server.children(recursive=True):
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = "proxy" if "ProxyActor" in line or "haproxy -db" in line else ""
        if match := re.search(r"ServeReplica:\w+:(classifier|engine)", line):
            kind = match[1]
        if kind:
            found[kind] += times.user + times.system
    if found["engine"]:
        return {"front_ends": found["classifier"], "engine": found["engine"], "proxy": found["proxy"]}
    return {"replica": found["classifier"], "proxy": found["proxy"]}


def engine_seconds(url: str) -> float | None:
    """CPU seconds of the model's thread; None if the server does not report them."""
    replica: dict[str, Any] = httpx.get(f"{url}/info", timeout=60, trust_env=False).json()["replica"]
    return replica.get("cpu_seconds")


def measure_form(form: Form, model: Path, seconds: float, folder: Path) -> dict[str, Any]:
    """Measure one leg of one form of the server on the tiny model: what it answered, by the number of texts per request."""
    texts = [" ".join(f"w{(start + step) % 60}" for step in range(8)) for start in range(60)]
    single = [{"inputs": text} for text in texts]
    batch = [{"inputs": [[texts[(start + step) % 60]] for step in range(32)]} for start in range(60)]
    found: dict[str, Any] = {}
    with serving(form, ["--model", str(model)], folder) as (url, server):
        for count, bodies, connections in ((1, single, 32), (32, batch, 12)):
            send = partial(load, f"{url}/predict", bodies, connections)
            send(2, folder)  # a warm-up: one-time work is not measured
            cpu, engine = cpu_seconds(server), engine_seconds(url)
            leg = send(seconds, folder)
            spent = {kind: after - cpu[kind] for kind, after in cpu_seconds(server).items()}
            found[str(count)] = {
                "per_second": leg.per_second,
                "p50_seconds": leg.p50,
                "p99_seconds": leg.p99,
                "cpu_ms": {kind: round(1000 * used / leg.requests, 4) for kind, used in spent.items()},
                "engine_ms": None
                if engine is None
                else round(1000 * ((engine_seconds(url) or 0) - engine) / leg.requests / count, 4),
                "connections": connections,
            }
    return found


def over_legs(legs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the legs of one form and number of texts: every leg's requests per second, and medians of all else."""

    def middle(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 5) if known else None

    return {
        "per_second": [leg["per_second"] for leg in legs],
        **{name: middle([leg[name] for leg in legs]) for name in ("p50_seconds", "p99_seconds", "engine_ms")},
        "cpu_ms": {kind: middle([leg["cpu_ms"][kind] for leg in legs]) for kind in legs[0]["cpu_ms"]},
        "connections": legs[0]["connections"],
    }


def tiny_rows(forms: dict[str, dict[str, Any]]) -> list[Row]:
    """Return the rows of the tiny model."""
    rows: list[Row] = []
    ours = forms["HAProxy"]
    for count, faster in (("1", FASTER), ("32", FASTER_BATCH)):
        what = "1 text per request" if count == "1" else f"{count} texts per request"
        for name, form in forms.items():
            if name == "HAProxy":
                continue
            target = faster if name == "before" else None
            ratios = [new / old for new, old in zip(ours[count]["per_second"], form[count]["per_second"])]
            rows.append(ratio_row(f"{TINY}, {what}: HAProxy / {name}", ratios, target))
        for name, form in forms.items():
            target = PER_SECOND if (name, count) == ("HAProxy", "1") else None
            row = ratio_row(f"{TINY}, {what}: requests per second, {name}", form[count]["per_second"], target)
            rows.append(row | {"texts": int(count)} | {k: v for k, v in form[count].items() if k != "per_second"})
    engine = ours["32"]["engine_ms"]
    row = ratio_row(f"{TINY}, 32 texts per request: CPU ms of the model's thread per text", [engine], ENGINE_MS)
    return [*rows, row | {"bound": "at most"}]


def measure_embedded(workload: Workload, settings: PathSettings, folder: Path) -> list[Row]:
    """Return the rows of the embedded encoder: groups of eight against N = 1, and N = 1 against Infinity."""
    cut, width = 1, 8
    adapters = ",".join(workload.adapters(cut))
    flags = [
        "--model",
        str(workload.folder),
        "--adapters",
        adapters,
        "--max_queue",
        "4096",
        "--max_batch",
        str(EMBEDDED_BATCH),
    ]
    seconds = 2 * settings.seconds
    plain, grouped, theirs = [], [], []

    def ours(url: str, multiplex: int) -> WrkLeg:
        bodies = [{"inputs": text, "max_multiplex": multiplex} for text in workload.texts]
        return load(f"{url}/predict", bodies, 2 * EMBEDDED_BATCH, seconds, folder)

    with serving(Form("HAProxy", ROOT, ("--proxy", "haproxy")), flags, folder) as (url, _):
        for multiplex in (1, width):
            ours(url, multiplex)  # a warm-up
        for _ in range(settings.legs):
            plain.append(ours(url, 1).per_second)
            grouped.append(ours(url, width).per_second)
        counted = workload.counted_speedup(width, cut)
        ratios = [fast / slow for slow, fast in zip(plain, grouped)]
        name = f"{workload.name}, N = {width}, l = {cut}: measured / counted speed-up"
        rows = [ratio_row(name, [ratio / counted for ratio in ratios], OF_COUNTED)]
        rows[0] |= {"throughput_ratio": round(statistics.median(ratios), 3), "cost_counted": round(1 / counted, 4)}
        rows[0] |= {"plain_per_second": plain, "grouped_per_second": grouped}
        if settings.infinity is None:
            return rows
        bodies: list[dict[str, Any]] = [{"model": workload.folder.name, "input": [text]} for text in workload.texts]
        with infinity_server(settings.infinity, workload.folder, EMBEDDED_BATCH, 1) as other:
            plain.clear()
            load(f"{other}/classify", bodies, 2 * EMBEDDED_BATCH, seconds, folder)  # a warm-up
            for _ in range(settings.legs):
                plain.append(ours(url, 1).per_second)
                theirs.append(load(f"{other}/classify", bodies, 2 * EMBEDDED_BATCH, seconds, folder).per_second)
    name = f"{workload.name}: our N = 1 / infinity-emb"
    row = ratio_row(name, [mine / other for mine, other in zip(plain, theirs)], OF_INFINITY)
    return [*rows, row | {"plain_per_second": plain, "rival_per_second": theirs}]


def tiny_model(folder: Path) -> Path:
    """Write a task model of two layers of width 64 with random weights."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(60))]
    (folder / "vocab.txt").write_text("\n".join(words))
    shape = replace(Shape(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=128, **asdict(shape))
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = {"tokenizer_class": "BertTokenizer", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has not been measured yet, then write the result file; return 2 for invalid arguments."""
    parser = ArgumentParser(prog="python -m benchmarks.serving.path", description=str(__doc__))
    parser.add_class_arguments(PathSettings, as_group=False)
    parser.add_argument("--result", type=Path, default=RESULT, help="result file to write")
    parser.add_argument("--keep", type=Path, default=KEPT, help="folder in which measured stages are kept")
    chosen = parser.parse_args(argv).as_dict()
    result, keep = chosen.pop("result"), chosen.pop("keep")
    settings = PathSettings(**chosen)
    try:
        check_wrk()
        with TemporaryDirectory(prefix="revmux-path-") as name:
            rows, texts = _measure(settings, Path(name), keep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = "python -m benchmarks.serving.path" + " --before CHECKOUT" * bool(settings.before)
    command += " --infinity INFINITY/bin/infinity_emb" * bool(settings.infinity)
    before = None if settings.before is None else _commit(settings.before)
    meta = describe_run(command, texts, {"names": [TINY, *texts], "weights": "random"})
    write_json(result, {"meta": meta | {"before": before, "legs": settings.legs}, "rows": rows})
    return 0


def _measure(settings: PathSettings, folder: Path, keep: Path) -> tuple[list[Row], dict[str, Any]]:
    os.environ |= replica_environment()
    about = {"legs": settings.legs, "seconds": settings.seconds, "commit": _commit(ROOT)}
    model = tiny_model(folder / "tiny")
    forms = [] if settings.before is None else [Form("before", settings.before.resolve())]
    forms += [Form("Python proxy", ROOT, ("--proxy", "python")), Form("HAProxy", ROOT, ("--proxy", "haproxy"))]
    forms += [Form("HAProxy, 2 front ends", ROOT, ("--proxy", "haproxy", "--front_ends", "2"))]
    legs: dict[str, list[dict[str, Any]]] = {form.name: [] for form in forms}
    for leg in range(settings.legs):  # the forms alternate, because the speed of a machine changes within minutes
        for form in forms:
            measure = partial(measure_form, form, model, settings.seconds, folder)
            legs[form.name].append(kept_rows(keep, f"{form.name.replace(' ', '-')}-{leg}", about, measure))
    measured = {name: {count: over_legs([leg[count] for leg in own]) for count in own[0]} for name, own in legs.items()}
    workload = embedded_workload(Settings(), folder)
    texts = {workload.name: {"texts": len(workload.texts), "tokens": workload.mean_length, "sha256": workload.digest}}
    embedded: Callable[[], list[Row]] = partial(measure_embedded, workload, settings, folder)
    rows = kept_rows(keep, "embedded", about | {"infinity": str(settings.infinity)}, embedded)
    return [*tiny_rows(measured), *rows], texts


def _commit(checkout: Path) -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
