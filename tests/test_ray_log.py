"""Ray's own messages go to a named file; the job's output stays on the terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.ray_log import is_from_ray

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-24 17:19:30,719 E 18277 18277] core_worker.cc:2465: Actor with class name: 'MapWorker'",
        "2026-11-24 17:21:36,019\tWARNING token_setup.py:85 -- Set RAY_AUTH_MODE=disabled to opt out.",
        "INFO 2026-11-24 17:22:00,260 proxy 192.0.2.2 -- Got updated endpoints: {}.",
    ],
)
def test_log_lines_of_ray_are_recognised_by_their_format(line: str) -> None:
    assert is_from_ray({"pid": 1}, line)


def test_log_lines_of_rays_own_processes_count_as_rays() -> None:
    assert is_from_ray({"pid": "raylet"}, "Task failed. There are infinite retries remaining")
    assert is_from_ray({"pid": 1, "actor_name": "ServeController"}, "anything")
    assert not is_from_ray({"pid": "autoscaler"}, "Adding 1 node(s)")


@pytest.mark.parametrize("line", ["task-model: epoch 1/1, step 6/6", "WARNING: low on disk", "Traceback (most recent)"])
def test_other_lines_are_shown(line: str) -> None:
    assert not is_from_ray({"pid": 1, "actor_name": "RayTrainWorker"}, line)


SCRIPT = """
import logging, os, sys
from pathlib import Path
import ray
from ray._private import worker
from ray_jobs.ray_log import redirect_ray_messages

logging.getLogger("library").addHandler(logging.StreamHandler())  # as transformers does when it is imported
lines = ["INFO 2026-11-24 17:22:00,260 proxy 192.0.2.2 -- Got updated endpoints", "task-model: epoch 1/1"]
with redirect_ray_messages(Path(sys.argv[1])):
    logging.getLogger("ray.train").warning("from a logger")
    os.write(2, b"from native code\\n")
    print("a warning of the job", file=sys.stderr)
    logging.getLogger("library").warning("a warning of a library")
    worker.print_to_stdstream({"pid": 7, "is_err": False, "lines": lines, "ip": "a", "localhost": "a"}, True)
os.write(2, b"native code afterwards\\n")
logging.getLogger("library").warning("and another")
print("the job's last line", file=sys.stderr)
"""


def test_messages_of_ray_go_to_the_file_and_all_others_to_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "ray.log"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(log)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "task-model: epoch 1/1\n"
    assert done.stderr == (
        "a warning of the job\na warning of a library\nnative code afterwards\nand another\nthe job's last line\n"
    )
    text = log.read_text()
    for part in ("WARNING", "from a logger", "from native code", "Got updated endpoints"):
        assert part in text


def test_the_handlers_of_rays_logger_are_restored(tmp_path: Path) -> None:
    from ray_jobs.ray_log import redirect_ray_messages

    before = list(logging.getLogger("ray").handlers)
    with redirect_ray_messages(tmp_path / "ray.log"):
        assert logging.getLogger("ray").handlers != before
    assert logging.getLogger("ray").handlers == before
