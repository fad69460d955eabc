"""The quickstart: task model, adapters, sweep, server and report, one step after another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_path, absolute_storage
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.run import run_tune
from ray_jobs.tour.config import QuickstartJob
from ray_jobs.tour.live import show_live_answers
from ray_jobs.tracking.command_line import command_line
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.adapters import train_adapters
from ray_jobs.training.config import FinetuneJob, TrainJob
from ray_jobs.training.feature_pass import fill_stores
from ray_jobs.training.launch import run_params
from ray_jobs.training.task_model import tune_model
from revmux.adapters.folder import load_adapter
from revmux.data.task import TaskData, load_task
from revmux.estimate.flops import rival_exit_layer
from revmux.estimate.throughput import like_length_batches, paired_throughput
from revmux.methods import BackboneShape, Siso, build_method
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.plan.plots import plot_front_png
from revmux.plan.report import comparison_table, front_row, row_name
from revmux.pretrained.loading import inspect, load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import exit_head_config, prepare, train_here
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run
from serve_app.config import server_config
from serve_app.run import check_port, deploy, shutdown


class Steps:
    """Prints a heading and the duration of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, description: str) -> Iterator[None]:
        """Print the heading of a step, run the body, and print its duration."""
        print(f"\n== {len(self.seconds) + 1}. {title}\n   {description}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - started, 1)
        print(f"   {title}: {self.seconds[title]:.0f} s", flush=True)


def run_tour(job: QuickstartJob) -> None:
    """Run every step and stop everything that was started."""
    storage = absolute_storage(job.storage)
    results = absolute_path(job.results, "--results") if job.results else storage / "results.json"
    plot = absolute_path(job.plot, "--plot") if job.plot else storage / "front.png"
    check_port("127.0.0.1", job.port)
    job.cluster.check_training()
    steps = Steps()
    tracker = Tracker(TrackingConfig(), storage)
    tracking = TrackingConfig(tracker.uri)
    with steps.step("Data", f"Reading the task from '{job.data.source}'."):
        _, own_labels = inspect(job.backbone)
        task = load_task(job.data, own_labels)
        print(
            f"   {len(task.train)} train, {len(task.selection)} selection, {len(task.test)} test; {', '.join(task.label_names)}"
        )
        for row in task.train.select(range(3)):
            print(f"   {task.label_names[row['label']]:>14}  {row['text'][:90]}")
    with connected(job.cluster, storage):
        model = job.backbone.model
        if own_labels is None:
            with steps.step(
                "Task model",
                f"Tuning {model} to the task with Ray Train on {job.cluster.workers} workers. The model is frozen afterwards.",
            ):
                tuned = FinetuneJob(
                    job.backbone, job.data, job.tuning, job.frozen_layers, job.cluster, tracking, str(storage)
                )
                model = str(tune_model(tuned, task, tracker, storage).folder)
        pretrained = load_pretrained(replace(job.backbone, model=model))
        pretrained.backbone.freeze()
        exits = exit_layers(job, pretrained)
        base = job.recipe(model, MethodConfig("revmux", job.num_inputs[0], job.prefill_layers, job.options), storage)
        with steps.step(
            "Features", "Storing the frozen model's states and scores of each input, which all runs below read."
        ):
            fill_stores(base, sorted({job.prefill_layers, *exits.values()}), task, job.cluster)
        rows, folders = [], []
        with steps.step("Adapters", f"Training RevMUX for N = {', '.join(map(str, job.num_inputs))} with Ray Train."):
            training = TrainJob(
                base.backbone,
                job.data,
                base.method,
                job.num_inputs,
                job.optim,
                job.loss,
                base.store,
                cluster=job.cluster,
                tracking=tracking,
                storage=str(storage),
                register="quickstart",
            )
            for trained in train_adapters(training, dict.fromkeys(training.recipes(), task), tracker, storage):
                folders.append(str(trained.folder))
                rows.append(result_row(pretrained, task, trained.method, trained.metrics))
        with steps.step(
            "Exit heads", "Training the baseline of equal cost: an exit head on an early layer of the same model."
        ):
            for layer in sorted(set(exits.values())):
                rows.append(train_exit_head(job, base, layer, task, tracker, pretrained))
        with steps.step(
            "Sweep", f"A small Ray Tune sweep over N, l and λ (space '{job.space}') on the stored features."
        ):
            sweep = TuneJob(
                base.backbone,
                job.data,
                job.space,
                job.sweep_trials,
                replace(job.optim, batch_size=8),  # short trials need many steps more than large ones
                job.loss,
                base.store,
                shuffles=1,
                cluster=replace(job.cluster, workers=1),
                tracking=tracking,
                storage=str(storage),
                name=f"sweep-{task.identity['sha256'][:6]}-{str(pretrained.identity['sha256'])[:6]}",
            )
            run_tune(sweep)
        with steps.step(
            "Serve",
            f"Ray Serve on port {job.port}: {job.requests} concurrent requests. The width grows with the queue.",
        ):
            try:
                config = server_config(model=model, adapters=folders, port=job.port, max_length=job.backbone.max_length)
                show_live_answers(deploy(config), task, job.requests)
            finally:
                shutdown()
    with steps.step("Report", "Measuring throughput on this machine in paired runs against SISO."):
        rows.insert(0, siso_row(pretrained, task, rows))
        measure_throughput(rows, pretrained, task, job, folders)
        meta = describe_run(command_line(), task.identity, pretrained.identity)
        write_json(results, {"meta": meta | {"seconds": steps.seconds}, "rows": rows})
        plot_front_png(
            [front_row(row) for row in rows],
            plot,
            f"{task.identity['source']} on {job.backbone.model.rpartition('/')[2]}",
        )
    print(f"\n{comparison_table(rows)}\n")
    print(f"Results {results}\nPlot    {plot}\nTotal   {sum(steps.seconds.values()):.0f} s\n")
    print(next_commands(job, storage, model, folders))


def exit_layers(job: QuickstartJob, pretrained: Pretrained) -> dict[int, int]:
    """For each N, the exit layer whose cost is at most that of RevMUX."""
    backbone = pretrained.backbone
    methods = {n: build_method("revmux", BackboneShape.of(backbone), n, job.options) for n in job.num_inputs}
    length = job.backbone.max_length
    return {n: rival_exit_layer(backbone, method, job.prefill_layers, length) for n, method in methods.items()}


def train_exit_head(
    job: QuickstartJob, base: Recipe, layer: int, task: TaskData, tracker: Tracker, pretrained: Pretrained
) -> dict[str, Any]:
    """Train an exit head at one layer in this process, which takes seconds with stored states."""
    method = exit_head_config(layer)
    optim = replace(base.optim, epochs=3 * base.optim.epochs, learning_rate=1e-3)
    recipe = replace(base, method=method, optim=optim, loss=replace(base.loss, infonce_weight=0.0), shuffles=1)
    params = run_params(recipe, replace(job.cluster, workers=1))
    with tracker.run(f"{method.name}-{layer}", params) as run_id:
        prepared = prepare(recipe, task)
        figures = train_here(prepared).metrics()
        figures |= {
            "cost_counted": prepared.cost(),
            "tunable_params": float(prepared.model.method.tunable_parameters()),
        }
        tracker.log_metrics(run_id, figures)
    return result_row(pretrained, task, method, figures)


def result_row(
    pretrained: Pretrained, task: TaskData, method: MethodConfig, figures: dict[str, float]
) -> dict[str, Any]:
    """A row of the results file."""
    return {
        "method": method.name,
        "family": pretrained.backbone.config.model_type,
        "backbone": pretrained.identity["name"],
        "task": task.identity["source"],
        "num_inputs": method.num_inputs,
        "prefill_layers": method.prefill_layers,
        "fallback": 0,
        "seeds": 1,
        "tunable_params": int(figures["tunable_params"]),
    } | {
        name: figures[name]
        for name in ("accuracy_mean", "accuracy_std", "siso_accuracy", "siso_agreement", "cost_counted")
    }


def siso_row(pretrained: Pretrained, task: TaskData, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of SISO, whose accuracy the other rows contain as their teacher's."""
    figures = {
        "accuracy_mean": rows[0]["siso_accuracy"],
        "siso_accuracy": rows[0]["siso_accuracy"],
        "accuracy_std": 0.0,
    }
    figures |= {"siso_agreement": 1.0, "cost_counted": 1.0, "tunable_params": 0.0}
    return result_row(pretrained, task, MethodConfig(Siso.name, 1, 0), figures)


def measure_throughput(
    rows: list[dict[str, Any]], pretrained: Pretrained, task: TaskData, job: QuickstartJob, folders: list[str]
) -> None:
    """Measure throughput and add it to the rows."""
    shape = BackboneShape.of(pretrained.backbone)
    siso = plain_classifier(pretrained.backbone)
    rivals = {row_name(rows[index + 1]): load_adapter(folder, pretrained) for index, folder in enumerate(folders)}
    for row in rows:
        method = exit_head_config(row["prefill_layers"])
        if row["method"] == method.name:  # its weights were not kept, but speed does not depend on them
            head = build_method(method.name, shape, 1, method.options)
            rivals[row_name(row)] = MultiplexedClassifier(pretrained.backbone, head, method.prefill_layers)
    split = pretrained.tokenize(task.test, job.backbone.max_length)
    batches = like_length_batches(split, inputs=64, batch_size=32)
    ratios = {name: paired_throughput(siso, rival, batches) for name, rival in rivals.items()}
    for row in rows:
        ratio = ratios.get(row_name(row))
        row["throughput_ratio"] = 1.0 if ratio is None else round(ratio.median, 3)
        if ratio is not None:
            row["throughput_pairs"] = asdict(ratio)


def next_commands(job: QuickstartJob, storage: Path, model: str, folders: list[str]) -> str:
    """Commands to try after the quickstart."""
    return "\n".join(
        [
            "Next (activate the environment first: . .venv/bin/activate):",
            f"  serve it        revmux serve --model {model} --adapters {','.join(folders)}",
            "  ask it          curl -s http://127.0.0.1:8000/predict -H 'content-type: application/json' -d '{\"inputs\": \"some text\"}'",
            f"  compare runs    make ui STORAGE={storage}",
            f"  sweep wider     revmux tune --backbone.model {model} --data.source {job.data.source} --space wide",
            "  your own model  revmux quickstart --backbone.model YOUR_CLASSIFIER --data.source your.csv",
        ]
    )
