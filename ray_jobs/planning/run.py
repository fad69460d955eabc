"""Find the cheapest system within an allowed loss of accuracy: sweep, choose, verify, register."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ray_jobs.cluster import connected
from ray_jobs.paths import recording_storage, store_in
from ray_jobs.planning.config import PlanJob
from ray_jobs.sweep.run import base_recipe, prepare_sweep, run_sweep
from ray_jobs.sweep.trials import TrialRow
from ray_jobs.tracking.command_line import command_line
from ray_jobs.tracking.model_registry import Versions, model_uris, register_plan
from ray_jobs.tracking.outbox import is_refusal
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.config import FinetuneJob
from ray_jobs.training.launch import fingerprint
from ray_jobs.training.on_worker import run_on_worker
from ray_jobs.training.task_model import tune_model
from revmux.data.prompt import Prompt, load_prompt, prompt_names, write_prompt
from revmux.data.task import TaskData, load_task
from revmux.errors import UserError
from revmux.methods import BackboneShape, build_method
from revmux.plan.build import for_choosing, make_plan
from revmux.plan.files import PAGE_NAME, PLAN_NAME
from revmux.plan.measure import TrainedAdapter
from revmux.plan.plan import Plan, describe_system
from revmux.pretrained.loading import outline
from revmux.training.recipe import load_backbone
from revmux.utils.copies import is_uri, join_location
from revmux.utils.files import recover_folder, write_durably, write_json
from revmux.utils.place import Place
from revmux.utils.redact import error_line, without_passwords
from revmux.utils.stored_folder import publish_folder, reading_folder, writing_folder
from serve_app.config import server_config

PROMPT_NAME = "prompt.yaml"
DEPLOY = (
    "export RAY_AUTH_MODE=token      # otherwise anyone who can reach this machine can run code on it",
    "ray get-auth-token --generate   # once",
    'eval "$(python -m serve_app.ray_environment)"   # HAProxy in front of the server',
    "ray start --head",
)
"""Shell commands to run before ``serve deploy``."""


def run_plan(job: PlanJob) -> Plan:
    """Run the sweep, choose and verify a system, register it, and write the server's configuration.

    Raises:
        UserError: the goal cannot be met, or the loss on the test split exceeds the allowance. The results are already
            written then.
    """
    storage = recording_storage(job.storage, job.tracking.uri)
    location = join_location(storage, f"plans/{job.name}")
    job = replace(job, store=store_in(storage, job.store))
    job.cluster.check_training()
    backbone, own_labels = outline(job.backbone)
    if own_labels is not None and job.backbone.prompt is None:
        print(
            f"plan: if {job.backbone.model} was tuned on texts from this data, it is too accurate on the choosing set, and the "
            "losses measured there are too high; data that it has not seen gives a cheaper plan",
            flush=True,
        )
    task = load_task(job.data, own_labels)
    choosing = for_choosing(task, job.choosing, job.data.seed)
    check_server(job, [], "http://localhost")
    tracker = Tracker(job.tracking, storage)
    with connected(job.cluster, storage):
        check_host(job.host, nodes())
        if own_labels is None:
            job = replace(job, backbone=replace(job.backbone, model=tuned_model(job, choosing, tracker, storage)))
        sweep = prepare_sweep(job, storage, choosing)
        sweep = replace(sweep, trials=[trial for trial in sweep.trials if is_servable(trial.recipe.method, backbone)])
        if not sweep.trials:
            raise UserError(
                "every point of the space tunes the backbone, which a server shares between methods; choose a space with other methods"
            )
        rows, parent = run_sweep(sweep, tracker)
        made = measure_on_worker(job, rows, choosing, task, location)
    with reading_folder(location) as folder:
        plan = moved(made, folder, location)
        try:
            versions = register_plan(tracker, job.register, plan, job.backbone.model, task.is_pair)
        except Exception as error:
            if is_refusal(error):
                raise
            raise UserError(
                f"the plan is complete ({join_location(location, PAGE_NAME)}), but MLflow at {without_passwords(tracker.uri)} "
                f"cannot be reached ({error_line(error)}); run the same command again later to register the plan"
            ) from None
        record(job, plan, versions, tracker, parent, location)
        if is_uri(location):
            publish_folder(folder, location)
    print(without_passwords(summary(plan, location)))
    if not plan.is_met:
        raise UserError(plan.why_not())
    return plan


def moved(plan: Plan, folder: Path, location: str) -> Plan:
    """A plan whose files a worker has written, as another process sees them.

    Args:
        plan: the plan.
        folder: its files on this machine.
        location: its folder or URI, where a server finds its adapters.
    """

    def adapter(path: str) -> str:
        return join_location(location, os.path.relpath(path, plan.folder))

    served = [replace(one, folders=tuple(map(adapter, one.folders))) for one in plan.served]
    return replace(plan, folder=folder, served=served)


def is_servable(method: Any, backbone: Any) -> bool:
    """Whether a method leaves the backbone unchanged, since SISO and the other adapters share it."""
    with torch.device("meta"):
        built = build_method(method.name, BackboneShape.of(backbone), method.num_inputs, method.options)
    return not built.tunes_backbone


def tuned_model(job: PlanJob, choosing: TaskData, tracker: Tracker, storage: str) -> str:
    """Tune a task model without the selection set, or reuse the one of an earlier start; returns its folder or URI."""
    tuning = FinetuneJob(job.backbone, job.data, job.tuning, job.frozen_layers, job.cluster, job.tracking, storage)
    location = join_location(storage, f"task-models/{job.name}-{fingerprint(tuning.recipe(), choosing)}")
    if not is_uri(location):
        recover_folder(Path(location))
    if "config.json" not in Place.open(location).files():
        tune_model(replace(tuning, output=location), choosing, tracker, storage)
    return location


def measure_on_worker(job: PlanJob, rows: list[TrialRow], choosing: TaskData, task: TaskData, location: str) -> Plan:
    """Measure the candidates, choose a system and verify it, on a worker that has the device."""
    adapters = [
        TrainedAdapter(row.trial, row.adapter, row.infonce_weight, row.run_id)
        for row in rows
        if row.status == "done" and row.adapter is not None
    ]
    tasks = choosing.without_train(), task.with_test_only()
    return run_on_worker("the plan", job.cluster, _plan, job, adapters, *tasks, location, command_line())


def _plan(
    job: PlanJob,
    adapters: list[TrainedAdapter],
    choosing: TaskData,
    task: TaskData,
    location: str,
    command: str,
) -> Plan:
    recipe = base_recipe(job)
    pretrained = load_backbone(recipe, task.label_names)
    pretrained.backbone.freeze().to("cuda" if job.cluster.use_gpu and torch.cuda.is_available() else "cpu")
    with writing_folder(location) as folder:
        return make_plan(
            adapters,
            pretrained,
            choosing,
            task,
            job.goal,
            folder,
            job.backbone.max_length,
            job.store,
            job.measure,
            command,
            partial(print, "plan:", flush=True),
        )


def record(job: PlanJob, plan: Plan, versions: Versions, tracker: Tracker, parent: str, location: str) -> None:
    """Log the plan's files to MLflow, and write the YAML that deploys the plan if the goal is met."""
    content = json.loads((plan.folder / PLAN_NAME).read_text())
    content["registered"] = {"model": job.register, "versions": versions}
    write_json(plan.folder / PLAN_NAME, content)
    files = [PLAN_NAME, PAGE_NAME, "front.png", "front.html"]
    serve = plan.folder / "serve.yaml"
    serve.unlink(missing_ok=True)
    if plan.is_met:
        adapters = model_uris(plan, job.register, versions)
        prompt = None if adapters else served_prompt(job.backbone.prompt, plan.folder, location)
        settings = check_server(job, adapters, tracker.uri, prompt)
        write_durably(serve, yaml.safe_dump(settings, sort_keys=False))
        if without_passwords(tracker.uri) == tracker.uri:  # a password in the URI would be visible in the run
            files.append(serve.name)
        last = plan.served[-1]
        figures = {"promised_loss": last.judged.bound or 0.0, "verified_loss": last.verification.loss}
        figures |= {"verified_loss_upper": last.verification.upper, "throughput_ratio": 1 / last.judged.candidate.cost}
        tracker.log_metrics(parent, figures)
    for name in files:
        tracker.client.log_artifact(parent, str(plan.folder / name), "plan")


def nodes() -> int:
    """Number of machines in the cluster."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def check_host(host: str, machines: int) -> None:
    """Refuse an address at which a planned server on a cluster could not be reached.

    Raises:
        UserError: the cluster has several machines, but the server would accept connections from its own only.
    """
    if machines > 1 and is_loopback(host):
        raise UserError(
            f"host is {host}, so only the head of these {machines} machines could send requests to the planned server; "
            "choose --host 0.0.0.0, on a network where everyone may use the server"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an interface."""
    return host in ("127.0.0.1", "::1", "localhost")


def served_prompt(prompt: str | Prompt | None, folder: Path, location: str) -> str | None:
    """The prompt for a server without adapters, which would record it: the name of a shipped one, or a file.

    Args:
        prompt: the prompt.
        folder: the plan's files on this machine, to which a prompt that is not shipped is written.
        location: the plan's folder or URI. A server cannot read a prompt from a URI, so it gets none from there.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt
    if prompt.name in prompt_names() and load_prompt(prompt.name) == prompt:
        return prompt.name
    write_prompt(prompt, folder / PROMPT_NAME)
    if is_uri(location):
        print(
            f"plan: copy {without_passwords(join_location(location, PROMPT_NAME))} to where every replica can read it, and name "
            "the copy as the setting prompt in serve.yaml",
            flush=True,
        )
        return None
    return join_location(location, PROMPT_NAME)


def check_server(job: PlanJob, adapters: list[str], tracking_uri: str, prompt: str | None = None) -> dict[str, Any]:
    """Build the Serve configuration of a plan and validate it with the server's own settings class.

    Args:
        job: settings of the plan.
        adapters: folders or registry URIs, narrowest first.
        tracking_uri: MLflow URI of the registry.
        prompt: name or file of the prompt; None if the adapters record it.

    Raises:
        UserError: a value is not valid.
    """
    settings = {
        "model": job.backbone.model,
        "revision": job.backbone.revision,
        "dtype": job.backbone.dtype,
        "prompt": prompt,
        "max_length": job.backbone.max_length,
        "adapters": adapters,
        "num_cpus": job.cluster.cpus_per_worker,
        "num_gpus": job.cluster.gpus_per_worker,
    }
    checked = server_config(**settings, host=job.host, port=job.port)
    arguments = checked.model_dump(mode="json", include={name for name, value in settings.items() if value is not None})
    return {
        "proxy_location": "HeadOnly" if is_loopback(checked.host) else "EveryNode",
        "http_options": {"host": checked.host, "port": checked.port},
        "applications": [
            {
                "name": "revmux",
                "route_prefix": "/",
                "import_path": "serve_app.app:build",
                "runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": tracking_uri}},
                "args": arguments,
            }
        ],
    }


def summary(plan: Plan, location: str) -> str:
    """A summary of the plan in a folder or URI, with the commands that deploy it."""
    lines = [f"plan: {join_location(location, PAGE_NAME)}"]
    for one in plan.served:
        verified = one.verification
        lines.append(
            f"N = {one.num_inputs}: {describe_system(one.judged)}; on the test split it loses {verified.loss:.2f} points "
            f"(interval {verified.lower:.2f} to {verified.upper:.2f}): {verified.outcome}"
        )
    if plan.is_met:
        serve = join_location(location, "serve.yaml")
        lines += ["deploy it:", *(f"  {line}" for line in DEPLOY)]
        lines += [f"  serve deploy serve.yaml   # a copy of {serve}" if is_uri(location) else f"  serve deploy {serve}"]
    return "\n".join(lines)
