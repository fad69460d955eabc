"""Bearer tokens: every path but health and the pages needs one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from serving_http import listening, post

from revmux.errors import UserError
from serve_app.auth import read_tokens
from serve_app.config import AppConfig
from serve_app.service import Service
from serve_app.web import create_app


@pytest.fixture(scope="module")
def guarded(serving_tasks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with two tokens in a file and one in the environment."""
    secrets = tmp_path_factory.mktemp("secrets") / "tokens"
    secrets.write_text("old-token\n\n new-token \n")
    os.environ["REVMUX_TEST_TOKEN"] = "third-tökén"
    config = AppConfig.model_validate(
        {**serving_tasks["mood"], "token_file": str(secrets), "token_env": "REVMUX_TEST_TOKEN"}
    )
    service = Service(config)
    service.serve(config.served)
    with listening(create_app(service)) as url:
        yield url
    service.close()
    del os.environ["REVMUX_TEST_TOKEN"]


@pytest.mark.parametrize("token", ["old-token", "new-token", "third-tökén"])
def test_any_configured_token_is_accepted(guarded: str, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}".encode()}
    assert post(f"{guarded}/predict", {"inputs": "w1"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer old", "Bearer old-tokenx", "Basic old-token", "old-token"]
)
def test_clients_without_a_valid_token_are_refused(guarded: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in (("POST", "/predict"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/v2/models/default")):
        reply = httpx.request(method, guarded + path, headers=headers, timeout=60)
        assert (reply.status_code, reply.json()["error_type"]) == (401, "unauthorized")
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/v2/health/live", "/v2/health/ready", "/", "/static/page.js", "/docs"])
def test_health_and_pages_need_no_token(guarded: str, path: str) -> None:
    assert httpx.get(guarded + path, timeout=60).status_code == 200
    assert httpx.post(f"{guarded}/", json={"inputs": "w1"}, timeout=60).status_code == 401


def test_with_a_route_prefix_only_health_needs_no_token(serving_tasks: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("secret\n")
    config = AppConfig.model_validate({**serving_tasks["mood"], "token_file": str(tmp_path / "tokens")})
    service = Service(config)
    service.serve(config.served)
    outer = FastAPI()
    outer.mount("/api", create_app(service))
    try:
        with listening(outer) as url:
            assert httpx.get(f"{url}/api/health", timeout=60).status_code == 200
            assert httpx.get(f"{url}/api/", timeout=60).status_code == 200
            for path in ("/api/info", "/api/api/health", "/api/healthy"):
                assert httpx.get(url + path, timeout=60).status_code == 401
            assert post(f"{url}/api/predict", {"inputs": "w1"}).status_code == 401
            reply = post(f"{url}/api/predict", {"inputs": "w1"}, headers={"Authorization": "Bearer secret"})
            assert reply.status_code == 200
    finally:
        service.close()


def test_a_missing_or_empty_token_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for file, variable in ((str(tmp_path / "none"), None), (str(tmp_path / "empty"), None), (None, "REVMUX_NO_SUCH")):
        with pytest.raises(UserError, match="token"):
            read_tokens(file, variable)
    assert read_tokens(None, None) == ()
