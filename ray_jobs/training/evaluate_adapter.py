"""Evaluate an adapter on a worker, averaged over groupings of the test split."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from ray_jobs.cluster import connected
from ray_jobs.paths import absolute_location, recording_storage, store_in
from ray_jobs.tracking.tracker import Tracker
from ray_jobs.training.config import EvaluateJob
from ray_jobs.training.on_worker import run_on_worker
from revmux.adapters.compatibility import check_prompt
from revmux.adapters.config import load_adapter_config
from revmux.adapters.folder import load_adapter
from revmux.data.prompt import Prompt
from revmux.data.task import load_task
from revmux.features.base import Features
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.features.tokens import TokenizedTask, tokenize_task
from revmux.pretrained.loading import check_answers, inspect, load_pretrained
from revmux.training.evaluation import evaluate_both
from revmux.training.recipe import relative_cost_at, stored_layers
from revmux.utils.copies import join_location
from revmux.utils.redact import without_passwords
from revmux.utils.stored_folder import write_json_at


def evaluate_adapter(job: EvaluateJob, task: TokenizedTask) -> dict[str, float]:
    """Evaluate one adapter; runs on the worker that has the device."""
    import torch

    pretrained = load_pretrained(job.backbone, task.label_names if job.backbone.prompt else None)
    pretrained.backbone.freeze().to("cuda" if job.cluster.use_gpu and torch.cuda.is_available() else "cpu")
    model = load_adapter(job.adapter, pretrained)
    split = task.open("test", pretrained.tokenizer, job.store)
    layers = stored_layers(model.method, model.prefill_layers)
    features: Features
    if layers is None:
        features = OnlineFeatures(split, pretrained.backbone)
    else:
        print(
            f"evaluate: features of {len(split):,} inputs, stored in {without_passwords(str(job.store.root))}",
            flush=True,
        )
        store = open_features(pretrained, split, layers, job.store)
        features = store.at(layers[0]) if layers else store.with_tokens()
    figures = evaluate_both(model, features, job.shuffles, job.seed, on_shuffle=ShuffleProgress()).metrics()
    return figures | {"cost_counted": relative_cost_at(model, features)}


class ShuffleProgress:
    """Prints the progress of an evaluation at most once per interval, and at the end.

    Args:
        interval: seconds between printed lines.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self.started = self.printed = time.perf_counter()

    def __call__(self, done: int, total: int, accuracy: float) -> None:
        """Report a shuffle; the ``on_shuffle`` of :func:`revmux.training.evaluation.evaluate`."""
        now = time.perf_counter()
        if done < total and now - self.printed < self.interval:
            return
        self.printed = now
        left = (now - self.started) / done * (total - done)
        print(f"evaluate: shuffle {done} of {total}, mean accuracy {accuracy:.1%}, {left:.0f} s left", flush=True)


def run_evaluate(job: EvaluateJob) -> dict[str, float]:
    """Run the whole job: read the data, evaluate the adapter on a worker, and record its metrics."""
    storage = recording_storage(job.storage, job.tracking.uri)
    job = replace(job, store=store_in(storage, job.store))
    name = f"evaluate-{Path(job.adapter).name}"
    output = absolute_location(job.output, "output") if job.output else join_location(storage, f"{name}.json")
    config = load_adapter_config(job.adapter)
    job.cluster.check_here()
    if isinstance(job.backbone.prompt, Prompt):
        check_prompt(config, job.backbone.prompt.with_labels(config.label_names), job.adapter)
    else:
        job = replace(job, backbone=replace(job.backbone, prompt=config.recorded_prompt()))
    check_answers(job.backbone)
    _, own_labels = inspect(job.backbone)
    task = load_task(job.data, own_labels)
    tracker = Tracker(job.tracking, storage)
    with tracker.run(
        name, {"adapter": job.adapter, "method": config.method, "num_inputs": config.num_inputs}
    ) as run_id:
        tracker.log_data(run_id, task.identity)
        with connected(job.cluster, storage):
            tokens = tokenize_task(task, job.backbone, job.store, ["test"])
            figures = run_on_worker("the evaluation", job.cluster, evaluate_adapter, job, tokens)
        tracker.log_metrics(run_id, figures)
    write_json_at(output, {"adapter": job.adapter, "data": task.identity, "shuffles": job.shuffles, "metrics": figures})
    print(json.dumps(figures, indent=2))
    print(f"figures: {without_passwords(output)}")
    return figures
