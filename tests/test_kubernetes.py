"""The Helm chart: every object is valid by its schema, jobs and server have valid settings, and nothing is open or in plain text."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import revmux
from ray_jobs import cli
from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.training.config import TrainJob
from serve_app.config import AppConfig

helm = pytest.importorskip("helm_python.chart", reason="helm-python-sdk has no wheel for this platform")

CHART = Path(__file__).parents[1] / "deploy/helm/revmux"
VALUES = CHART / "values.yaml"
CRDS = "REVMUX_CRDS"
"""Environment variable with the folders of the custom resource definitions of KubeRay and of the Prometheus Operator, as in
PATH; the nightly workflow sets it."""
KUBERNETES = "1.32"

Objects = list[dict[str, Any]]
Render = Callable[..., Objects]


def commented_examples() -> dict[str, Any]:
    """The jobs that values.yaml shows as comments."""
    found: dict[str, Any] = {}
    name = ""
    for line in VALUES.read_text().splitlines():
        if line in ("jobs: []", "cronJobs: []"):
            name = line.split(":")[0]
            found[name] = ""
        elif name and line.startswith("#"):
            found[name] += line[2:] + "\n"
        elif not line:
            name = ""
    return {name: yaml.safe_load(text) for name, text in found.items()}


@pytest.fixture(scope="module")
def render() -> Render:
    """Renders the chart with some values changed: the objects, in namespace ``ml`` and release ``demo``."""

    def rendered(**values: Any) -> Objects:
        with helm.Chart.load(str(CHART)) as chart:
            pages = chart.render(values, name="demo", namespace="ml")
        texts = [text for path, text in pages.items() if path.endswith(".yaml")]
        return [found for text in texts for found in yaml.safe_load_all(text) if found]

    return rendered


@pytest.fixture(scope="module")
def everything(render: Render) -> Objects:
    """All objects that the chart can make."""
    return render(
        **commented_examples(),
        monitoring={"enabled": True, "labels": {"release": "prometheus"}, "dashboard": {"enabled": True}},
        envSecret="revmux-env",
    )


def of_kind(objects: Objects, kind: str) -> Objects:
    return [found for found in objects if found["kind"] == kind]


def ray_clusters(objects: Objects) -> Objects:
    jobs = [found["spec"] for found in of_kind(objects, "RayJob")]
    jobs += [found["spec"]["jobTemplate"] for found in of_kind(objects, "RayCronJob")]
    served = [found["spec"]["rayClusterConfig"] for found in of_kind(objects, "RayService")]
    return [job["rayClusterSpec"] for job in jobs] + served


def test_the_chart_passes_helms_lint() -> None:
    report = helm.lint(str(CHART), commented_examples(), strict=True)
    assert not report["errors"]


def test_kubernetes_accepts_every_object(everything: Objects) -> None:
    kinds = {found["kind"] for found in everything}
    assert kinds >= {
        "RayService",
        "RayJob",
        "RayCronJob",
        "Deployment",
        "StatefulSet",
        "PodDisruptionBudget",
        "PodMonitor",
    }
    for found in everything:
        if found["apiVersion"].split("/")[0] not in ("ray.io", "monitoring.coreos.com"):
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


@pytest.mark.skipif(CRDS not in os.environ, reason=f"{CRDS} is not set to folders with definitions")
def test_the_operators_accept_every_object(everything: Objects) -> None:
    folders = [Path(folder) for folder in os.environ[CRDS].split(os.pathsep)]
    pages = [yaml.safe_load(file.read_text()) for folder in folders for file in folder.glob("*.yaml")]
    versions = {page["spec"]["names"]["kind"]: page["spec"]["versions"] for page in pages}
    checked = set()
    for found in everything:
        group, _, version = found["apiVersion"].partition("/")
        if group in ("ray.io", "monitoring.coreos.com"):
            (schema,) = [one["schema"] for one in versions[found["kind"]] if one["name"] == version]
            jsonschema.validate(found, strict(schema["openAPIV3Schema"]) | {"additionalProperties": True})
            checked.add(found["kind"])
    assert checked == {"RayService", "RayJob", "RayCronJob", "PodMonitor", "ScrapeConfig"}


def strict(schema: Any) -> Any:
    """The schema of Kubernetes as a JSON schema that refuses unknown keys, as ``kubectl create --validate=strict`` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    if found.get("x-kubernetes-int-or-string") is True:
        found["type"] = ["integer", "string"]
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        is_open = "metadata" in found["properties"] or found.get("x-kubernetes-preserve-unknown-fields")
        found.setdefault("additionalProperties", bool(is_open))
    return found


def test_the_head_runs_no_model_and_workers_start_on_demand(everything: Objects) -> None:
    clusters = ray_clusters(everything)
    assert len(clusters) == 3
    for cluster in clusters:
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        (gpu,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
        (container,) = gpu["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_drivers_of_jobs_run_on_nodes_of_their_own(everything: Objects) -> None:
    jobs = [found["spec"] for found in of_kind(everything, "RayJob")]
    jobs += [found["spec"]["jobTemplate"] for found in of_kind(everything, "RayCronJob")]
    for job in jobs:
        wanted = yaml.safe_load(job["entrypointResources"])
        groups = {
            group["groupName"]: yaml.safe_load(yaml.safe_load(group["rayStartParams"].get("resources", "'{}'")))
            for group in job["rayClusterSpec"]["workerGroupSpecs"]
        }
        assert [name for name, offered in groups.items() if wanted.items() <= offered.items()] == ["driver"]
        assert job["backoffLimit"] > 0  # a job continues from its last checkpoint


def test_every_cluster_requires_a_token_and_the_server_outlives_its_head(everything: Objects) -> None:
    assert all(cluster["authOptions"] == {"mode": "token"} for cluster in ray_clusters(everything))
    (service,) = of_kind(everything, "RayService")
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "demo-redis:6379"
    assert set(options["redisPassword"]) == {"valueFrom"}


def test_no_password_is_in_plain_text_and_no_container_is_privileged(everything: Objects) -> None:
    secrets = of_kind(everything, "Secret")
    assert len(secrets) == 2
    passwords = [secret["data"]["password"] for secret in secrets]
    assert len(set(passwords)) == 2
    text = yaml.safe_dump([found for found in everything if found["kind"] != "Secret"])
    assert not any(password in text for password in passwords)

    def containers(node: Any) -> Objects:
        if isinstance(node, list):
            return [found for part in node for found in containers(part)]
        if not isinstance(node, dict):
            return []
        return [*node.get("containers", []), *(found for part in node.values() for found in containers(part))]

    found = containers(everything)
    assert len(found) > 8
    for container in found:
        assert container["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_policies_open_only_the_servers_port(everything: Objects) -> None:
    policies = {found["metadata"]["name"]: found["spec"] for found in of_kind(everything, "NetworkPolicy")}
    for name, spec in policies.items():
        unrestricted = [rule for rule in spec["ingress"] if "from" not in rule]
        ports = [port["port"] for rule in unrestricted for port in rule["ports"]]
        assert ports == ([8000] if name == "demo-ray" else [])
    for kind in ("Deployment", "StatefulSet"):
        for found in of_kind(everything, kind):
            labels = found["spec"]["template"]["metadata"]["labels"]
            selector = policies[found["metadata"]["name"]]["podSelector"]
            assert selector.keys() == {"matchLabels"}
            assert selector["matchLabels"].items() <= labels.items()


def test_only_named_namespaces_reach_the_server(render: Render) -> None:
    objects = render(serve={"allowFromNamespaces": ["shop"]})
    (spec,) = [one["spec"] for one in of_kind(objects, "NetworkPolicy") if one["metadata"]["name"] == "demo-ray"]
    (rule,) = [rule for rule in spec["ingress"] if {"port": 8000} in rule.get("ports", [])]
    (selected,) = rule["from"][0]["namespaceSelector"]["matchExpressions"]
    assert selected["values"] == ["shop"]


def test_the_server_accepts_its_settings(render: Render) -> None:
    (service,) = of_kind(render(), "RayService")
    page = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema(**page).applications
    assert application.import_path == "serve_app.app:build"
    config = AppConfig(**application.args)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.num_cpus <= int(limits["cpu"])
    assert config.num_gpus <= int(limits["nvidia.com/gpu"])


def test_the_example_jobs_have_valid_settings(everything: Objects) -> None:
    (train,) = of_kind(everything, "RayJob")
    (classify,) = of_kind(everything, "RayCronJob")
    flags = shlex.split(train["spec"]["entrypoint"])
    assert flags[:3] == ["python", "-m", "ray_jobs.train"]
    job = cli.parse(TrainJob, None, flags[3:])
    assert job.tracking.uri == "http://demo-mlflow:5000"
    assert all(
        job.optim.batch_size % (one.method.num_inputs * job.cluster.workers) == 0 for one in job.recipes().values()
    )
    flags = shlex.split(classify["spec"]["jobTemplate"]["entrypoint"])
    assert flags[:3] == ["python", "-m", "ray_jobs.classify"]
    assert cli.parse(ClassifyJob, None, flags[3:]).cluster.use_gpu


def test_pods_have_the_places_secrets_and_caches_of_the_values(render: Render) -> None:
    place = {"nodeSelector": {"gpu": "l4"}, "tolerations": [{"key": "spot", "operator": "Exists"}]}
    for cluster in ray_clusters(render(**commented_examples(), envSecret="revmux-env", gpuWorkers=place)):
        (gpu,) = [group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu"]
        pod = gpu["template"]["spec"]
        assert {name: pod[name] for name in place} == place
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "revmux-env"}}]
        (home,) = [variable["value"] for variable in container["env"] if variable["name"] == "HF_HOME"]
        assert home in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_server_changes_over_to_a_new_image_and_keeps_a_worker(everything: Objects) -> None:
    (service,) = of_kind(everything, "RayService")
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    (budget,) = of_kind(everything, "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 1
    labels = [
        group["template"]["metadata"]["labels"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    ]
    assert all(budget["spec"]["selector"]["matchLabels"].items() <= found.items() for found in labels)


def test_parts_that_the_user_brings_are_not_made(render: Render) -> None:
    objects = render(
        storage={"existingClaim": "mine"},
        modelCache={"enabled": False},
        mlflow={"databaseSecret": "database", "artifacts": "s3://bucket/mlflow"},
        gcsFaultTolerance={"address": "redis.example.com:6379", "passwordSecret": "redis"},
    )
    assert not of_kind(objects, "StatefulSet")
    assert not of_kind(objects, "Secret")
    assert not of_kind(objects, "PersistentVolumeClaim")
    text = yaml.safe_dump(objects)
    assert "claimName: mine" in text
    assert "HF_HOME" not in text


def test_no_volume_is_needed_with_an_object_store(render: Render) -> None:
    with pytest.raises(Exception, match="set mlflow"):
        render(storage={"enabled": False})
    objects = render(
        storage={"enabled": False}, modelCache={"enabled": False}, mlflow={"artifacts": "s3://bucket/mlflow"}
    )
    assert not of_kind(objects, "PersistentVolumeClaim")
    assert "/mnt/revmux/" not in yaml.safe_dump([one for one in objects if one["kind"] != "RayService"])
    assert "claimName" not in yaml.safe_dump(objects)


def test_grafana_finds_the_dashboard_by_its_label(render: Render, everything: Objects) -> None:
    assert not of_kind(render(), "ConfigMap")
    (found,) = of_kind(everything, "ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["data"]["revmux.json"] == (CHART / "dashboards/revmux.json").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serve": {"enabledd": True}}, "enabledd"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"jobs": [{"name": "train", "command": "rm -rf /"}]}, "command"),
        (
            {"cronJobs": [{"name": "a" * 32, "schedule": "0 2 * * *", "command": "revmux classify"}]},
            "KubeRay allows 36",
        ),
    ],
)
def test_wrong_values_are_refused(render: Render, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        render(**values)


def test_versions_agree_with_the_package() -> None:
    chart, values = (yaml.safe_load((CHART / name).read_text()) for name in ("Chart.yaml", "values.yaml"))
    assert chart["appVersion"] == values["image"]["tag"] == revmux.__version__
    pins = dict(
        line.split("==") for line in (CHART.parents[2] / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert values["rayVersion"] == pins["ray"]
