"""Connect a job to a Ray cluster: a new one on this machine, or a running one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_jobs.paths import own_folder
from ray_jobs.ray_internals import is_head
from ray_jobs.ray_log import redirect_ray_messages
from revmux.errors import UserError
from revmux.utils.environment import compute_environment
from revmux.utils.extras import require

POLLING = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""After each epoch, workers wait until Ray Train polls their reports. By default it polls every 2 seconds."""
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine is not preempted
    POLLING: "0.2",
}
GIGABYTE = 10**9


@dataclass(frozen=True)
class ClusterConfig:
    """Workers and the Ray cluster that they run on.

    Args:
        address: Address of a running cluster, auto for the cluster that this machine belongs to, or local to start a
            new one on this machine. Default: auto inside a submitted job, otherwise local.
        workers: Number of training processes. At least 1.
        cpus_per_worker: CPU cores per worker, which also sets its number of threads. Above 0.
        gpus_per_worker: GPUs per worker, a whole number or a fraction below 1. 0 trains on CPUs (gloo), higher values
            on GPUs (nccl).
        min_workers: Smallest number of workers with which training may continue after a loss. It scales up again when
            machines come back. The result is the same up to rounding and dropout. Default: workers, so that training
            waits for replacements.
        resize_minutes: With min_workers: minutes between checks for room for more workers. Above 0. A resize continues
            from the last checkpoint.
        memory_per_worker: Memory to reserve per worker, in GB. 0 reserves none.
        resources_per_worker: Custom resources to reserve per worker, as a mapping such as {spot: 1}.
        accelerator_type: GPU type, by Ray's name for it, such as A10G, L4 or H100. Default: any.
        labels: Labels that the workers' nodes must have, as a mapping such as {market-type: spot}. Default: none.
        driver_labels: Labels of the nodes for the processes that drive the trials of a sweep, if a trial has several workers.
            Default: they run on the node of the job's own driver.
        driver_memory: With driver_labels: memory to reserve for each of these processes and its Ray Train controller,
            in GB. Above 0.
        collective_minutes: Minutes after which workers that are waiting for each other fail and restart. Above 0.
        max_failures: Number of restarts from the last checkpoint before the job fails. The count starts again whenever
            training completes an epoch, and preemptions do not count. 0 or more.
        wait_minutes: Minutes to wait, at the start or after a loss, for machines that the workers need and the cluster
            does not have yet, before the job fails. 0 waits without a limit.
    """

    address: str | None = None
    workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    min_workers: int | None = None
    resize_minutes: float = 5.0
    memory_per_worker: float = 0.0
    resources_per_worker: dict[str, float] | None = None
    accelerator_type: str | None = None
    labels: dict[str, str] | None = None
    driver_labels: dict[str, str] | None = None
    driver_memory: float = 1.5
    collective_minutes: float = 30.0
    max_failures: int = 3
    wait_minutes: float = 60.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}; choose 1 or more")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise UserError(f"min_workers is {self.min_workers}; choose 1 to workers ({self.workers})")
        for name in ("cpus_per_worker", "resize_minutes", "driver_memory", "collective_minutes"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose more than 0, such as 1")
        for kind, amount in (self.resources_per_worker or {}).items():
            if kind in ("CPU", "GPU", "memory") or amount <= 0:
                raise UserError(
                    f"resources_per_worker has {kind} {amount:g}; choose custom resources above 0, and set CPUs, GPUs and memory "
                    "with cpus_per_worker, gpus_per_worker and memory_per_worker"
                )
        for name in ("gpus_per_worker", "memory_per_worker", "max_failures", "wait_minutes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; choose 0 or more")
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise UserError(
                f"accelerator_type is {self.accelerator_type!r}, but gpus_per_worker is 0; set --cluster.gpus_per_worker 1 or omit the "
                "type"
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise UserError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; choose a whole number, or a fraction below 1 to share a GPU"
            )

    @property
    def resolved_address(self) -> str:
        """The configured address, or the default for this process."""
        in_cluster = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ
        return self.address or ("auto" if in_cluster else "local")

    @property
    def use_gpu(self) -> bool:
        """Whether workers train on GPUs."""
        return self.gpus_per_worker > 0

    @property
    def device(self) -> str:
        """The device of a worker's model."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def worker_resources(self) -> dict[str, float]:
        """The resources of a worker, by Ray's names; memory in bytes."""
        return (
            {"CPU": self.cpus_per_worker}
            | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})
            | ({"memory": self.memory_per_worker * GIGABYTE} if self.memory_per_worker else {})
            | (self.resources_per_worker or {})
        )

    @property
    def worker_bundle(self) -> dict[str, float]:
        """:attr:`worker_resources` with the mark of the type of GPU, for a bundle of a placement group."""
        kind = self.accelerator_type
        return self.worker_resources | ({f"accelerator_type:{kind}": 0.001} if kind else {})

    @property
    def remote_options(self) -> dict[str, Any]:
        """The resources and the placement of a worker, as options of a Ray task or actor."""
        options = {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker or None,
            "memory": self.memory_per_worker * GIGABYTE or None,
            "resources": self.resources_per_worker,
            "accelerator_type": self.accelerator_type,
            "label_selector": self.labels,
        }
        return {name: value for name, value in options.items() if value is not None}

    @property
    def is_this_machine(self) -> bool:
        """Whether all work runs on this machine's CPUs, so that the driver's process can do it as well as a worker."""
        return self.resolved_address == "local" and not self.use_gpu

    def check_training(self) -> None:
        """:meth:`check_here` for workers that train together.

        Raises:
            UserError: see :meth:`check_here`; or several workers would share a GPU, which NCCL does not support.
        """
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            raise UserError(
                f"gpus_per_worker is {self.gpus_per_worker:g} with {self.workers} workers, but workers that train together "
                "cannot share a GPU (NCCL does not support it); choose --cluster.workers 1, or --cluster.gpus_per_worker 1"
            )
        self.check_here()

    def check_here(self) -> None:
        """Check that this machine has GPUs if they are requested, before a local cluster starts.

        Raises:
            UserError: GPUs are requested and torch finds none on this machine.
        """
        require("ray", "train")
        if self.resolved_address != "local" or not self.use_gpu:
            return
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"gpus_per_worker is {self.gpus_per_worker}, but torch finds no GPU on this machine; choose "
                "gpus_per_worker 0, or set --cluster.address to a cluster with GPUs"
            )


def check_port_number(port: int) -> None:
    """Check that a number is a TCP port.

    Raises:
        UserError: the number is out of range; the message names the valid range.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"port is {port}; choose 1 to 65535, such as 8000")


@contextmanager
def connected(config: ClusterConfig, storage: str | Path | None = None) -> Iterator[None]:
    """Inside the context, this process is connected to the cluster. A local cluster starts and stops with it.

    Args:
        config: address and workers.
        storage: storage of the job, in whose folder on this machine Ray's own messages go to ``logs/ray.log``; None prints
            them instead.

    Raises:
        UserError: there is no cluster at the address, or this machine has too few CPUs or GPUs.
    """
    config.check_here()
    import ray

    if ray.is_initialized():
        check_resources(config)
        yield
        return
    with ExitStack() as stack:
        if storage is not None:
            log = own_folder(storage) / "logs" / "ray.log"
            stack.enter_context(redirect_ray_messages(log))
            print(f"Ray's own messages: {log}", flush=True)
        stack.callback(ray.shutdown)
        _connect(config)
        check_resources(config)
        if warning := warn_about_head(ray.nodes(), ray.get_runtime_context().get_node_id()):
            print(f"warning: {warning}", flush=True)
        yield


def _connect(config: ClusterConfig) -> None:
    import ray

    address = config.resolved_address
    if address == "local":
        # The new cluster's processes inherit these variables. With a runtime environment, Ray would not use the workers
        # that it starts with the cluster, and would start each further one in two steps.
        os.environ.update(compute_environment() | LOCAL_ENVIRONMENT)
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster at {address!r} ({error}); start one with 'ray start --head', or choose --cluster.address local"
        ) from None


def warn_about_head(nodes: Sequence[Mapping[str, Any]], driver: str) -> str | None:
    """A warning if the driver runs on the head of a cluster whose other nodes do the work.

    Args:
        nodes: the cluster's nodes, from ``ray.nodes()``.
        driver: id of the driver's node.
    """
    alive = [node for node in nodes if node["Alive"]]
    for node in alive:
        if node["NodeID"] == driver and is_head(node) and (len(alive) > 1 or not node["Resources"].get("CPU")):
            return (
                "the driver of this job runs on the cluster's head, where it reads the data and hashes the model's files; if "
                "that is too much for the head, submit the job with --entrypoint-resources, and Ray starts the driver on a "
                "node that offers them (docs/jobs.md, On many GPUs)"
            )
    return None


def check_resources(config: ClusterConfig) -> None:
    """Check that a local cluster is large enough for the job.

    Other clusters are not checked, since they may scale with demand and have fewer machines now than they can get.

    Raises:
        UserError: names the requested and the available resources.
    """
    import ray

    if config.resolved_address != "local":
        return
    present = ray.cluster_resources()
    for kind, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        requested, available = each * config.workers, present.get(kind, 0.0)
        if requested > available:
            raise UserError(
                f"{config.workers} workers × {each:g} {kind} = {requested:g}, but this machine has {available:g}; "
                f"choose fewer --cluster.workers or a smaller --cluster.{kind.lower()}s_per_worker"
            )
