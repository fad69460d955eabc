"""A sweep: which trial comes next, which is stopped, and what is recorded of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.tune
from optuna.trial import TrialState
from ray.tune import PlacementGroupFactory

from ray_jobs.sweep import concurrency
from ray_jobs.sweep.concurrency import ConcurrencyWatch, describe_shortage, fitting_trials, trial_placement
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.early_stopping import FrontScheduler
from ray_jobs.sweep.run import prepare_sweep
from ray_jobs.sweep.run_trial import run_trial
from ray_jobs.sweep.search import FrontSearch
from ray_jobs.sweep.trials import FAILED, SweepFolder, Trial, front_rows, make_trials, mean_length, reason_of, row_of
from revmux import UserError
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained, outline
from revmux.training.config import MethodConfig, OptimConfig, Recipe
from tune_spaces.space import SearchSpace

ROOT = Path(__file__).parents[1]


def trial(name: str, cost: float, /, epochs: int = 3, **method: Any) -> Trial:
    recipe = Recipe(method=MethodConfig(**method), optim=OptimConfig(epochs=epochs))
    return Trial(name, recipe, cost)


def tuned(mine: Trial) -> SimpleNamespace:
    """A trial as Tune's schedulers see it."""
    return SimpleNamespace(trial_id=mine.name, config={"trial": mine})


def tell(scheduler: FrontScheduler, mine: SimpleNamespace, epoch: int, accuracy: float) -> str:
    return scheduler.on_trial_result(None, mine, {"epoch": epoch, "selection_accuracy": accuracy})


def start(scheduler: FrontScheduler, *trials: Trial) -> list[SimpleNamespace]:
    made = [tuned(mine) for mine in trials]
    for one in made:
        scheduler.on_trial_add(None, one)
    return made


def test_asha_stops_the_worse_trial_of_equal_cost_and_ignores_other_costs() -> None:
    scheduler = FrontScheduler(selection_inputs=20, reduction=2)
    good, bad, cheap = start(scheduler, trial("good", 0.70), trial("bad", 0.7001), trial("cheap", 0.5))
    assert tell(scheduler, good, 1, 0.80) == "CONTINUE"
    assert tell(scheduler, cheap, 1, 0.60) == "CONTINUE"
    assert tell(scheduler, bad, 1, 0.75) == "STOP"
    assert "ASHA at epoch 1" in scheduler.stopped["bad"]
    assert scheduler.stopped.keys() == {"bad"}


def test_a_trial_that_cannot_reach_the_front_is_stopped_with_the_reason() -> None:
    scheduler = FrontScheduler(selection_inputs=2000)
    cheap, expensive, rival = start(scheduler, trial("cheap", 0.5), trial("expensive", 0.7), trial("rival", 0.4))
    assert tell(scheduler, cheap, 1, 0.80) == "CONTINUE"
    assert tell(scheduler, expensive, 1, 0.79) == "CONTINUE"  # within the noise
    assert tell(scheduler, rival, 1, 0.60) == "CONTINUE"  # cheaper than all
    assert tell(scheduler, cheap, 2, 0.85) == "CONTINUE"
    assert tell(scheduler, expensive, 2, 0.70) == "STOP"
    assert scheduler.stopped["expensive"] == (
        "cannot reach the front: after 67% of its epochs its selection accuracy is 70.0% at cost 0.70, while that of cheap "
        "was 85.0% at epoch 2 at cost 0.50"
    )


def test_trials_are_compared_within_a_method_only() -> None:
    """An exit head is accurate after one epoch; a multiplexer of higher cost needs more and is not stopped for it."""
    scheduler = FrontScheduler(selection_inputs=2000, reduction=2)
    head = trial("head", 0.5, name="exit-head", num_inputs=1)
    made = start(scheduler, head, trial("mixer", 0.5), trial("dear", 0.7))
    assert tell(scheduler, made[0], 1, 0.88) == "CONTINUE"
    assert tell(scheduler, made[1], 1, 0.60) == "CONTINUE"
    assert tell(scheduler, made[2], 1, 0.61) == "CONTINUE"
    assert not scheduler.stopped


def test_trials_are_compared_after_equal_shares_of_their_epochs() -> None:
    """Epoch 3 of 9 is compared with epoch 1 of 3, not with epoch 3 of 3."""
    scheduler = FrontScheduler(selection_inputs=2000)
    short, long = start(scheduler, trial("short", 0.5, epochs=3), trial("long", 0.6, epochs=9))
    for epoch, accuracy in ((1, 0.60), (2, 0.75), (3, 0.85)):
        assert tell(scheduler, short, epoch, accuracy) == "CONTINUE"
    assert tell(scheduler, long, 2, 0.40) == "CONTINUE", "within its first 30 %"
    assert tell(scheduler, long, 3, 0.60) == "CONTINUE"
    assert tell(scheduler, long, 6, 0.60) == "STOP"
    assert "after 67% of its epochs" in scheduler.stopped["long"]


def test_the_last_epoch_and_the_evaluation_after_it_are_never_stopped() -> None:
    scheduler = FrontScheduler(selection_inputs=2000, reduction=2)
    good, bad = start(scheduler, trial("good", 0.5, epochs=3), trial("bad", 0.5, epochs=3))
    for epoch in (1, 2, 3):
        tell(scheduler, good, epoch, 0.9)
    assert tell(scheduler, bad, 3, 0.1) == "CONTINUE"
    assert scheduler.on_trial_result(None, bad, {"accuracy_mean": 0.1}) == "CONTINUE"


def test_a_failed_trial_stops_no_other() -> None:
    scheduler = FrontScheduler(selection_inputs=2000)
    broken, other = start(scheduler, trial("broken", 0.4), trial("other", 0.5))
    tell(scheduler, broken, 1, 0.99)
    scheduler.on_trial_error(None, broken)
    assert tell(scheduler, other, 1, 0.2) == "CONTINUE"


def test_a_trial_that_resumes_after_a_failure_keeps_its_epochs() -> None:
    scheduler = FrontScheduler(selection_inputs=2000)
    lost, other = start(scheduler, trial("lost", 0.4), trial("other", 0.5))
    tell(scheduler, lost, 1, 0.99)
    scheduler.on_trial_error(None, lost)  # as Tune does when it retries a trial
    scheduler.on_trial_add(None, lost)
    assert tell(scheduler, other, 1, 0.2) == "STOP"


def test_the_history_of_an_earlier_start_counts(tmp_path: Path) -> None:
    """Trials that ended are compared with new ones, and a trial that was running keeps its place in ASHA's rungs."""
    good, slow, new = trial("good", 0.4), trial("slow", 0.401), trial("new", 0.5)
    folder = SweepFolder(tmp_path, {"data": "a"})
    folder.write_curve(good, {1: 0.9, 2: 0.95, 3: 0.96})
    folder.write_curve(slow, {1: 0.2})
    (tmp_path / "curves" / "new.json").write_text("[")
    curves = folder.curves([good, slow, new])
    assert curves == {"good": {1: 0.9, 2: 0.95, 3: 0.96}, "slow": {1: 0.2}}

    scheduler = FrontScheduler(selection_inputs=2000, curves=curves, ended=[good])
    first = start(scheduler, new)[0]
    assert tell(scheduler, first, 1, 0.5) == "STOP"
    assert "that of good was 90.0% at epoch 1" in scheduler.stopped["new"]

    many = FrontScheduler(selection_inputs=2, curves=curves, ended=[good])  # any difference may be noise
    resumed, other = start(many, slow, trial("other", 0.4005))
    assert tell(many, other, 1, 0.5) == "STOP", "ASHA knows the accuracy of the ended trial at the first rung"
    assert tell(many, resumed, 2, 0.94) == "CONTINUE", "it passed the first rung in the earlier start"


def test_a_trial_that_reports_its_own_failure_stops_no_other_and_is_not_used_by_the_search() -> None:
    scheduler = FrontScheduler(selection_inputs=2000)
    broken, other = start(scheduler, trial("broken", 0.4), trial("other", 0.5))
    tell(scheduler, broken, 1, 0.99)
    scheduler.on_trial_complete(None, broken, {FAILED: True})
    assert tell(scheduler, other, 1, 0.2) == "CONTINUE"
    search = FrontSearch(grid(), [], 8, True, 0)
    assert isinstance(search.suggest("a"), dict)
    search.on_trial_complete("a", {FAILED: True, "selection_accuracy": 0.9})
    assert search.study is not None
    assert not search.study.get_trials(states=[TrialState.COMPLETE])


def grid() -> list[Trial]:
    return [
        trial(f"{name}-{inputs}-{layers}", 0.3 + 0.1 * layers, name=name, num_inputs=inputs, prefill_layers=layers)
        for name in ("revmux", "token-split")
        for inputs in (2, 4, 8)
        for layers in (1, 2, 3, 4)
    ]


def run_search(search: FrontSearch) -> list[str]:
    """Return everything that a search suggests, with an accuracy that grows with l."""
    given = []
    while isinstance(found := search.suggest(str(len(given))), dict):
        mine = found["trial"]
        accuracy = 0.5 + 0.1 * mine.recipe.method.prefill_layers - 0.2 * (mine.recipe.method.name == "revmux")
        search.on_trial_complete(str(len(given)), {"selection_accuracy": accuracy})
        given.append(mine.name)
    return given


def test_without_a_limit_every_trial_is_suggested_once_in_order() -> None:
    trials = grid()
    assert run_search(FrontSearch(trials, [], None, True, 0)) == [one.name for one in trials]


def test_optuna_suggests_each_trial_at_most_once_and_is_reproducible() -> None:
    given = run_search(FrontSearch(grid(), [], 16, True, seed=3))
    assert len(set(given)) == len(given) == 16
    assert given == run_search(FrontSearch(grid(), [], 16, True, seed=3))


def test_optuna_prefers_settings_with_good_accuracy() -> None:
    trials = [
        trial(f"{name}-{inputs}-{layers}", 0.3 + 0.05 * layers, name=name, num_inputs=inputs, prefill_layers=layers)
        for name in ("revmux", "token-split")
        for inputs in (2, 4, 8, 16)
        for layers in range(1, 13)
    ]
    learned = run_search(FrontSearch(trials, [], 40, True, seed=0))[20:]
    better = [name for name in learned if name.startswith("token-split")]  # more accurate at every cost
    assert len(better) >= 0.7 * len(learned)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_search_resumes_from_its_saved_state(adaptive: bool) -> None:
    trials = grid()
    rows = [
        row_of(trials[0], "done", metrics={"selection_accuracy": 0.6}),
        row_of(trials[5], "stopped", "why", metrics={"selection_accuracy": 0.5}),
        row_of(trials[7], "failed", "why"),
    ]
    given = run_search(FrontSearch(trials, rows, 8, adaptive, 0))
    assert len(given) == 5
    assert not set(given) & {row.trial for row in rows}


def test_costs_are_counted_before_anything_is_trained(tiny_model_folder: Path, tiny_csv: Path) -> None:
    config = BackboneConfig(model=str(tiny_model_folder), max_length=16)
    backbone, labels = outline(config)
    task = load_task(DataConfig(source=str(tiny_csv)), labels)
    base = Recipe(config, DataConfig(source=str(tiny_csv)))
    space = SearchSpace(methods=["revmux", "exit-head"], num_inputs=[2, 4], prefill_layers=[1])
    length = mean_length(config, task)
    assert length == round(load_pretrained(config).tokenize(task.selection, 16).lengths.double().mean().item())
    made = make_trials(space.points(base, 3), task, backbone, length)
    costs = {
        (one.recipe.method.name, one.recipe.method.num_inputs, one.recipe.method.prefill_layers): one.cost
        for one in made
    }
    assert [one.cost for one in made] == sorted(costs.values())
    assert costs["exit-head", 1, 1] == pytest.approx(1 / 3, abs=0.05)
    assert costs["revmux", 4, 1] < costs["revmux", 2, 1]
    assert len({one.name for one in made}) == len(made) == 4
    longer = {one.name: one.cost for one in make_trials(space.points(base, 3), task, backbone, 4 * length)}
    assert all(longer[one.name] != one.cost for one in made), "relative costs depend on the length"


def test_a_sweep_folder_of_another_task_is_refused(tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path) -> None:
    job = TuneJob(
        BackboneConfig(model=str(tiny_model_folder), max_length=16),
        DataConfig(source=str(tiny_csv)),
        storage=str(tmp_path),
    )
    assert prepare_sweep(job, tmp_path).trials
    with pytest.raises(UserError, match=r"sweep folder .* data .* another --name"):
        prepare_sweep(replace(job, data=replace(job.data, limit=30)), tmp_path)
    assert prepare_sweep(replace(job, data=replace(job.data, limit=30), name="other"), tmp_path).trials


def test_rows_are_read_back_and_give_a_front(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path, {"data": "a"})
    good, bad, lost = trial("good", 0.5), trial("bad", 0.6), trial("lost", 0.7)
    figures = {"accuracy_mean": 0.7, "siso_accuracy": 0.88, "selection_accuracy": 0.8, "selection_siso_accuracy": 0.9}
    folder.write(row_of(good, "done", metrics=figures))
    folder.write(row_of(bad, "done", metrics=figures | {"selection_accuracy": 0.7, "accuracy_mean": 0.95}))
    folder.write(row_of(lost, "failed", "out of memory"))
    rows = folder.read([good, bad, lost, trial("new", 0.1)])
    assert rows.keys() == {"good", "bad", "lost"}
    assert rows["lost"].why == "out of memory"
    compared = {row.name: row for row in front_rows(list(rows.values()))}
    on_front = {name: row.on_front for name, row in compared.items()}
    assert on_front == {"siso": True, "good": True, "bad": False}, "the test split is reported and chooses nothing"
    assert (compared["bad"].accuracy, compared["bad"].test_accuracy) == (0.7, 0.95)
    assert (compared["siso"].accuracy, compared["siso"].test_accuracy) == (0.9, 0.88)


@pytest.mark.parametrize("content", [b"", b'{"trial": ', b"[]", b"\xff", b'{"trial": "mine"}'])
def test_a_trial_whose_row_is_damaged_is_tried_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, mine, other = SweepFolder(tmp_path, {"data": "a"}), trial("mine", 0.5), trial("other", 0.6)
    for one in (mine, other):
        folder.write(row_of(one, "done", metrics={"accuracy_mean": 0.8}))
    (file,) = tmp_path.glob("rows/mine.json")
    file.write_bytes(content)
    assert folder.read([mine, other]).keys() == {"other"}
    assert "mine.json is damaged" in caplog.text


def test_a_trial_that_wrote_its_row_is_not_repeated_when_its_process_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mine, reported = SweepFolder(tmp_path, {"data": "a"}), trial("mine", 0.5), []
    folder.write(row_of(mine, "done", metrics={"accuracy_mean": 0.8}))
    monkeypatch.setattr(ray.tune, "report", reported.append)
    nothing: Any = None
    run_trial({"trial": mine}, nothing, nothing, nothing, nothing, folder, "parent", {}, "command")
    folder.write(row_of(mine, "failed", "out of memory"))
    run_trial({"trial": mine}, nothing, nothing, nothing, nothing, folder, "parent", {}, "command")
    assert reported == [{"accuracy_mean": 0.8}, {FAILED: True}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\n\nray.exceptions.RayTaskError: it",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("x\nrevmux.errors.UserError: the loss became nan; lower it\n", "UserError: the loss became nan; lower it"),
        ("a\nray.exceptions.ActorDiedError: the actor died", "ray.exceptions.ActorDiedError: the actor died"),
        ("", "unknown"),
    ],
)
def test_a_failure_is_printed_on_one_line(text: str, reason: str) -> None:
    assert reason_of(text) == reason


def test_the_number_of_concurrent_trials_is_what_fits_on_each_node() -> None:
    cluster = TuneJob().cluster
    assert fitting_trials(cluster, [{"CPU": 2.0}]) == 2
    assert fitting_trials(cluster, []) == 0
    assert fitting_trials(replace(cluster, workers=4), [{"CPU": 2.0}] * 4) == 2
    assert fitting_trials(replace(cluster, gpus_per_worker=0.5), [{"CPU": 64.0, "GPU": 2.0}, {"CPU": 8.0}]) == 4
    assert fitting_trials(replace(cluster, cpus_per_worker=3), [{"CPU": 4.0}] * 3) == 3, "a worker is on one node"
    assert fitting_trials(replace(cluster, memory_per_worker=8), [{"CPU": 8.0, "memory": 16e9}]) == 2


def test_a_trial_that_runs_alone_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cluster = replace(TuneJob().cluster, gpus_per_worker=1.0)
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}]
    shortage = "a trial needs 1 × 1 CPU and 1 GPU, and the 2 nodes have 16 CPU and 1 GPU: GPU is short"
    assert describe_shortage(cluster, nodes) == shortage
    monkeypatch.setattr(concurrency, "worker_nodes", lambda cluster: nodes)
    alone, both = (
        [SimpleNamespace(status=status) for status in ("RUNNING", second)] for second in ("PENDING", "RUNNING")
    )
    watch = ConcurrencyWatch(cluster, concurrent=2, seconds=0)
    for trials in (both, alone, alone, both, alone):
        watch.look(trials)
    warning = f"sweep: warning: only one trial is running and 1 waiting for resources: {shortage}\n"
    assert capsys.readouterr().out == 2 * warning, "once each time"


def test_trials_run_on_nodes_with_the_labels() -> None:
    cluster = replace(TuneJob().cluster, labels={"market-type": "spot"}, driver_labels={"role": "drivers"})
    gpu = {"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001}
    assert trial_placement(replace(cluster, gpus_per_worker=1.0, accelerator_type="L4")) == PlacementGroupFactory(
        [gpu], bundle_label_selector=[{"market-type": "spot"}]
    )
    assert trial_placement(replace(cluster, workers=2, driver_memory=0.5)) == PlacementGroupFactory(
        [{"memory": 0.5e9}], bundle_label_selector=[{"role": "drivers"}]
    )
