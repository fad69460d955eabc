"""The machines of a Ray cluster, each a group of processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from serving_http import free_port

RAY = str(Path(sys.executable).with_name("ray"))


class Machines:
    """A head with one core, and machines with one core each that join it.

    Args:
        folder: folder for logs and sockets, whose path must be short.
        environment: environment of the cluster and of its jobs; ``HOME`` is a folder of their own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.address = f"127.0.0.1:{free_port()}"
        self.running: list[subprocess.Popen] = []
        subprocess.run([RAY, "get-auth-token", "--generate"], env=self.environment, check=True, capture_output=True)
        self._start(
            "--head",
            f"--port={self.address.rpartition(':')[2]}",
            f"--temp-dir={folder}/ray",
            "--include-dashboard=false",
        )

    def add(self) -> subprocess.Popen:
        """Start a machine that joins the cluster."""
        return self._start(f"--address={self.address}")

    def lose(self, machine: subprocess.Popen) -> None:
        """Kill all processes of a machine at once."""
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(machine.pid).children(recursive=True)
            kill_group(machine)
            psutil.wait_procs(kill_all(family))

    def _start(self, *flags: str) -> subprocess.Popen:
        command = [RAY, "start", "--block", "--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0", *flags]
        with (self.folder / f"node-{len(self.running)}.log").open("w") as output:
            started = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running.append(started)
        return started


@contextmanager
def cluster_of_machines(folder: Path, environment: Mapping[str, str]) -> Iterator[Machines]:
    """A running cluster that has its head only; all of its processes end with the context."""
    machines = Machines(folder, environment)
    try:
        yield machines
    finally:
        for machine in machines.running:
            machines.lose(machine)


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
