"""The cluster files and the image: valid by Ray's schema, with pinned versions, authentication, and a note at every placeholder."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import revmux
from ray_jobs import cli
from ray_jobs.training.config import TrainJob

ROOT = Path(__file__).parents[1]
CLUSTERS = {name: ROOT / name for name in ("cluster.yaml", "deploy/cluster-gcp.yaml")}
DOCKERFILE = ROOT / "deploy/Dockerfile"
PLACEHOLDER = re.compile(
    r"0123456789abcdef0|registry\.example\.com|us-(west|central)\d-|my-project|10\.0\.0\.2|Profile:"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(CLUSTERS[request.param].read_text())


def test_cluster_file_follows_rays_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(cluster | {"min_workers": 0}, schema)


def test_nodes_start_from_an_image_and_install_nothing(cluster: dict[str, Any]) -> None:
    assert cluster["docker"]["image"] == f"registry.example.com/revmux:{revmux.__version__}"
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert cluster[name] == []


def test_the_head_offers_no_gpu_and_workers_start_on_demand(cluster: dict[str, Any]) -> None:
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert head["resources"]["GPU"] == 0
    assert head["resources"]["CPU"] == 0
    assert sum(kind["max_workers"] for kind in types.values()) == cluster["max_workers"]
    driver = types.pop("driver")
    assert driver["resources"] == {"CPU": 0, "GPU": 0, "driver": 1}
    assert not {"InstanceMarketOptions", "scheduling"} & driver["node_config"].keys()  # no spot machine
    assert types
    for kind in [driver, *types.values()]:
        assert kind["min_workers"] == 0 < kind["max_workers"]
    for kind in types.values():
        assert kind["resources"]["GPU"] >= 1
        assert "driver" not in kind["resources"]


def test_all_nodes_are_in_one_zone_and_may_use_the_buckets(cluster: dict[str, Any]) -> None:
    assert "," not in cluster["provider"]["availability_zone"]
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}


def test_every_node_has_the_token_and_requires_it(cluster: dict[str, Any]) -> None:
    assert any("RAY_AUTH_MODE=token" in option for option in cluster["docker"]["run_options"])
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_listens_only_on_the_head(cluster: dict[str, Any]) -> None:
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "security_group" not in cluster["provider"]  # Ray's default group opens only ssh


def test_the_image_installs_the_wheel_with_the_pins_for_the_oldest_python() -> None:
    text = DOCKERFILE.read_text()
    for cloud in ("aws", "gcp"):
        (found,) = re.findall(r'"(revmux\[.*?)"', text)
        requirement = Requirement(found.replace("${CLOUD}", cloud))
        assert requirement.extras <= set(PROJECT["optional-dependencies"])
        assert requirement.url is not None
        assert requirement.url.endswith(f"/revmux-{revmux.__version__}-py3-none-any.whl")
    assert "-c /tmp/constraints.txt" in text
    oldest = re.match(r">=(\d+\.\d+)", PROJECT["requires-python"])
    assert oldest is not None
    assert f"FROM python:{oldest.group(1)}-slim" in text
    assert "\nUSER 1000\n" in text
    written = re.search(r"python -m serve_app.ray_environment > (\S+)", text)
    assert written is not None
    assert f"BASH_ENV={written.group(1)}" in text


def test_ray_is_tested_in_all_versions_that_may_be_installed() -> None:
    """The nightly workflow has the newest of each minor version in the range, beside the one that all other tests use."""
    extras = PROJECT["optional-dependencies"]
    ranges = {
        Requirement(text).specifier for text in itertools.chain(*extras.values()) if Requirement(text).name == "ray"
    }
    (allowed,) = ranges
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    nightly = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    tested = [Version(text) for text in (*nightly["jobs"]["test-ray"]["strategy"]["matrix"]["ray"], pinned)]
    assert all(version in allowed for version in tested)
    minors = [version.minor for version in tested]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"2.{minors[0] - 1}.99" not in allowed
    assert f"2.{minors[-1] + 1}.0" not in allowed


def test_the_image_passes_hadolint() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_of_the_image_is_pinned_by_digest_and_kept_up_to_date() -> None:
    base, *others = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.M)
    assert re.fullmatch(r"python:\S+@sha256:[0-9a-f]{64}", base)
    assert set(others) == {"base"}
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert ("docker", "/deploy") in [(one["package-ecosystem"], one["directory"]) for one in updates]


@pytest.mark.parametrize("file", CLUSTERS.values(), ids=CLUSTERS)
def test_every_placeholder_says_that_it_must_be_changed(file: Path) -> None:
    lines = file.read_text().splitlines()
    marked = [number for number, line in enumerate(lines) if "# CHANGE: " in line]
    assert marked
    for number, line in enumerate(lines):
        if PLACEHOLDER.search(line) and not line.startswith("#"):
            assert any(number - 3 <= mark <= number for mark in marked), f"{file.name}:{number + 1}: {line}"


def test_the_documented_job_has_valid_settings(tmp_path: Path) -> None:
    (page,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/jobs.md").read_text(), re.S)
    (tmp_path / "train.yaml").write_text(page)
    job = cli.parse(TrainJob, None, ["--config", str(tmp_path / "train.yaml")])
    assert job.cluster.use_gpu
    for recipe in job.recipes().values():
        assert job.optim.batch_size % (recipe.method.num_inputs * job.cluster.workers) == 0
