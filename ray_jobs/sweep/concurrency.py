"""How many trials fit on the cluster at the same time, where their processes run, and warnings when only one fits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster import GIGABYTE, ClusterConfig
from ray_jobs.training.resource_wait import LOG_SECONDS, format_resources

if TYPE_CHECKING:
    from ray.tune import PlacementGroupFactory


def trains_in_process(cluster: ClusterConfig) -> bool:
    """Whether a trial's process is its only worker, instead of the driver of other workers."""
    return cluster.workers == 1


def trial_resources(cluster: ClusterConfig) -> dict[str, float]:
    """The resources that Tune reserves for a trial's process, by Ray's names; memory in bytes.

    A process that only drives its workers gets memory on a node with ``driver_labels``. Without these labels it gets a small
    part of the resource that only this driver's node has. The processes of all trials are then beside the driver, and not on
    the head.
    """
    if trains_in_process(cluster):
        return cluster.worker_bundle
    if cluster.driver_labels:
        return {"memory": cluster.driver_memory * GIGABYTE}
    import ray

    here = ray.get_runtime_context().get_node_id()
    (address,) = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here]
    return {f"node:{address}": 0.001}


def trial_placement(cluster: ClusterConfig) -> PlacementGroupFactory:
    """:func:`trial_resources`, with the labels of the nodes that may run a trial's process."""
    from ray.tune import PlacementGroupFactory

    labels = cluster.labels if trains_in_process(cluster) else cluster.driver_labels
    selector: dict[str, Any] = {"bundle_label_selector": [dict(labels)]} if labels else {}
    return PlacementGroupFactory([trial_resources(cluster)], **selector)


def worker_nodes(cluster: ClusterConfig) -> list[dict[str, float]]:
    """The resources of each living node that has the labels of workers, used or free."""
    import ray

    # Ray also understands operators, such as !spot and in(a, b). They are left to it.
    labels = {name: value for name, value in (cluster.labels or {}).items() if "!" not in value and "(" not in value}
    return [
        node["Resources"] for node in ray.nodes() if node["Alive"] and labels.items() <= node.get("Labels", {}).items()
    ]


def fitting_trials(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """The number of trials whose workers fit on the nodes at the same time.

    Args:
        cluster: workers of a trial.
        nodes: resources of each node.
    """
    each = cluster.worker_bundle
    return sum(min(_times(node, kind, each) for kind in each) for node in nodes) // cluster.workers


def short_resource(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    """The resource of which the nodes have the least compared with what a worker needs, by Ray's name."""
    each = cluster.worker_bundle
    return min(each, key=lambda kind: sum(_times(node, kind, each) for node in nodes))


def _times(node: Mapping[str, float], kind: str, each: Mapping[str, float]) -> int:
    return int(node.get(kind, 0.0) / each[kind] + 1e-9)


def describe_shortage(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    """What a trial needs, what the nodes have together, and which resource is short, as text."""
    each = cluster.worker_resources
    present = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in each}
    labels = f" with the labels {cluster.labels}" if cluster.labels else ""
    return (
        f"a trial needs {cluster.workers} × {format_resources(each)}, and the {len(nodes)} node{'s' * (len(nodes) != 1)}{labels} have "
        f"{format_resources(each, present)}: {short_resource(cluster, nodes)} is short"
    )


class ConcurrencyWatch:
    """Warns when only one trial has been running for a while although more should.

    Args:
        cluster: workers of a trial.
        concurrent: number of trials that should run at the same time.
        seconds: how long one trial must have been alone; starting a process takes a while.
    """

    def __init__(self, cluster: ClusterConfig, concurrent: int, seconds: float = LOG_SECONDS) -> None:
        self.cluster, self.concurrent, self.seconds = cluster, concurrent, seconds
        self.alone_since: float | None = None
        self.warned = False

    def look(self, trials: Sequence[Any]) -> None:
        """Look at Tune's trials. Call this repeatedly."""
        status = [trial.status for trial in trials]
        running, waiting = status.count("RUNNING"), status.count("PENDING")
        if self.concurrent == 1 or running != 1 or not waiting:
            self.alone_since, self.warned = None, False
            return
        now = time.monotonic()
        self.alone_since = self.alone_since or now
        if not self.warned and now - self.alone_since >= self.seconds:
            self.warned = True
            nodes = worker_nodes(self.cluster)
            fitting = fitting_trials(self.cluster, nodes)
            state = f"{fitting} fit the machines, but other work uses them or processes are still starting"
            if fitting < 2:
                state = describe_shortage(self.cluster, nodes)
            print(f"sweep: warning: only one trial is running and {waiting} waiting for resources: {state}", flush=True)
