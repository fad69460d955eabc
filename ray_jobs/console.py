"""The ``revmux`` command with a subcommand per job and tool. It imports only the module of the chosen subcommand."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence

from revmux import __version__
from revmux.utils.parser import did_you_mean

COMMANDS = {
    "Train and compare": {
        "quickstart": (
            "ray_jobs.quickstart:command",
            "A guided tour: tune a task model, train adapters, plan, serve, report.",
        ),
        "finetune": ("ray_jobs.finetune:command", "Tune a backbone to a task. The result is the frozen task model."),
        "features": ("ray_jobs.features:command", "Store the frozen model's states ahead of training."),
        "train": ("ray_jobs.train:command", "Train adapters on a frozen task model."),
        "tune": ("ray_jobs.tune:command", "Sweep N, l and λ over a search space."),
        "evaluate": ("ray_jobs.evaluate:command", "Evaluate an adapter on the test split."),
        "plan": ("ray_jobs.plan:command", "Find the cheapest system within an allowed loss of accuracy."),
    },
    "Serve and share": {
        "classify": (
            "ray_jobs.classify:command",
            "Classify a whole data set of Parquet, CSV, JSON lines or Arrow files.",
        ),
        "serve": ("serve_app.__main__:main", "Serve a task model and its adapters over HTTP."),
        "push": ("revmux.__main__:main", "Push an adapter to the Hugging Face hub."),
    },
    "Look up": {
        "cost": ("revmux.__main__:main", "Estimate the speed-up of a method before training."),
        "memory": ("revmux.__main__:main", "Estimate the memory of training and serving."),
        "methods": ("revmux.__main__:main", "List the methods and their options."),
        "calibrate": ("revmux.__main__:main", "Fit a bias per label word of a prompt."),
        "fetch": ("revmux.__main__:main", "List or download the embedded models and example data."),
        "cache": ("revmux.__main__:main", "List or remove stored features."),
    },
}
"""The function and help line of each subcommand, under the headings of the help."""


def help_text() -> str:
    """The text of ``revmux --help``."""
    lines = ["usage: revmux COMMAND [SETTINGS]", "", "Multiplexed inference of frozen classifiers.", ""]
    for heading, commands in COMMANDS.items():
        lines += [f"{heading}:", *(f"  {name:<12}{line}" for name, (_, line) in commands.items()), ""]
    return "\n".join([*lines, "revmux COMMAND --help lists the settings of a command."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: command line without the program's name; the process's own by default.

    Returns:
        The exit status of the subcommand; 2 for an unknown subcommand.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    functions = {name: function for commands in COMMANDS.values() for name, (function, _) in commands.items()}
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"revmux {__version__}")
        return 0
    if name not in functions:
        given = f"unknown command {name!r}{did_you_mean(name, functions)}" if name else "no command given"
        print(f"error: {given}; commands: {', '.join(functions)}; see revmux --help", file=sys.stderr)
        return 2
    status: int = pkgutil.resolve_name(functions[name])(rest, f"revmux {name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
