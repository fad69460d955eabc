"""The plan as a job: sweep, choice, registration, Serve configuration, deployment, and requests over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from serving_models import load, write_adapter, write_model

from ray_jobs import cli, plan
from ray_jobs.cluster import ClusterConfig, connected
from ray_jobs.planning import run as planning
from ray_jobs.planning.config import PlanJob
from ray_jobs.tracking.model_registry import model_uris, register_plan
from revmux import UserError
from revmux.adapters.config import load_adapter_config
from revmux.data.config import DataConfig
from revmux.data.prompt import load_prompt
from revmux.features.config import StoreConfig
from revmux.plan.candidate import Candidate, PlannedStage
from revmux.plan.choose import choose, verify
from revmux.plan.config import Goal, MeasureConfig
from revmux.plan.files import write_stages
from revmux.plan.plan import Plan, Served
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import OptimConfig
from serve_app.config import AppConfig, server_config
from serve_app.run import deploy, shutdown
from serve_app.sources import fetch_adapter


@pytest.fixture(scope="module")
def job(tiny_model_folder: Path, tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> PlanJob:
    folder = tmp_path_factory.mktemp("plan")
    space = folder / "space.yaml"
    space.write_text("{num_inputs: [2, 4], prefill_layers: [1], infonce_weight: [0.25], epochs: 1}")
    return PlanJob(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16),
        data=DataConfig(source=str(tiny_csv)),
        space=str(space),
        optim=OptimConfig(batch_size=8),
        store=StoreConfig(root=str(folder / "store")),
        shuffles=1,
        concurrent_trials=1,  # one process for both trials
        storage=str(folder / "runs"),
        goal=Goal(allowance=100.0),
        measure=MeasureConfig(shuffles=2, thresholds=(0.6,), throughput_inputs=0),  # counted, so equal on every machine
        register="reviews",
    )


@pytest.fixture(scope="module")
def ray_here(job: PlanJob) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{job.storage}/mlflow.db")
        with connected(ClusterConfig(workers=1)):
            yield


@pytest.mark.cluster("serve")
@pytest.mark.timeout(600)
def test_a_plan_can_be_deployed_with_the_promised_widths(job: PlanJob, ray_here: None) -> None:
    found = plan.main(job)
    folder = Path(job.storage) / "plans" / "plan"
    written = json.loads((folder / "plan.json").read_text())
    assert written["is_met"]
    assert written["chosen"] == found.served[-1].judged.candidate.name

    client = MlflowClient(f"sqlite:///{job.storage}/mlflow.db")
    versions = {str(version.version): version for version in client.search_model_versions("name = 'reviews'")}
    model = client.get_registered_model("reviews")
    assert model.aliases.keys() >= {"champion", "fast", "exact"}  # later stages of a ladder have their own
    champion = versions[str(model.aliases["champion"])]
    assert champion.tags["num_inputs"] == str(found.served[-1].num_inputs)
    assert champion.tags["system"].endswith(written["chosen"])
    adapters = [row for row in found.rows if row.method != "siso"]
    ends = {min(adapters, key=lambda row: row.cost).name, max(adapters, key=lambda row: row.accuracy).name}
    assert ends & {version.tags["system"].rpartition("/")[2] for version in versions.values()}
    assert written["registered"]["versions"][written["chosen"]] == [str(model.aliases["champion"])]
    threshold = load_adapter_config(fetch_adapter("models:/reviews@champion", folder)).fallback_threshold
    assert champion.tags["fallback_threshold"] == ("none" if threshold is None else f"{threshold:g}")
    experiment = client.get_experiment_by_name("revmux")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'plan'")
    assert {"plan/plan.md", "plan/serve.yaml", "plan/front.html"} <= {
        item.path for item in client.list_artifacts(parent.info.run_id, "plan")
    }
    assert {"promised_loss", "verified_loss"} <= parent.data.metrics.keys()

    settings = yaml.safe_load((folder / "serve.yaml").read_text())
    (application,) = settings["applications"]
    assert application["args"]["adapters"][-1] == "models:/reviews@champion"
    AppConfig(**application["args"])
    url = deploy(server_config(**application["args"] | {"port": 8751, "plain_load": 0.0}))
    try:
        widths = [one.num_inputs for one in found.served]
        reported = requests.get(f"{url}/info", timeout=60).json()
        assert all(f'"num_inputs": {width}' in json.dumps(reported) for width in widths)
        reply = requests.post(
            f"{url}/predict", json={"inputs": [["w1 w5"], ["w2 w6"], ["w1 w7"], ["w2 w8"]]}, timeout=60
        )
        assert reply.status_code == 200
        assert {int(width) for width in reply.headers["x-revmux-width"].split(",")} == {widths[-1]}
    finally:
        shutdown()


@pytest.mark.cluster("serve")
@pytest.mark.timeout(600)
def test_an_unreachable_goal_is_reported_and_ships_nothing(
    job: PlanJob, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sweep resumes from its rows: nothing is trained again, and the champion loses its alias."""
    rows = {path: path.read_text() for path in Path(job.storage).glob("sweeps/plan/rows/*.json")}
    hopeless = replace(job, goal=Goal(allowance=0.0, throughput=50.0))
    with pytest.raises(
        UserError, match=r"the goal cannot be met: it is missed by .* times SISO's throughput; the nearest system is"
    ):
        plan.main(hopeless)
    after = {path: path.read_text() for path in Path(job.storage).glob("sweeps/plan/rows/*.json")}
    assert len(after) == 2
    if rows:  # the other test has already run
        assert after == rows
    folder = Path(job.storage) / "plans" / "plan"
    assert not (folder / "serve.yaml").exists()
    assert "**Not met:**" in (folder / "plan.md").read_text()
    model = MlflowClient(f"sqlite:///{job.storage}/mlflow.db").get_registered_model("reviews")
    assert "champion" not in model.aliases


@pytest.mark.cluster("serve")
@pytest.mark.timeout(600)
def test_an_unreachable_registry_keeps_the_plan_files(
    job: PlanJob, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> dict[str, str]:
        raise MlflowException("connection refused")

    monkeypatch.setattr(planning, "register_plan", away)
    with pytest.raises(
        UserError, match=r"the plan is complete \(.*plan\.md\), but MLflow at sqlite.* cannot be reached"
    ):
        plan.main(job)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "neither allowance nor throughput"),
        (["--goal.allowance", "-1"], "allowance is -1"),
        (["--goal.allowance", "1", "--port", "0"], "port"),
        (["--goal.allowance", "1", "--choosing.share", "1.5"], "share is 1.5"),
        (["--goal.allowance", "1", "--data.source", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_user_errors_are_reported_before_a_cluster_starts(
    flags: list[str],
    words: str,
    tiny_model_folder: Path,
    tiny_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--backbone.model", str(tiny_model_folder), "--backbone.max_length", "16", "--storage", str(tmp_path)]
    argv += ["--data.source", str(tiny_csv), *flags]
    assert cli.run(plan.main, PlanJob, None, argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line


class FakeRegistry:
    """The registry of a tracker, without MLflow: versions in the order of registration, with their tags."""

    def __init__(self) -> None:
        self.client = self
        self.tags: dict[str, dict[str, str]] = {}
        self.folders: dict[str, Path] = {}
        self.aliases: dict[str, str] = {"champion": "1", "champion-3": "1", "other": "1"}

    def search_model_versions(self, query: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(version=version, tags=tags) for version, tags in self.tags.items()]

    def register(self, run: str, folder: Path, name: str, tags: dict[str, str], *_: object) -> str:
        version = str(len(self.tags) + 1)
        self.tags[version], self.folders[version] = tags, folder
        return version

    def get_registered_model(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(aliases=dict(self.aliases))

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.aliases[alias] = version

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        del self.aliases[alias]


def test_every_stage_of_a_ladder_is_registered_and_named_in_the_server_configuration(tmp_path: Path) -> None:
    pretrained = load(write_model(tmp_path))
    folders = [write_adapter(tmp_path, pretrained, width) for width in (2, 4)]
    two, four = (
        PlannedStage(f"n{width}", "token-split", width, 1, folder=str(folder), run_id=f"run{width}")
        for width, folder in zip((2, 4), folders)
    )
    right = np.ones(2000)
    stairs = (replace(four, threshold=0.9, going_on=0.3), replace(two, threshold=0.8, going_on=0.1))
    ladder, alone = Candidate(stairs, right, 0.5), Candidate((two,), right * 0.9, 0.4)
    choice = choose(right, right, [ladder], lambda one: one.correct, Goal(allowance=1.0), [alone])
    assert choice.chosen is not None
    served = Served(choice.chosen, verify(right, right, choice.goal), write_stages(ladder, tmp_path / "adapters"))
    found = Plan(choice, [served], [], tmp_path)
    registry = FakeRegistry()
    versions = register_plan(registry, "reviews", found, "model", False)  # type: ignore[arg-type]
    assert versions == {ladder.name: ["1", "2"], "n2": ["3"]}
    assert [registry.tags[version]["stage"] for version in "123"] == ["1", "2", "1"]
    assert [load_adapter_config(registry.folders[version]).stage for version in "123"] == [1, 2, 1]
    assert registry.aliases == {
        "champion": "1",
        "champion-2": "2",
        "exact": "1",
        "exact-2": "2",
        "fast": "3",
        "other": "1",
    }, "aliases of an earlier plan with more stages are removed"
    assert model_uris(found, "reviews", versions) == ["models:/reviews@champion", "models:/reviews@champion-2"]
    assert register_plan(registry, "reviews", found, "model", False) == versions, "versions are reused"  # type: ignore[arg-type]
    assert found.adapters == list(served.folders)


def test_a_server_on_loopback_is_refused_on_a_cluster_of_several_machines() -> None:
    with pytest.raises(UserError, match=r"only the head of these 3 machines .* choose --host 0\.0\.0\.0"):
        planning.check_host("127.0.0.1", 3)
    planning.check_host("127.0.0.1", 1)
    planning.check_host("0.0.0.0", 3)


def test_a_server_of_the_plain_model_gets_the_prompt_by_name_or_file(job: PlanJob, tmp_path: Path) -> None:
    shipped = load_prompt("sst2")
    own = replace(shipped, bias={next(iter(shipped.labels)): 0.5})
    assert planning.served_prompt(None, tmp_path, str(tmp_path)) is None
    assert planning.served_prompt(shipped, tmp_path, str(tmp_path)) == "sst2"
    file = planning.served_prompt(own, tmp_path, str(tmp_path))
    assert file == str(tmp_path / "prompt.yaml")
    settings = planning.check_server(job, [], "http://localhost", file)
    (application,) = settings["applications"]
    assert application["args"]["prompt"] == file
    assert load_prompt(file) == own
    assert planning.served_prompt(own, tmp_path, "s3://bucket/plan") is None


def test_on_a_cluster_every_machine_accepts_requests(job: PlanJob) -> None:
    assert planning.check_server(job, [], "http://localhost")["proxy_location"] == "HeadOnly"
    beyond = replace(job, host="0.0.0.0")
    assert planning.check_server(beyond, [], "http://localhost")["proxy_location"] == "EveryNode"
