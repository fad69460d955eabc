"""The machines of a Ray cluster, each a group of processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from polling import wait_until
from serving_http import free_port

RAY = str(Path(sys.executable).with_name("ray"))


class Machines:
    """A head with one core, and machines with one core each that join it.

    Args:
        folder: folder for logs and sockets, whose path must be short.
        environment: environment of the cluster and of its jobs; ``HOME`` is a folder of their own.
        scaling: resources of a machine that the cluster starts on demand and stops when it is idle, at most two at a time.
            The head then has no cores. None starts machines with :meth:`add` only.
        dashboard: port of the head's dashboard, which also accepts jobs; without it, the head has none.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        scaling: Mapping[str, float] | None = None,
        dashboard: int | None = None,
    ) -> None:
        self.folder = folder
        self.environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.address = f"127.0.0.1:{free_port()}"
        self.running: list[subprocess.Popen] = []
        subprocess.run([RAY, "get-auth-token", "--generate"], env=self.environment, check=True, capture_output=True)
        self._head_flags = [
            "--head",
            f"--port={self.address.rpartition(':')[2]}",
            f"--temp-dir={folder}/ray",
            f"--include-dashboard={str(dashboard is not None).lower()}",
        ]
        if dashboard is not None:
            self._head_flags += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        if scaling is not None:
            self._head_flags += ["--num-cpus=0", f"--autoscaling-config={self._write_autoscaler(scaling)}"]
            # The fake provider starts the machines as processes on this one.
            self.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        self.head = self._start(*self._head_flags)

    def _write_autoscaler(self, scaling: Mapping[str, float]) -> Path:
        """Write what ``ray.cluster_utils.AutoscalingCluster`` writes, whose start and end stop every Ray of this machine."""
        lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
        types: dict[str, Any] = {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "machine": {"resources": dict(scaling), "node_config": {}, "min_workers": 0, "max_workers": 2},
        }
        config: dict[str, Any] = {
            "cluster_name": "scaling",
            "max_workers": 2,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 1.0,
            # All machines have the address of this one, and nobody logs in to them.
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": types,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }
        file = self.folder / "autoscaler.json"
        file.write_text(json.dumps(config | {name: [] for name in lists}))
        return file

    def add(self, *flags: str) -> subprocess.Popen:
        """Start a machine that joins the cluster, with these flags of ``ray start``."""
        # Machines that start at the same time take each other's sockets.
        log = self.folder / f"node-{len(self.running) - 1}.log"
        wait_until(lambda: "Ray runtime started" in log.read_text())
        return self._start(f"--address={self.address}", *flags)

    def replace_head(self) -> None:
        """Kill all processes of the head at once, and start another one at its address. The machines leave with the head."""
        for machine in self.running:
            self.lose(machine)
        self.head = self._start(*self._head_flags)

    def lose(self, machine: subprocess.Popen) -> None:
        """Kill all processes of a machine at once."""
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(machine.pid).children(recursive=True)
            kill_group(machine)
            psutil.wait_procs(kill_all(family))

    def _start(self, *flags: str) -> subprocess.Popen:
        command = [RAY, "start", "--block", "--min-worker-port=0", "--max-worker-port=0", *flags]
        if not any(flag.startswith("--num-cpus") for flag in flags):
            command.append("--num-cpus=1")
        with (self.folder / f"node-{len(self.running)}.log").open("w") as output:
            started = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running.append(started)
        return started


@contextmanager
def cluster_of_machines(folder: Path, environment: Mapping[str, str], **settings: Any) -> Iterator[Machines]:
    """A running cluster that has its head only; all of its processes end with the context.

    Args:
        folder: see :class:`Machines`.
        environment: see :class:`Machines`.
        settings: the other arguments of :class:`Machines`.
    """
    machines = Machines(folder, environment, **settings)
    try:
        yield machines
    finally:
        for machine in machines.running:
            machines.lose(machine)


def environment_in(folder: Path) -> dict[str, str]:
    """The environment of a cluster and its jobs, whose home is a folder of their own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"HOME": str(folder), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    # On a busy machine, workers of a lower priority would not start in time.
    return kept | own | {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}


def kill_all(processes: list[psutil.Process]) -> list[psutil.Process]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return processes


def kill_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def processes_named(name: str, parent: int) -> list[psutil.Process]:
    """The descendants of a process whose command line contains a name, such as that of an actor."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found
