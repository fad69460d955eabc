"""What a user meets first: imports that take no time, mistakes that are found before torch is imported, and help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pytest

import revmux
from ray_jobs import console

HEAVY = ("torch", "transformers", "datasets", "pandas", "ray", "mlflow", "matplotlib")
COMMANDS = [name for commands in console.COMMANDS.values() for name in commands]
RUN_ALL = """
import contextlib, importlib, io, json, os, runpy, sys, traceback
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Blocked(Loader):
    def create_module(self, spec):
        raise RuntimeError(f"{spec.name} is imported before the settings are checked")

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, Blocked()) if name in blocked else None

def run(module, missing, *argv):
    sys.argv = [module, *argv]
    if missing:
        sys.modules[missing] = None
    for name in (module, module + ".__main__"):  # runpy warns of a module that is imported already
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            status = traceback.print_exc() or 1
    return status, out.getvalue(), err.getvalue()

blocked, calls = json.load(sys.stdin)
sys.meta_path.insert(0, Finder())
for module in sorted({module for module, *_ in calls}):
    importlib.import_module(module)
answers = []
for call in calls:
    reader, writer = os.pipe()
    if not os.fork():
        with os.fdopen(writer, "w") as file:
            json.dump(run(*call), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answers.append(json.load(file))
    os.wait()
json.dump(answers, sys.stdout)
"""


class Answer(NamedTuple):
    status: int
    out: str
    err: str


def start(code: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, check=False, env=environment
    )


def run_all(calls: list[tuple[str, ...]], blocked: Sequence[str]) -> dict[tuple[str, ...], Answer]:
    """Run commands in forks of one process, because starting Python takes longer than a command.

    Args:
        calls: module, package that is to look as if it were not installed (or ""), and arguments.
        blocked: packages that cannot be imported in this process.
    """
    done = start(RUN_ALL, json.dumps([blocked, calls]))
    assert done.returncode == 0, done.stderr
    return {call: Answer(*answer) for call, answer in zip(calls, json.loads(done.stdout), strict=True)}


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
    "server with an invalid port": ("serve_app", ["--model", "MODEL", "--port", "0"], "port"),
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


MISSING: list[tuple[list[str], str, str]] = [
    (["train"], "ray", "pip install 'revmux[train]'"),
    (["train"], "mlflow", "pip install 'revmux[mlflow]'"),
    (["tune"], "optuna", "pip install 'revmux[tune]'"),
    (["tune"], "matplotlib", "pip install 'revmux[report]'"),
    (["plan", "--goal.allowance", "1"], "scipy", "pip install 'revmux[plan]'"),
    (["serve", "--model", "MODEL"], "fastapi", "pip install 'revmux[serve]'"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths behind words in capitals."""
    folder = tmp_path_factory.mktemp("command-line")
    (folder / "reviews.csv").write_text("body,stars\nGood.,1\nBad.,0\n")
    for name in ("empty", "model"):
        (folder / name).mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    return {"TABLE": f"{folder}/reviews.csv", "MODEL": f"{folder}/model", "EMPTY": f"{folder}/empty"}


def with_places(words: Sequence[str], places: dict[str, str]) -> tuple[str, ...]:
    return tuple(places.get(word, word) for word in words)


@pytest.fixture(scope="module")
def answers(places: dict[str, str]) -> dict[tuple[str, ...], Answer]:
    """The answers to all mistakes and to every ``--help``, in a process that cannot import anything heavy."""
    mistakes = [(module, "", *with_places(argv, places)) for module, argv, _ in MISTAKES.values()]
    helps = [("ray_jobs.console", "", command, "--help") for command in COMMANDS]
    return run_all([*mistakes, *helps, ("ray_jobs.console", "", "--help")], HEAVY)


@pytest.fixture(scope="module")
def answers_without_an_extra(places: dict[str, str]) -> dict[tuple[str, ...], Answer]:
    calls = [("ray_jobs.console", missing, *with_places(argv, places)) for argv, missing, _ in MISSING]
    return run_all(calls, [])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_heavy_is_imported(
    mistake: str, answers: dict[tuple[str, ...], Answer], places: dict[str, str]
) -> None:
    module, argv, words = MISTAKES[mistake]
    answer = answers[module, "", *with_places(argv, places)]
    assert answer.status == 2, answer.err
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    assert words.replace("TABLE", places["TABLE"]) in line
    assert not answer.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command: str, answers: dict[tuple[str, ...], Answer]) -> None:
    answer = answers["ray_jobs.console", "", command, "--help"]
    assert answer.status == 0, answer.err
    assert f"revmux {command}" in answer.out
    assert "FieldInfo" not in answer.out
    assert "Annotated" not in answer.out


def test_the_help_lists_every_command(answers: dict[tuple[str, ...], Answer]) -> None:
    answer = answers["ray_jobs.console", "", "--help"]
    assert answer.status == 0, answer.err
    for commands in console.COMMANDS.values():
        for name, (_, line) in commands.items():
            assert f"{name:<12}{line}" in answer.out


@pytest.mark.parametrize(("argv", "missing", "command"), MISSING)
def test_a_missing_extra_is_answered_with_the_pip_command(
    argv: list[str],
    missing: str,
    command: str,
    answers_without_an_extra: dict[tuple[str, ...], Answer],
    places: dict[str, str],
) -> None:
    answer = answers_without_an_extra["ray_jobs.console", missing, *with_places(argv, places)]
    assert answer.status == 2
    (line,) = answer.err.splitlines()
    assert line.startswith(f"error: {missing} is not installed")
    assert command in line


def test_the_methods_known_without_torch_are_the_registered_ones() -> None:
    from revmux.methods.registry import METHODS
    from revmux.methods.siso import Siso
    from revmux.training.config import METHOD_NAMES, PLAIN_METHOD

    assert Siso.name == PLAIN_METHOD
    assert set(METHOD_NAMES) == {name for name in METHODS.names() if METHODS[name].__module__.startswith("revmux.")}
