"""The quickstart: task model, features, adapters, plan, server and report, one step after another."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_path, absolute_storage
from ray_jobs.planning.config import PlanJob
from ray_jobs.planning.run import measure_on_worker, moved, record, served_prompt
from ray_jobs.sweep.run import Sweep, run_sweep
from ray_jobs.sweep.trials import SweepFolder, TrialRow, make_trials, mean_length
from ray_jobs.tour.config import NAME, QuickstartJob
from ray_jobs.tour.live import LiveAnswer, answered_by, ask, examples
from ray_jobs.tour.report import Reporter
from ray_jobs.tour.screen import Screen, quiet
from ray_jobs.tracking.command_line import command_line
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.model_registry import register_plan
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.feature_pass import fill_stores_for
from ray_jobs.training.progress_board import Progress, board
from ray_jobs.training.task_model import tune_model
from revmux.backbone import Backbone
from revmux.data.config import DOCSTRINGS, EMBEDDED_TASK
from revmux.data.task import TaskData, load_task
from revmux.features.tokens import tokenize_task
from revmux.methods import BackboneShape, method_class
from revmux.plan.build import for_choosing
from revmux.plan.files import PLAN_NAME
from revmux.plan.front import FrontRow
from revmux.plan.plan import Plan, describe_system
from revmux.plan.plots import plot_front_png
from revmux.plan.report import row_name
from revmux.pretrained.identity import identity_of
from revmux.pretrained.loading import outline
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import check
from revmux.utils.files import atomic_folder, write_json
from revmux.utils.run_info import describe_run
from serve_app.config import server_config
from serve_app.run import check_port, deploy, shutdown
from tune_spaces.space import SearchSpace

EXAMPLE = "The plot is thin, but I enjoyed every minute of it."


def run_tour(job: QuickstartJob, screen: Screen | None = None) -> None:
    """Run every step and stop everything that was started."""
    storage = absolute_path(job.storage, "storage")
    absolute_storage(job.storage)
    results = absolute_path(job.results, "--results") if job.results else storage / "results.json"
    plot = absolute_path(job.plot, "--plot") if job.plot else storage / "front.png"
    check_port("127.0.0.1", job.port)
    job.cluster.check_training()
    screen = screen or Screen()
    log = storage / "logs" / f"{NAME}.log"
    screen.text("RevMUX: one frozen classifier, several requests per forward pass.")
    screen.text(f"Messages of Ray, MLflow and the workers: {log} and {log.with_name('ray.log')}")
    with quiet(log):
        Tour(job, screen, storage, results, plot).run()


class Tour:
    """The steps.

    Args:
        job: settings.
        screen: where the steps are shown.
        storage: absolute storage folder.
        results: JSON file to write.
        plot: PNG file to write.
    """

    def __init__(self, job: QuickstartJob, screen: Screen, storage: Path, results: Path, plot: Path) -> None:
        self.job, self.screen, self.storage, self.results, self.plot = job, screen, storage, results, plot
        self.live: list[LiveAnswer] = []
        self.started = time.perf_counter()

    def run(self) -> None:
        """Run every step."""
        job, screen = self.job, self.screen
        backbone, own_labels = outline(job.backbone)
        self.recipes(job.plan_job(job.backbone.model, TrackingConfig(), self.storage), backbone)
        if own_labels is None:
            tuning = job.tuning_job(TrackingConfig(), self.storage).recipe()
            check(tuning, BackboneShape.of(backbone), job.cluster.workers)
        screen.steps = 6 if own_labels is not None else 7
        with screen.step("Data", f"Reading labelled text from '{job.data.source}'."):
            self.task = load_task(job.data, own_labels)
            self.choosing = for_choosing(self.task, job.choosing, job.data.seed)
            self.show_data()
        with ExitStack() as stack:
            model = job.backbone.model
            with screen.working(dict, "Starting Ray and MLflow"):
                self.tracker = Tracker(TrackingConfig(), self.storage)
                stack.enter_context(connected(job.cluster, self.storage))
                self.board = stack.enter_context(board())
            tracking = TrackingConfig(self.tracker.uri)
            if own_labels is None:
                model = self.tune(tracking)
            plan_job = job.plan_job(model, tracking, self.storage)
            sweep = self.prepare(plan_job)
            self.fill(sweep, plan_job)
            rows, parent = self.train(sweep)
            self.reporter = Reporter(job, plan_job, self.task)
            plan = self.plan(plan_job, rows, parent)
            self.serve(model, plan)
        self.report(plan, rows)
        screen.text(f"Results  {self.results}\nPlot     {self.plot}\nPlan     {plan.folder / 'plan.md'}")
        screen.text(f"Total    {(time.perf_counter() - self.started) / 60:.1f} minutes\n")
        served = plan.adapters if plan.is_met else []
        screen.text(next_commands(job, self.storage, model, served, self.task, self.prompt_file()))

    def show_data(self) -> None:
        """Show the sizes of the splits and some examples."""
        task, choosing = self.task, self.choosing
        if self.job.data.source == EMBEDDED_TASK and task.identity["source"] == DOCSTRINGS:
            self.screen.line(
                "The package of the rated sentences is not available, so the task is 'docstrings' instead."
            )
        self.screen.line(
            f"Sentences: {len(choosing.train):,} to train, {len(task.selection):,} to select the best epoch, "
            f"{len(choosing.test):,} to choose the plan, {len(task.test):,} to test."
        )
        shown = [(task.label_names[row["label"]], _short(row["text"])) for row in task.train.select(range(4))]
        self.screen.table(["label", "text"], shown)

    def tune(self, tracking: TrackingConfig) -> str:
        """Tune the task model; returns its folder."""
        name = self.job.backbone.model
        how = "the whole model" if not self.job.frozen_layers else f"all but {self.job.frozen_layers} layers"
        with self.screen.step(
            "Task model",
            f"Ray Train tunes {how} ({name}) to the task on {self.job.cluster.workers} workers. It is frozen afterwards.",
        ):
            tuning = self.job.tuning_job(tracking, self.storage)
            with self.working("Starting the workers", {tuning.name: "task model"}):
                trained = tune_model(tuning, self.choosing, self.tracker, str(self.storage))
            self.screen.line(f"The model's accuracy on the choosing set is {trained.metrics['accuracy_mean']:.1%}.")
        return trained.folder

    def recipes(self, plan_job: PlanJob, backbone: Backbone) -> list[Recipe]:
        """The settings of the runs on the task model, checked against the shape of the backbone."""
        layers = backbone.num_layers
        prefill = layers // 2 if self.job.prefill_layers is None else self.job.prefill_layers
        recipes = self.job.recipes(plan_job, self.job.exit_layers or exit_layers(layers), prefill)
        for recipe in recipes:
            check(recipe, BackboneShape.of(backbone))
        return recipes

    def prepare(self, plan_job: PlanJob) -> Sweep:
        """The runs on the task model."""
        backbone, _ = outline(plan_job.backbone)
        recipes = self.recipes(plan_job, backbone)
        identity = {"data": self.choosing.identity["sha256"], "model": str(identity_of(plan_job.backbone)["sha256"])}
        folder = SweepFolder(
            self.storage / "sweeps" / f"{NAME}-{identity['data'][:6]}-{identity['model'][:6]}", identity
        )
        trials = make_trials(recipes, self.choosing, backbone, mean_length(plan_job.backbone, self.choosing))
        order = {recipe: index for index, recipe in enumerate(map(repr, recipes))}
        trials.sort(key=lambda trial: order[repr(trial.recipe)])
        return Sweep(plan_job, SearchSpace(), trials, self.choosing, folder, str(self.storage))

    def fill(self, sweep: Sweep, plan_job: PlanJob) -> None:
        """Store the frozen model's states."""
        with self.screen.step(
            "Features", "Storing the frozen model's states and scores of each input. All following steps read them."
        ):
            with self.working("Starting the feature pass", {"features": "inputs"}):
                tokens = tokenize_task(self.choosing, plan_job.backbone, plan_job.store)
                fill_stores_for([trial.recipe for trial in sweep.trials], tokens, self.job.cluster)
            size = sum(file.stat().st_size for file in Path(str(plan_job.store.root)).rglob("*") if file.is_file())
            self.screen.line(f"{size / 1e6:.0f} MB in {plan_job.store.root}")

    def train(self, sweep: Sweep) -> tuple[list[TrialRow], str]:
        """Train the adapters and exit heads; returns their rows and the MLflow run of the comparison."""
        widths = ", ".join(map(str, sorted(self.job.num_inputs)))
        methods = {trial.name: trial.recipe.method for trial in sweep.trials}
        names = {name: system_name(method) for name, method in methods.items()}
        with self.screen.step(
            "Adapters and exit heads",
            f"Ray Tune trains RevMUX for N = {widths} and its rivals at equal cost, exit heads on early layers, in "
            f"{self.job.cluster.workers} processes.",
        ):
            with self.working("Starting the processes", names):
                rows, parent = run_sweep(sweep, self.tracker)
                for row in rows:
                    if row.adapter is not None:
                        copy_adapter(Path(row.adapter), self.storage / "adapters" / folder_name(methods[row.trial]))
            self.screen.table(
                ["system", "accuracy", "cost", "seconds"],
                [
                    [
                        names[row.trial],
                        f"{row.metrics['accuracy_mean']:.1%}" if row.status == "done" else f"{row.status}: {row.why}",
                        f"{row.cost_counted:.2f}",
                        f"{row.seconds:.0f}",
                    ]
                    for row in rows
                ],
                ["accuracy", "cost", "seconds"],
            )
            self.screen.line("Accuracy on the choosing set. Cost: operations per input relative to the plain model.")
        return rows, parent

    def plan(self, plan_job: PlanJob, rows: list[TrialRow], parent: str) -> Plan:
        """Plan, register the plan in MLflow, and show what it ships."""
        goal = self.job.goal
        wanted = ""
        if goal.allowance is not None:
            wanted = f"at most {goal.allowance:g} point{'s' * (goal.allowance != 1)} lost"
        if goal.throughput is not None:
            wanted += f"{' and ' * bool(wanted)}{goal.throughput:g} times the plain model's throughput"
        with self.screen.step(
            "Plan", f"Looking for the cheapest system with {wanted}, and verifying it on the test split."
        ):
            folder = self.storage / "plans" / NAME
            with self.working("Measuring the systems on this machine", {}):
                cores = self.job.cluster.workers * self.job.cluster.cpus_per_worker
                on_all_cores = replace(plan_job, cluster=replace(plan_job.cluster, cpus_per_worker=cores))
                made = measure_on_worker(on_all_cores, rows, self.choosing, self.task, str(folder))
                plan = moved(made, folder, str(folder))
                versions = register_plan(self.tracker, NAME, plan, plan_job.backbone.model, self.task.is_pair)
                record(plan_job, plan, versions, self.tracker, parent, str(folder))
            for one in plan.served:
                self.screen.line(f"The plan ships {describe_system(one.judged)}, on the choosing set.")
                self.screen.line(
                    f"On the test split, it loses {one.verification.loss:.2f} points: {one.verification.outcome}."
                )
            if not plan.is_met:
                self.screen.line(f"The plain model is served: {plan.why_not()}.")
        return plan

    def serve(self, model: str, plan: Plan) -> None:
        """Start the server, send it requests, and stop it."""
        count, port = self.job.requests, self.job.port
        adapters = plan.adapters if plan.is_met else []
        prompt = None if adapters else self.prompt_file()
        with self.screen.step(
            "Server", f"Ray Serve answers on port {port}. {count} test sentences are sent at the same time."
        ):
            try:
                with self.working("Starting the server", {}):
                    config = server_config(
                        model=model,
                        prompt=prompt,
                        adapters=adapters,
                        port=port,
                        max_length=self.job.backbone.max_length,
                    )
                    self.live = ask(deploy(config), self.task, count)
            finally:
                shutdown()
            self.screen.table(
                ["answer", "confidence", "label", "by", "N", "text"],
                [
                    [
                        one.label,
                        f"{one.score:.0%}",
                        "the same" if one.is_right else one.truth,
                        one.method,
                        str(one.width),
                        _short(one.text),
                    ]
                    for one in examples(self.live, 8)
                ],
                ["confidence", "N"],
            )
            right = sum(one.is_right for one in self.live)
            self.screen.line(f"{right} of {count} answers are right ({right / count:.0%}): {answered_by(self.live)}.")

    def prompt_file(self) -> str | None:
        """The name or file of the prompt, for a server without adapters, which would record it; None without a prompt."""
        return served_prompt(self.job.backbone.prompt, self.storage, str(self.storage))

    def report(self, plan: Plan, rows: list[TrialRow]) -> None:
        """Evaluate all systems on the test split, measure their throughput, and write the results and the plot."""
        with self.screen.step(
            "Report", "Evaluating every system on the test split, and timing it against the plain model in turn."
        ):
            with self.working("Evaluating", {}):
                found = self.reporter.evaluate([row for row in rows if row.adapter is not None])
                ladder = self.reporter.planned_rows(plan)
                sizes = {"train": len(self.choosing.train), "choosing": len(self.choosing.test)}
                meta = describe_run(command_line(), self.task.identity | sizes, self.reporter.pretrained.identity)
                meta |= {"seconds": self.screen.seconds, "shuffles": self.job.shuffles}
                live = {"requests": len(self.live), "right": sum(one.is_right for one in self.live)}
                served = json.loads((plan.folder / PLAN_NAME).read_text())["served"]
                for stage in (stage for system in served for stage in system["stages"]):
                    stage["adapter"] = os.path.relpath(plan.folder / stage["adapter"], self.storage)
                write_json(self.results, {"meta": meta, "rows": found, "live": live, "plan": served})
                title = f"{self.task.identity['source']} on {self.job.backbone.model.rpartition('/')[2]}, test split"
                plot_front_png([*self.reporter.front_rows(), *ladder], self.plot, title)
            self.screen.table(
                ["system", "accuracy", "points lost", "cost", "throughput"],
                [*map(_cells, found), *(_planned_cells(plan, row) for row in ladder)],
                ["accuracy", "points lost", "cost", "throughput"],
            )
            self.screen.line(
                "Cost is counted: operations per input. Throughput is measured. Both are relative to the plain model."
            )

    @contextmanager
    def working(self, waiting: str, labels: Mapping[str, str]) -> Iterator[None]:
        """Show the progress that workers post while the body runs."""
        import ray

        def read() -> dict[str, Progress]:
            posted: dict[str, Progress] = ray.get(self.board.read.remote())
            return posted

        with self.screen.working(read if labels else dict, waiting, labels):
            yield


def exit_layers(num_layers: int) -> list[int]:
    """The layers of the exit heads: a third, a half and two thirds of the way up."""
    return sorted({max(1, num_layers // 3), max(1, num_layers // 2), min(num_layers - 1, round(2 * num_layers / 3))})


def system_name(method: MethodConfig) -> str:
    """The name of a system in the output."""
    return method_class(method.name).system_name(method.num_inputs, depth(method))


def folder_name(method: MethodConfig) -> str:
    """The name of a system's folder, such as ``revmux-n2-l3``."""
    return f"{method.name}-n{method.num_inputs}-l{depth(method)}"


def depth(method: MethodConfig) -> int:
    """The layer in the name of a system: the exit layer of an exit head, which may adapt layers below it, otherwise l."""
    option = method_class(method.name).exit_option
    return int(method.prefill_layers if option is None else method.options[option])


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a trial's adapter to a folder whose name does not depend on the settings."""
    with atomic_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def next_commands(
    job: QuickstartJob, storage: Path, model: str, adapters: list[str], task: TaskData, prompt: str | None = None
) -> str:
    """Commands to try after the quickstart."""
    text = json.dumps({"inputs": EXAMPLE if task.identity["source"] != DOCSTRINGS else task.test["text"][0]})
    serve = f"revmux serve --model {model}" + (f" --adapters {','.join(adapters)}" if adapters else "")
    serve += f" --prompt {prompt}" if prompt is not None and not adapters else ""
    answers_by = "" if prompt is None else f" --backbone.prompt {prompt}"
    return "\n".join(
        [
            "Next (activate the environment first: . .venv/bin/activate):",
            f"  serve it            {serve}",
            f"  query it            curl -s http://127.0.0.1:8000/predict -d '{text}'",
            "  in a browser        http://127.0.0.1:8000",
            f"  compare the runs    make ui STORAGE={storage}",
            f"  plan more widely    revmux plan --goal.allowance 1 --backbone.model {model}{answers_by} --space wide",
            "  your own model      revmux quickstart --backbone.model YOUR_CLASSIFIER --data.source your.csv",
        ]
    )


def _cells(row: dict[str, Any]) -> list[str]:
    lost = 100 * (row["siso_accuracy"] - row["accuracy_mean"])
    return [
        row_name(row),
        f"{row['accuracy_mean']:.1%}",
        f"{lost:.1f}",
        f"{row['cost_counted']:.2f}",
        f"{row['throughput_ratio']:.2f}",
    ]


def _planned_cells(plan: Plan, row: FrontRow) -> list[str]:
    chosen = plan.choice.chosen
    ratio = None if chosen is None else chosen.candidate.throughput_ratio
    lost = 100 * (row.siso_accuracy - row.accuracy)
    return [
        "what the plan ships",
        f"{row.accuracy:.1%}",
        f"{lost:.1f}",
        f"{row.cost_counted:.2f}",
        f"{ratio or 1 / row.cost_counted:.2f}",
    ]


def _short(text: str, limit: int = 70) -> str:
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."
