"""The plan as a job: sweep, choice, registration, Serve configuration, deployment, and requests over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_jobs import cli, plan
from ray_jobs.cluster import ClusterConfig, connected
from ray_jobs.planning import run as planning
from ray_jobs.planning.config import PlanJob
from revmux import UserError
from revmux.adapters.config import load_adapter_config
from revmux.data.config import DataConfig
from revmux.features.config import StoreConfig
from revmux.plan.config import Goal, MeasureConfig
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


@pytest.mark.cluster
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
    assert model.aliases.keys() == {"champion", "fast", "exact"}
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


@pytest.mark.cluster
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


@pytest.mark.cluster
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
