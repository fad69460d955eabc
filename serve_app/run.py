"""For programs: start the server, stop the server."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from revmux.adapters.compatibility import check_model
from revmux.adapters.config import load_adapter_config
from revmux.errors import UserError
from revmux.pretrained.identity import identify, resolve
from revmux.utils.extras import require
from serve_app.auth import read_tokens
from serve_app.config import AppConfig, ServerConfig, TaskConfig
from serve_app.losses import log_loss
from serve_app.proxy import CALLBACK, CALLBACK_VARIABLE
from serve_app.sources import is_mlflow

APPLICATION = "revmux"
_started: set[str] = set()
"""What this process started, of ``ray``, ``serve`` and ``application``; all else belongs to others."""


def deploy(config: ServerConfig, timeout_seconds: float = 300.0) -> str:
    """Start the server and wait until its model answers.

    Runs on the Ray cluster that this process is connected to, else on a local one that :func:`shutdown` ends.

    Args:
        config: what to serve, and where to listen.
        timeout_seconds: how long the server may take until it is healthy.

    Returns:
        The base URL, such as ``http://127.0.0.1:8000``.

    Raises:
        UserError: the port is busy, the cluster is too small, or the model or an adapter cannot be loaded.
    """
    require("ray", "serve")
    check_port(config.host, config.port)
    for task in config.served.values():
        _check_adapters(task, config)

    # Serve's own lines are in its files only; the terminal shows what this program and its replicas print.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    import ray
    from ray import serve
    from ray.serve.schema import ServeStatus

    from serve_app.app import build

    if not ray.is_initialized():
        read_tokens(config.token_file, config.token_env)  # on another cluster only its replicas can tell
        os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)  # what this cluster starts inherits it
        if not sys.stdout.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        # Errors only: a warning at each start says how to switch authentication off.
        started: Any = ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
        _started.add("ray")
        print(f"Ray Serve's own messages: {started.address_info['session_dir']}/logs/serve", flush=True)
    try:
        _check_resources(config, ray.cluster_resources())
        if serve.status() == ServeStatus():
            _started.add("serve")
        serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
        application = AppConfig(**config.model_dump(exclude={"host", "port"}))
        _started.add("application")
        serve.run(build(application), name=APPLICATION, route_prefix="/")
        url = base_url(config.host, config.port)
        _wait_healthy(url, timeout_seconds)
    except BaseException as error:
        shutdown()
        if isinstance(error, RuntimeError) and (found := re.findall(r"UserError: (.+)", str(error))):
            raise UserError(found[-1]) from None
        raise
    return url


def shutdown() -> None:
    """Answer what waits and stop what :func:`deploy` started: the application, and Serve and Ray where they are its own."""
    import ray
    from ray import serve

    with ExitStack() as stack:
        if "ray" in _started:
            # Serve kills its controller while it still has a task, which Ray reports as a failure.
            stack.enter_context(redirect_stdout(io.StringIO()))
        if ray.is_initialized():
            if "serve" in _started:
                serve.shutdown()
            elif "application" in _started and APPLICATION in serve.status().applications:
                serve.delete(APPLICATION)
        if "ray" in _started:
            ray.shutdown()
    _started.clear()


def base_url(host: str, port: int) -> str:
    """The URL by which this machine reaches the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def check_port(host: str, port: int) -> None:
    """Refuse a port that another process listens on.

    Raises:
        UserError: it is busy, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} of {host} is in use by another process; stop that one, or choose another --port"
                ) from None
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose 127.0.0.1 or 0.0.0.0") from None


def _check_adapters(task: TaskConfig, config: ServerConfig) -> None:
    """Refuse a model or adapter that is missing or does not fit, before anything starts; log what adapters cost.

    Adapters of MLflow are left to the replicas, which log the same.
    """
    location = resolve(task.model)
    for adapter in task.adapters:
        if is_mlflow(adapter):
            continue
        adapter_config = load_adapter_config(adapter)
        if Path(location).is_dir():  # a model of the hub is not downloaded here
            check_model(adapter_config, identify(task.model, location, None), adapter, task.model)
        log_loss(adapter_config, adapter, task.threshold, config)


def _check_resources(config: ServerConfig, present: dict[str, float]) -> None:
    replicas = config.autoscaling.min_replicas if config.autoscaling else config.num_replicas
    for kind, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus)):
        wanted, there = replicas * each, present.get(kind, 0.0)
        if wanted > there:
            raise UserError(
                f"{replicas} replicas × {each:g} {kind} = {wanted:g}, but the cluster has {there:g}; "
                f"choose fewer replicas or a smaller num_{kind.lower()}s"
            )


def _wait_healthy(url: str, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url}/health did not answer within {timeout_seconds:g} s: {error}") from error
        time.sleep(0.1)
