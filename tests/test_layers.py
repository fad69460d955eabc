"""The library stands alone: no part of it needs Ray, MLflow or a web framework."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import revmux
from revmux import UserError
from revmux.utils.extras import require

PACKAGE = Path(revmux.__file__).parent
OUTER = ("ray", "mlflow", "fastapi", "starlette")

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None  # as if it were not installed
import revmux
names = [module.name for module in pkgutil.walk_packages(revmux.__path__, "revmux.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_imports_without_the_outer_packages() -> None:
    code = IMPORT_ALL.format(blocked=OUTER)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py"]
    assert int(done.stdout.splitlines()[-1]) == len(modules)


def test_processes_that_run_no_model_do_not_wait_for_its_imports() -> None:
    """The one that builds the application for Serve, the one in which Ray Train watches the workers, and front ends."""
    line = "import sys, {}; assert {!r} not in sys.modules\n"
    code = line.format("serve_app.app", "torch") + line.format("ray_jobs.training.worker_errors", "transformers")
    code += line.format("serve_app.front_end, serve_app.web", "transformers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_reported_with_the_pip_command() -> None:
    with pytest.raises(
        UserError, match=r"no_such_plotter\.pyplot is not installed; run: pip install 'revmux\[report\]'"
    ):
        require("no_such_plotter.pyplot", "report")


def test_an_installed_package_is_returned() -> None:
    assert require("json.decoder", "report") is sys.modules["json.decoder"]
