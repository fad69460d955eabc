"""Load by ``wrk``, a compiled program, so that the load generator takes little of the machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux.errors import UserError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class WrkLeg:
    """What one run of wrk measured.

    Attributes:
        per_second: answered requests per second.
        requests: number of answered requests.
        p50: median seconds per request.
        p99: 99th percentile of the seconds per request.
    """

    per_second: float
    requests: int
    p50: float
    p99: float


def check_wrk() -> None:
    """Check that wrk is installed.

    Raises:
        UserError: it is not.
    """
    if shutil.which("wrk") is None:
        raise UserError("wrk is not installed; install it, on Debian with: apt-get install wrk")


def load(url: str, bodies: Sequence[dict[str, Any]], connections: int, seconds: float, folder: Path) -> WrkLeg:
    """Send requests in a closed loop for some seconds.

    Args:
        url: URL of every request.
        bodies: bodies of the requests, sent in turn.
        connections: connections, each of which sends its next request as soon as the last one is answered.
        seconds: duration, at least 1.
        folder: folder for wrk's script.

    Raises:
        RuntimeError: wrk fails, or a request gets an error.
    """
    quoted = ",\n".join(json.dumps(json.dumps(body)) for body in bodies)  # JSON's escapes are Lua's, for ASCII
    script = folder / "requests.lua"
    script.write_text(
        f"local bodies = {{\n{quoted}\n}}\nlocal next = 0\n"
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        "function request()\n  next = next % #bodies + 1\n  return wrk.format(nil, nil, nil, bodies[next])\nend\n"
    )
    command = ["wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s", "--timeout", "60s", "--latency"]
    done = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=False)
    if done.returncode or "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise RuntimeError(f"wrk: {(done.stderr or done.stdout).strip()[-500:]}")
    return WrkLeg(
        per_second=float(_find(r"Requests/sec:\s+([\d.]+)", done.stdout)),
        requests=int(_find(r"(\d+) requests in", done.stdout)),
        p50=_seconds(_find(r"(?m)^ +50% +(\S+) *$", done.stdout)),
        p99=_seconds(_find(r"(?m)^ +99% +(\S+) *$", done.stdout)),
    )


def _find(pattern: str, output: str) -> str:
    match = re.search(pattern, output)
    if match is None:
        raise RuntimeError(f"wrk printed no {pattern!r}: {output[-500:]}")
    return match[1]


def _seconds(written: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", written).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]
