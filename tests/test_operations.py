"""docs/operations.md: its commands run, or the parsers of their tools accept them, and its settings are valid."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml
from pip._internal.commands import create_command
from polling import wait_until
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_cli
from ray_machines import cluster_of_machines, environment_in
from serving_http import free_port
from tiny_models import LABELS

import revmux.__main__
from ray_jobs import cli
from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.training.config import TrainJob
from serve_app.config import AppConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/operations.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
SERVE, VALUES = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
TRAIN = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/jobs.md").read_text(), re.S)[0])
JOBS: dict[str, Any] = {"train": TrainJob, "classify": ClassifyJob}
OWN = {"my-values.yaml", "train.yaml", "serve.yaml", "jobs/serve.yaml"}
"""Files that the reader writes."""


def page_commands() -> list[str]:
    """The lines of the blocks without a language, and the commands with arguments in sentences."""
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    tools = {line.split()[0] for line in lines} | {"python"}
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.S | re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return lines + [span for span in spans if re.match(r"python \S|\S+ \S+ \S", span) and span.split()[0] in tools]


COMMANDS = list(dict.fromkeys(page_commands()))


def click_parses(group: click.Command, words: list[str]) -> None:
    """Let the tool's own parser read a command, without running it."""
    name = ""
    while isinstance(group, click.Group):
        name, *words = words
        group = group.commands[name]
    group.make_context(name, words)


def client_parses(words: list[str], reached: str, **environment: str) -> None:
    """Run a client that then finds no server; the options are read before."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    if "unknown command: docker buildx" in done.stderr:
        pytest.skip("this docker has no buildx")
    assert re.search(reached, done.stderr), done.stderr


def ray(words: list[str]) -> None:
    click_parses(ray_cli, words[1:])
    if "--" in words:
        check(shlex.join(words[words.index("--") + 1 :]))


def serve(words: list[str]) -> None:
    click_parses(serve_cli, words[1:])


def python(words: list[str]) -> None:
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    settings, arguments = JOBS[words[2].removeprefix("ray_jobs.")], words[3:]
    if "--config" in arguments:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(yaml.safe_dump(TRAIN))
            file.flush()
            assert cli.parse(settings, None, ["--config", file.name]).cluster.use_gpu
        return
    assert cli.parse(settings, None, arguments).cluster.use_gpu


def own(words: list[str]) -> None:
    """A command of revmux."""
    options = {word.removeprefix("--") for word in words if word.startswith("--")}
    settings = ClassifyJob if words[1] == "classify" else getattr(revmux.__main__, words[1])
    assert options <= inspect.signature(settings).parameters.keys()


def pip(words: list[str]) -> None:
    create_command(words[1]).parse_args(words[2:])


def docker(words: list[str]) -> None:
    client_parses(words, "Cannot connect to the Docker daemon|no such host|i/o timeout", DOCKER_HOST="unix:///nowhere")


def aws(words: list[str]) -> None:
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    client_parses(words, "Could not connect to the endpoint URL", **nowhere, **keys)


def gcloud(words: list[str]) -> None:
    if words[1:3] == ["auth", "application-default"]:  # it would wait for a browser
        words = [*words, "--help"]
    with tempfile.TemporaryDirectory() as folder:
        unknown = {"CLOUDSDK_CONFIG": folder, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "PAGER": "cat"}
        client_parses(words, "do not currently have an active account|^$", **unknown)


def kubectl(words: list[str]) -> None:
    if words[1] != "create":
        client_parses([*words, "--server=http://127.0.0.1:1"], "connection refused|was refused", KUBECONFIG="/dev/null")
        return
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([*words, "--dry-run=client", "--output=json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metadata"]["name"] in ("revmux", "revmux-env")


def helm(words: list[str]) -> None:
    """Render the chart with the options; Helm's other commands have a known form."""
    if words[1] == "repo":
        assert words[2:4] == ["add", "kuberay"]
        assert len(words) == 5
        return
    if words[1] == "uninstall":
        return
    assert words[1] in ("install", "upgrade")
    release, chart, *options = words[2:]
    if chart == "kuberay/kuberay-operator":
        assert options[::2] == ["--set", "--set"]
        return
    assert set(options[::2]) <= {"--namespace", "--values", "--set"}
    charts = pytest.importorskip("helm_python.chart", reason="helm-python-sdk has no wheel for this platform")
    texts = [text for name, text in zip(options[::2], options[1::2]) if name == "--set"]
    values = VALUES | dict(text.split("=") for text in texts)
    with charts.Chart.load(str(ROOT / chart)) as loaded:
        pages = loaded.render(values, name=release, namespace="revmux")
    assert not texts or "name: revmux-env" in "".join(pages.values())


def curl(words: list[str]) -> None:
    """The server's answers are those of the test that runs it; see :func:`test_jobs_and_the_server_run_as_the_page_says`."""
    bodies = [json.loads(words[place + 1]) for place, word in enumerate(words) if word == "-d"]
    assert all(body.keys() == {"inputs"} for body in bodies)


def export(words: list[str]) -> None:
    assert words == ["export", "RAY_AUTH_MODE=token"]


CHECKS: dict[str, Callable[[list[str]], None]] = {
    function.__name__: function
    for function in (ray, serve, python, pip, docker, aws, gcloud, kubectl, helm, curl, export)
} | {"revmux": own}


def check(command: str) -> None:
    words = shlex.split(command)
    CHECKS[words[0]](words)


def test_the_page_uses_every_tool() -> None:
    assert {command.split()[0] for command in COMMANDS} | {"serve"} == CHECKS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_valid(command: str) -> None:
    check(command)
    for word in shlex.split(command):
        if word.endswith(".yaml") or word.startswith("deploy/"):
            assert word in OWN or (ROOT / word).exists(), word


@pytest.mark.parametrize(
    "command",
    [
        "ray up --no-such-option cluster.yaml",
        "docker build --no-such-option .",
        "aws cloudformation deploy --no-such-option x --stack-name revmux --template-file deploy/aws-account.yaml",
        "gcloud storage buckets create gs://my-bucket --no-such-option x",
        "kubectl get rayservice revmux --no-such-option",
        "revmux cost --no-such-option 1",
        "pip wheel --no-such-option .",
    ],
)
def test_a_wrong_option_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, click.NoSuchOption)):
        check(command)


@pytest.mark.parametrize("job", VALUES["jobs"] + VALUES["cronJobs"], ids=lambda job: job["name"])
def test_jobs_of_the_chart_know_their_options(job: dict[str, str]) -> None:
    check(job["command"])


def test_the_server_accepts_the_pages_settings() -> None:
    (application,) = ServeDeploySchema(**SERVE).applications
    assert application.import_path == "serve_app.app:build"
    config = AppConfig(**application.args)
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert config.num_cpus <= types["gpu_worker"]["resources"]["CPU"]
    assert config.num_gpus <= types["gpu_worker"]["resources"]["GPU"]


def test_the_template_of_the_aws_account_follows_its_schema() -> None:
    api = pytest.importorskip("cfnlint.api", reason="cfn-lint is not installed; run: pip install 'revmux[dev]'")
    file = ROOT / "deploy/aws-account.yaml"
    assert api.lint(file.read_text(), regions=["us-west-2"]) == []
    text = "".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith("#"))
    profiles = set(re.findall(r"InstanceProfileName: ([\w-]+)", text))
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in types.values()} == profiles


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(600)
def test_jobs_and_the_server_run_as_the_page_says(tiny_model_folder: Path, tiny_csv: Path) -> None:
    """The page's own commands for jobs, on a cluster with a machine for drivers; only ports and settings are others."""
    port, dashboard = free_port(), free_port()
    submits = [command for command in COMMANDS if command.startswith("ray job submit")]
    train = TRAIN | {
        "backbone": {"model": str(tiny_model_folder), "max_length": 16},
        "data": {"source": str(tiny_csv)},
        "method": TRAIN["method"] | {"prefill_layers": 1},
        "num_inputs": [2],
        "optim": {"epochs": 1, "batch_size": 8},
        "cluster": TRAIN["cluster"] | {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0},
    }
    del train["tracking"]
    with (
        tempfile.TemporaryDirectory(prefix="ops-", dir="/tmp") as name,  # Ray's socket paths must stay short
        cluster_of_machines(
            Path(name),
            # For `serve deploy`, which asks at port 8265 otherwise.
            environment_in(Path(name)) | {"RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}"},
            dashboard=dashboard,
        ) as machines,
    ):
        folder = Path(name)
        machines.add("--num-cpus=0", '--resources={"driver": 1}')
        train["storage"] = f"{folder}/runs"
        (application,) = SERVE["applications"]
        arguments = {
            "model": str(tiny_model_folder),
            "adapters": [f"{folder}/runs/adapters/revmux-n2-l1"],
            "num_cpus": 1,
        }
        settings = SERVE | {
            "http_options": SERVE["http_options"] | {"port": port},
            "applications": [application | {"args": arguments}],
        }
        (folder / "jobs").mkdir()
        (folder / "jobs/train.yaml").write_text(yaml.safe_dump(train))
        (folder / "jobs/serve.yaml").write_text(yaml.safe_dump(settings))
        wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}"))
        outputs = []
        for command in submits:
            words = shlex.split(command.replace("127.0.0.1:8265", f"127.0.0.1:{dashboard}"))
            done = subprocess.run(words, cwd=folder, env=machines.environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            outputs.append(done.stdout + done.stderr)
        assert len(outputs) == 2
        assert "1 worker (gloo, cpu" in outputs[0]  # no other machine than that for drivers could start the job
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        for command in [command for command in COMMANDS if command.startswith("curl")]:
            words = shlex.split(command.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
            reply = subprocess.run([*words, "--fail"], check=True, capture_output=True).stdout
            if "/predict" in command:
                assert {item["label"] for item in json.loads(reply)} == set(LABELS)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code in (200, 401)
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_drivers_of_submitted_jobs_run_off_the_head(page: Path) -> None:
    """Every command that submits a job to a cluster of several machines asks for the resource of the drivers' machines."""
    text = page.read_text().replace("\\\n", "")
    if page.name == "jobs.md":  # its first commands are for a single machine
        (_, text) = text.split("## On many GPUs")
    for command in re.findall(r"ray job submit .*ray_jobs\..*", text):
        assert "--entrypoint-resources '{\"driver\": 1}' -- " in re.sub(r"\s+", " ", command), command
    for file in ("cluster.yaml", "deploy/cluster-gcp.yaml"):
        types = yaml.safe_load((ROOT / file).read_text())["available_node_types"]
        assert [name for name, kind in types.items() if kind["resources"].get("driver")] == ["driver"]


@pytest.mark.parametrize("link", re.findall(r"\]\((\.\./[^)#]+)\)", PAGE))
def test_linked_files_exist(link: str) -> None:
    assert (ROOT / "docs" / link).exists()
