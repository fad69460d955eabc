"""Deployment files: valid by Ray's schema, with pinned versions, authentication, and a note at every placeholder."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from ray.serve.schema import ServeDeploySchema

import revmux
from ray_jobs import cli
from ray_jobs.training.config import TrainJob
from serve_app.config import AppConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs/examples"
KUBERNETES = ["rayservice.yaml", "rayjob.yaml"]
PLACEHOLDER = re.compile(r"0123456789abcdef0|registry\.example\.com|us-west-2|claimName")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.fixture(scope="module")
def image(pins: dict[str, str]) -> str:
    """The image of the pinned Ray and the oldest Python, for which the constraints are made."""
    oldest = re.match(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert oldest is not None
    python = "".join(oldest.groups())
    return f"rayproject/ray:{pins['ray']}-py{python}"


def kubernetes_cluster(name: str) -> dict[str, Any]:
    spec = yaml.safe_load((EXAMPLES / name).read_text())["spec"]
    return spec.get("rayClusterConfig") or spec["rayClusterSpec"]


def test_cluster_file_follows_rays_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(cluster | {"min_workers": 0}, schema)


def test_images_are_pinned_to_the_constraints(cluster: dict[str, Any], image: str, pins: dict[str, str]) -> None:
    assert cluster["docker"]["head_image"] == image
    assert cluster["docker"]["worker_image"] == f"{image}-gpu"
    assert re.findall(r"^FROM (.*)$", (EXAMPLES / "Dockerfile").read_text(), re.M) == [f"{image}-gpu"]
    assert {kubernetes_cluster(name)["rayVersion"] for name in KUBERNETES} == {pins["ray"]}


def test_the_head_offers_no_gpu_and_workers_start_on_demand(cluster: dict[str, Any]) -> None:
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert head["resources"]["GPU"] == 0
    assert head["resources"]["CPU"] == 0
    assert types
    for kind in types.values():
        assert kind["min_workers"] == 0 < kind["max_workers"] <= cluster["max_workers"]
        assert kind["resources"]["GPU"] >= 1


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_kubernetes_head_offers_no_resources_and_workers_start_on_demand(name: str) -> None:
    spec = kubernetes_cluster(name)
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_every_node_has_the_token_and_requires_it(cluster: dict[str, Any]) -> None:
    assert any("RAY_AUTH_MODE=token" in option for option in cluster["docker"]["run_options"])
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    for name in KUBERNETES:
        assert kubernetes_cluster(name)["authOptions"] == {"mode": "token"}


def test_the_dashboard_listens_only_on_the_head(cluster: dict[str, Any]) -> None:
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "security_group" not in cluster["provider"]  # Ray's default group opens only ssh


def test_the_setup_commands_install_the_mounted_code(cluster: dict[str, Any]) -> None:
    for name in (cluster["setup_commands"][0], (EXAMPLES / "Dockerfile").read_text()):
        (text,) = re.findall(r'"(revmux\[.*?)"', name)
        requirement = Requirement(text)
        assert requirement.extras <= set(PROJECT["optional-dependencies"])
        assert requirement.url is not None
        assert requirement.url.endswith(f"/revmux-{revmux.__version__}-py3-none-any.whl")
    assert cluster["file_mounts"]["/home/ray/dist"] == "dist"  # a folder, because a mounted file would not be updated
    assert all("/home/ray/dist/revmux-" in command for command in cluster["setup_commands"])


@pytest.mark.parametrize(
    "file", [ROOT / "cluster.yaml", *(EXAMPLES / name for name in KUBERNETES)], ids=lambda f: f.name
)
def test_every_placeholder_says_that_it_must_be_changed(file: Path) -> None:
    lines = file.read_text().splitlines()
    marked = [number for number, line in enumerate(lines) if "# CHANGE: " in line]
    assert marked
    for number, line in enumerate(lines):
        if PLACEHOLDER.search(line):
            assert number in marked or number - 1 in marked, f"{file.name}:{number + 1}: {line}"


def test_the_server_accepts_the_served_application() -> None:
    spec = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text())["spec"]
    page = yaml.safe_load(spec["serveConfigV2"])
    (application,) = ServeDeploySchema(**page).applications
    assert page["http_options"].keys() <= {"host", "port"}
    assert application.import_path == "serve_app.app:build"
    config = AppConfig(**application.args)
    (group,) = kubernetes_cluster("rayservice.yaml")["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.num_cpus <= int(limits["cpu"])
    assert config.num_gpus <= int(limits["nvidia.com/gpu"])


def test_documented_jobs_have_valid_settings(tmp_path: Path) -> None:
    (page,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/jobs.md").read_text(), re.S)
    (tmp_path / "train.yaml").write_text(page)
    entrypoint = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())["spec"]["entrypoint"]
    flags = entrypoint.replace("'", "").split()
    assert flags[:3] == ["python", "-m", "ray_jobs.train"]
    for argv in (["--config", str(tmp_path / "train.yaml")], flags[3:]):
        job = cli.parse(TrainJob, None, argv)
        assert job.cluster.use_gpu
        for recipe in job.recipes().values():
            assert job.optim.batch_size % (recipe.method.num_inputs * job.cluster.workers) == 0
