"""docs/operations.md: its commands name files that exist and options that the jobs know."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs import cli
from ray_jobs.bulk.config import ClassifyJob
from ray_jobs.training.config import TrainJob

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/operations.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
(VALUES,) = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
JOBS: dict[str, Any] = {"train": TrainJob, "classify": ClassifyJob}
TOOLS = {"revmux", "pip", "docker", "ray", "helm", "kubectl", "export"}


def job_commands() -> list[list[str]]:
    """The commands of jobs: those of the chart, and those that ``ray job submit`` sends."""
    submitted = [command.split(" -- ", 1)[1] for command in COMMANDS if " -- python -m ray_jobs." in command]
    return [
        shlex.split(text) for text in [*submitted, *(job["command"] for job in VALUES["jobs"] + VALUES["cronJobs"])]
    ]


def test_the_page_has_commands_of_every_tool() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} == TOOLS
    assert len(job_commands()) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_a_command_exist(command: str) -> None:
    own = {"my-values.yaml", "train.yaml", "serve.yaml"}  # the reader's
    for word in shlex.split(command):
        if word.endswith(".yaml") or word.startswith("deploy/"):
            assert word in own or (ROOT / word).exists(), word


@pytest.mark.parametrize("command", job_commands(), ids=" ".join)
def test_jobs_know_their_options(command: list[str], tmp_path: Path) -> None:
    assert command[:2] == ["python", "-m"]
    settings = JOBS[command[2].removeprefix("ray_jobs.")]
    arguments = command[3:]
    if "--config" in arguments:
        (page,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/jobs.md").read_text(), re.S)
        (tmp_path / "train.yaml").write_text(page)
        arguments = ["--config", str(tmp_path / "train.yaml")]
    assert cli.parse(settings, None, arguments).cluster.use_gpu


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
