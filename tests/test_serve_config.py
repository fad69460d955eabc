"""The configuration of the server, and what is refused before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from serving_http import free_port
from serving_models import write_identifying_model

import revmux
from revmux.errors import UserError
from serve_app.__main__ import main
from serve_app.__main__ import parse as parse_flags
from serve_app.config import AppConfig, LiveConfig, server_config
from serve_app.run import base_url, deploy

ROOT = Path(revmux.__file__).parents[1]


def test_a_busy_port_is_refused_before_anything_starts(serving_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--model", str(serving_model), "--port", port]) == 2
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_refused_before_anything_starts(serving_model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="not an adapter folder"):
        deploy(server_config(model=str(serving_model), adapters=[str(serving_model)], port=port))


def test_an_adapter_of_another_model_is_refused_before_anything_starts(
    serving_model: Path,
    serving_adapters: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.app.build", lambda args: pytest.fail("the application was built"))
    other = tmp_path / serving_model.name
    other.mkdir()
    write_identifying_model(other, seed=1)
    adapter = str(serving_adapters[0])
    capsys.readouterr()  # discard the progress bars of saving the models
    assert main(["--model", str(other), "--adapters", adapter, "--port", str(free_port())]) == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    assert f"adapter {adapter!r} was trained on {serving_model.name} (sha256 " in shown
    assert f"but the given backbone is {other} (sha256 " in shown


def test_unknown_or_invalid_configuration_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_multiplx.*known keys: .*max_multiplex, "):
        server_config(model="m", max_multiplx=4)
    with pytest.raises(UserError, match="max_queue"):
        server_config(model="m", max_queue=0)
    with pytest.raises(UserError, match=r"max_texts \(33\) exceeds max_queue \(32\)"):
        server_config(model="m", max_queue=32, max_texts=33)
    assert server_config(model="m", max_queue=16).max_texts == 16  # the default follows a short queue
    with pytest.raises(ValidationError, match="port"):
        AppConfig(model="m", port=80)  # type: ignore[call-arg]


def test_command_line_strings_become_settings(serving_model: Path, serving_adapters: list[Path]) -> None:
    adapter = str(serving_adapters[0])
    config = AppConfig.model_validate(
        {"model": str(serving_model), "adapters": f"{adapter}, models:/toy@best", "max_queue": "40"}
    )
    assert config.adapters == [adapter, "models:/toy@best"]
    assert config.max_queue == 40
    for given in ("a,b", "[a, b]"):
        assert parse_flags(["--model", "m", "--adapters", given]).adapters == ["a", "b"]


def test_the_address_is_localhost_by_default() -> None:
    assert server_config(model="m").host == "127.0.0.1"
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"


def test_the_deployment_file_is_valid_and_listens_on_localhost() -> None:
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load((ROOT / "serve_app" / "serve.yaml").read_text())
    assert set(raw) <= set(ServeDeploySchema.model_fields)
    schema = ServeDeploySchema.model_validate(raw)
    assert schema.http_options.host == "127.0.0.1"
    assert schema.applications[0].import_path == "serve_app.app:build"
    AppConfig.model_validate(schema.applications[0].args)


def test_a_full_replica_passes_requests_on() -> None:
    from serve_app.app import build

    deployment = build(AppConfig(model="m", max_queue=300, num_replicas=2))._bound_deployment
    assert deployment.max_ongoing_requests == deployment.max_queued_requests == 300 + 128
    assert deployment.num_replicas == 2
    several = {f"t{number}": {"model": "m"} for number in range(3)}
    config = AppConfig.model_validate({"tasks": several, "max_queue": 300, "max_ongoing_requests": 3 * 428})
    assert build(config)._bound_deployment.max_ongoing_requests == 3 * 428
    with pytest.raises(
        UserError, match=r"max_ongoing_requests \(429\) exceeds .* \(428\), so a full replica would never"
    ):
        server_config(model="m", max_queue=300, max_ongoing_requests=429)


def test_front_ends_share_what_their_engine_may_hold_and_take_no_gpu() -> None:
    from serve_app.app import build

    front_ends = build(AppConfig(model="m", num_replicas=2, front_ends=3, num_gpus=1, num_cpus=2))._bound_deployment
    engines = front_ends.init_args[1]._bound_deployment
    assert (front_ends.name, front_ends.num_replicas, front_ends.max_ongoing_requests) == ("classifier", 6, 214)
    assert (engines.name, engines.num_replicas) == ("engine", 2)
    for deployment, cpus, gpus in ((front_ends, 0.1, 0), (engines, 2, 1)):
        assert (deployment.ray_actor_options["num_cpus"], deployment.ray_actor_options["num_gpus"]) == (cpus, gpus)
    assert set(engines.user_config["tasks"]) == {"default"}
    assert not front_ends.user_config


def test_autoscaling_waits_until_replicas_answer_in_groups() -> None:
    with pytest.raises(UserError, match=r"target_ongoing_requests \(32\) is not above plain_load \(40\)"):
        server_config(model="m", plain_load=40, autoscaling={})
    with pytest.raises(UserError, match=r"target_ongoing_requests \(200\) exceeds max_ongoing_requests \(160\)"):
        server_config(model="m", max_queue=32, autoscaling={"target_ongoing_requests": 200})
    assert server_config(model="m", plain_load=31, autoscaling={}).ongoing_requests == 512 + 128


def test_replicas_have_the_environment_variables_of_a_model_that_shares_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve_app.app import build

    def variables() -> dict[str, str]:
        return build(AppConfig(model="m"))._bound_deployment.ray_actor_options["runtime_env"]["env_vars"]

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert variables()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert variables().keys() >= {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert variables()["OMP_WAIT_POLICY"] == "ACTIVE"


def test_settings_that_may_change_without_a_restart_are_in_user_config() -> None:
    from serve_app.app import build

    config = AppConfig(model="m", adapters=["a"], drain_seconds=7, num_gpus=0.5, autoscaling={"max_replicas": 3})
    deployment = build(config)._bound_deployment
    assert deployment.user_config["tasks"]["default"]["adapters"] == ["a"]
    assert LiveConfig.model_validate(deployment.user_config).tasks == config.served
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 32)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    assert deployment.ray_actor_options["num_gpus"] == 0.5


def test_one_task_or_several_but_not_both() -> None:
    several = {"a": {"model": "m"}, "b": {"model": "n", "adapters": "x,y"}}
    assert AppConfig.model_validate({"tasks": several}).served["b"].adapters == ["x", "y"]
    assert list(AppConfig(model="m").served) == ["default"]
    for wrong in ({}, {"model": "m", "tasks": several}, {"tasks": several, "adapters": ["x"]}, {"tasks": {"a/b": {}}}):
        with pytest.raises(ValidationError, match="task"):
            AppConfig.model_validate(wrong)
    with pytest.raises(UserError, match="min_replicas"):
        server_config(model="m", autoscaling={"min_replicas": 3, "max_replicas": 2})
