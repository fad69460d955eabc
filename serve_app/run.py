"""Start and stop the server from a program."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
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
from serve_app.config import FRONT_END_CPUS, AppConfig, ServerConfig, TaskConfig
from serve_app.measured_loss import log_loss
from serve_app.ray_environment import ENABLE_VARIABLE, proxy_kind, ray_environment
from serve_app.sources import is_mlflow

logger = logging.getLogger(__name__)

APPLICATION = "revmux"
_started: set[str] = set()
"""Which of ``ray``, ``serve`` and ``application`` this process started. Only these are stopped by :func:`shutdown`."""
_prepared = ExitStack()
"""Undoes what :func:`_prepare_proxy` did."""


def deploy(config: ServerConfig, timeout_seconds: float = 300.0) -> str:
    """Start the server and wait until its model answers.

    The server runs on the Ray cluster that this process is connected to, or else on a new local cluster that
    :func:`shutdown` stops.

    Args:
        config: the configuration of the server.
        timeout_seconds: maximum time until the server is healthy.

    Returns:
        The base URL, such as ``http://127.0.0.1:8000``.

    Raises:
        UserError: the port is in use, the cluster is too small, or the model or an adapter cannot be loaded.
    """
    require("ray", "serve")
    check_port(config.host, config.port)
    for task in config.served.values():
        _check_adapters(task, config)

    # Serve logs to its files only. The terminal shows the output of this program and its replicas.
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    import ray
    from ray import serve
    from ray.serve.schema import ServeStatus

    from serve_app.app import ENGINE, build

    host = config.host
    if not ray.is_initialized():
        read_tokens(config.token_file, config.token_env)  # on an existing cluster, only its replicas can check this
        host = _prepare_proxy(config)
        if not sys.stdout.isatty():
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        # Only errors are logged: Ray warns at each start about how to disable authentication.
        started: Any = ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
        _started.add("ray")
        print(f"logs of Ray Serve: {started.address_info['session_dir']}/logs/serve", flush=True)
    try:
        if shortage := _shortage(config, ray.cluster_resources()):
            if "ray" in _started:
                raise UserError(f"{shortage}; choose fewer replicas, or fewer resources for each")
            logger.warning("%s; waiting for more machines", shortage)  # a cluster of several machines may grow
        if serve.status() == ServeStatus():
            _started.add("serve")
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": config.port})
        application = AppConfig(**config.model_dump(exclude={"host", "port", "proxy"}))
        _started.add("application")
        serve.run(build(application), name=APPLICATION, route_prefix="/")
        url = base_url(config.host, config.port)
        _wait_healthy(url, timeout_seconds)
        if "ray" in _started:  # on another cluster, replicas write these lines themselves
            model = serve.get_app_handle(APPLICATION)
            if config.front_ends > 1:
                model = serve.get_deployment_handle(ENGINE, APPLICATION)
            for line in model.memory_lines.remote().result(timeout_s=timeout_seconds):
                logger.info("%s", line)
    except BaseException as error:
        shutdown()
        if isinstance(error, RuntimeError) and (found := re.findall(r"UserError: (.+)", str(error))):
            raise UserError(found[-1]) from None
        raise
    return url


def shutdown() -> None:
    """Answer the waiting requests, and stop the application, Serve and Ray as far as :func:`deploy` started them."""
    import ray
    from ray import serve

    with ExitStack() as stack:
        if "ray" in _started:
            # Serve kills its controller while it still runs a task, which Ray prints as a failure.
            stack.enter_context(redirect_stdout(io.StringIO()))
        if ray.is_initialized():
            if "serve" in _started:
                serve.shutdown()
            elif "application" in _started and APPLICATION in serve.status().applications:
                serve.delete(APPLICATION)
        if "ray" in _started:
            ray.shutdown()
    _started.clear()
    _prepared.close()


def base_url(host: str, port: int) -> str:
    """Return the URL at which this machine can reach the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def check_port(host: str, port: int) -> None:
    """Check that the server can listen on this port.

    Raises:
        UserError: the port is in use, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} of {host} is in use by another process; stop that process, or choose another --port"
                ) from None
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose 127.0.0.1 or 0.0.0.0") from None


def _prepare_proxy(config: ServerConfig) -> str:
    """Set the variables that Ray's processes inherit, and return the interface for the replicas."""
    kind = proxy_kind(config.proxy)
    folder = None
    if kind == "haproxy":
        folder = Path(tempfile.mkdtemp(prefix="revmux-", dir="/tmp"))  # the path of a socket must be short
        _prepared.callback(shutil.rmtree, folder, ignore_errors=True)
    for name, value in ray_environment(kind, folder, config.host, config.busy_requests).items():
        before = os.environ.get(name)
        if before is None or name == ENABLE_VARIABLE:
            os.environ[name] = value
            _prepared.callback(_set_variable, name, before)
    return config.host if kind == "python" else "127.0.0.1"


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _check_adapters(task: TaskConfig, config: ServerConfig) -> None:
    """Refuse a missing or mismatched model or adapter before anything starts, and log how much each adapter loses.

    Models and adapters from MLflow are checked and logged by the replicas.
    """
    location = None if is_mlflow(task.model) else resolve(task.model)
    for adapter in task.adapters:
        if is_mlflow(adapter):
            continue
        adapter_config = load_adapter_config(adapter)
        if location is not None and Path(location).is_dir():  # models of the hub are downloaded by the replicas
            check_model(adapter_config, identify(task.model, location, None), adapter, task.model)
        log_loss(adapter_config, adapter, task.threshold, config)


def _shortage(config: ServerConfig, resources: dict[str, float]) -> str | None:
    """What the cluster has too little of for the replicas, as text."""
    replicas = config.autoscaling.min_replicas if config.autoscaling else config.num_replicas
    front_ends = config.front_ends * FRONT_END_CPUS if config.front_ends > 1 else 0.0
    for kind, each in (("CPU", config.num_cpus + front_ends), ("GPU", config.num_gpus)):
        required, available = replicas * each, resources.get(kind, 0.0)
        if required > available:
            return f"{replicas} replicas need {each:g} {kind} each, {required:g} in total, but the cluster has {available:g}"
    return None


def _wait_healthy(url: str, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url}/health did not return 200 within {timeout_seconds:g} s: {error}") from error
        time.sleep(0.1)
