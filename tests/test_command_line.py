"""What a user meets first: imports that take no time, mistakes that are found before torch is imported, and help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import revmux
from ray_jobs import console

HEAVY = ("torch", "transformers", "datasets", "pandas", "ray", "mlflow", "matplotlib")
BLOCKED = """
import runpy, sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Blocked(Loader):
    def create_module(self, spec):
        raise RuntimeError(f"{{spec.name}} is imported before the settings are checked")

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, Blocked()) if name in {blocked!r} else None

sys.meta_path.insert(0, Finder())
sys.argv = {argv!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def start(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )


def light(module: str, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module in a process that cannot import anything heavy."""
    return start(BLOCKED.format(blocked=HEAVY, argv=[module, *map(str, argv)], module=module))


def test_import_revmux_imports_nothing_heavy() -> None:
    done = start(f"import revmux, sys; print([name for name in {(*HEAVY, 'jsonargparse')!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", revmux.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(revmux, name) is not None
    assert name in dir(revmux)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        revmux.no_such_name  # noqa: B018


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "reviews.csv"
    file.write_text("body,stars\nGood.,1\nBad.,0\n")
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    return folder


MISTAKES = {
    "missing data file": (
        "ray_jobs.train",
        ["--backbone.model", "MODEL", "--data.source", "nowhere.csv"],
        "nowhere.csv",
    ),
    "unknown column": (
        "ray_jobs.train",
        ["--backbone.model", "MODEL", "--data.source", "TABLE", "--data.text_column", "review"],
        "unknown text_column 'review'; columns of TABLE: body, stars",
    ),
    "column without a usual name": (
        "ray_jobs.finetune",
        ["--backbone.model", "MODEL", "--data.source", "TABLE"],
        "its columns: body, stars",
    ),
    "misspelled flag": (
        "ray_jobs.train",
        ["--optim.epochz", "3"],
        "unknown setting --optim.epochz; did you mean --optim.epochs?",
    ),
    "flag without its group": ("ray_jobs.train", ["--epochs", "3"], "did you mean --optim.epochs"),
    "flag of another type": ("ray_jobs.train", ["--optim.epochs", "many"], "--optim.epochs"),
    "value out of range": ("ray_jobs.tune", ["--optim.epochs", "0"], "epochs is 0"),
    "missing required setting": ("ray_jobs.evaluate", [], "adapter"),
    "unknown choice": ("ray_jobs.train", ["--backbone.dtype", "int4"], "int4"),
    "missing input": (
        "ray_jobs.classify",
        ["--input", "nowhere.csv", "--output", "out", "--model", "MODEL"],
        "cannot find input",
    ),
    "input without the text column": (
        "ray_jobs.classify",
        ["--input", "TABLE", "--output", "out", "--model", "MODEL", "--text_column", "review"],
        "unknown text_column 'review'; columns of TABLE: body, stars",
    ),
    "classification without a model": (
        "ray_jobs.classify",
        ["--input", "TABLE", "--output", "out"],
        "name at least one",
    ),
    "classification with no adapter folder": (
        "ray_jobs.classify",
        ["--input", "TABLE", "--output", "out", "--text_column", "body", "--adapter", "EMPTY"],
        "not an adapter folder",
    ),
    "unknown method": ("ray_jobs.train", ["--method.name", "revmax"], "unknown method 'revmax'"),
    "missing model folder": ("ray_jobs.train", ["--backbone.model", "./nowhere"], "cannot find folder './nowhere'"),
    "folder that is no model": ("ray_jobs.features", ["--backbone.model", "EMPTY"], "contains no config.json"),
    "model without a head": ("ray_jobs.train", [], "without a trained classification head; tune a task model first"),
    "folder that is no adapter": ("ray_jobs.evaluate", ["--adapter", "EMPTY"], "not an adapter folder"),
    "missing space": (
        "ray_jobs.tune",
        ["--space", "nowhere"],
        "unknown search space 'nowhere'; known: paper, plan, quick, wide",
    ),
    "missing prompt": ("ray_jobs.train", ["--backbone.prompt", "nowhere"], "unknown prompt 'nowhere'"),
    "missing configuration file": ("ray_jobs.train", ["--config", "nowhere.yaml"], "nowhere.yaml"),
    "plan without a goal": ("ray_jobs.plan", [], "goal"),
    "tour of a missing file": ("ray_jobs.quickstart", ["--data.source", "nowhere.csv"], "nowhere.csv"),
    "server without a model": ("serve_app", [], "nothing to serve"),
    "server of a missing folder": ("serve_app", ["--model", "./nowhere"], "cannot find folder './nowhere'"),
    "server of no adapter": ("serve_app", ["--model", "MODEL", "--adapters", "EMPTY"], "not an adapter folder"),
    "server with an illegal port": ("serve_app", ["--model", "MODEL", "--port", "0"], "port"),
    "cost of an unknown method": ("revmux", ["cost", "--method", "revmax"], "unknown method 'revmax'"),
    "cost with a wrong flag": (
        "revmux",
        ["cost", "--methd", "revmux"],
        "unknown setting --methd; did you mean --method?",
    ),
    "push of no adapter": ("revmux", ["push", "EMPTY", "me/adapter"], "not an adapter folder"),
    "unknown tool": ("revmux", ["costs"], "costs"),
    "unknown command": ("ray_jobs.console", ["trains"], "unknown command 'trains'; did you mean train?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_heavy_is_imported(
    mistake: str, tmp_path: Path, table: Path, model: Path
) -> None:
    (tmp_path / "empty").mkdir()
    module, argv, words = MISTAKES[mistake]
    places = {"TABLE": str(table), "MODEL": str(model), "EMPTY": str(tmp_path / "empty")}
    done = light(module, *(places.get(word, word) for word in argv))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words.replace("TABLE", str(table)) in line
    assert not done.stdout


@pytest.mark.parametrize("command", [name for commands in console.COMMANDS.values() for name in commands])
def test_every_command_has_its_own_help(command: str) -> None:
    done = light("ray_jobs.console", command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"revmux {command}" in done.stdout
    assert "FieldInfo" not in done.stdout
    assert "Annotated" not in done.stdout


def test_the_help_lists_every_command() -> None:
    done = light("ray_jobs.console", "--help")
    assert done.returncode == 0, done.stderr
    for commands in console.COMMANDS.values():
        for name, (_, line) in commands.items():
            assert f"{name:<12}{line}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "missing", "command"),
    [
        (["train"], "ray", "pip install 'revmux[train]'"),
        (["train"], "mlflow", "pip install 'revmux[mlflow]'"),
        (["tune"], "optuna", "pip install 'revmux[tune]'"),
        (["tune"], "matplotlib", "pip install 'revmux[report]'"),
        (["plan", "--goal.allowance", "1"], "scipy", "pip install 'revmux[plan]'"),
        (["serve", "--model", "MODEL"], "fastapi", "pip install 'revmux[serve]'"),
    ],
)
def test_a_missing_extra_is_answered_with_the_pip_command(
    argv: list[str], missing: str, command: str, model: Path
) -> None:
    argv = [str(model) if word == "MODEL" else word for word in argv]
    done = start(
        f"import sys; sys.modules[{missing!r}] = None\nfrom ray_jobs.console import main\nsys.exit(main({argv!r}))"
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {missing} is not installed")
    assert command in line


def test_the_methods_known_without_torch_are_the_registered_ones() -> None:
    from revmux.methods.registry import METHODS
    from revmux.methods.siso import Siso
    from revmux.training.config import METHOD_NAMES, PLAIN_METHOD

    assert Siso.name == PLAIN_METHOD
    assert set(METHOD_NAMES) == {name for name in METHODS.names() if METHODS[name].__module__.startswith("revmux.")}
