"""Serve in the foreground: ``python -m serve_app --model FOLDER --adapters FOLDER,FOLDER``."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from revmux.errors import UserError
from serve_app.config import ServerConfig, server_config


def parse(argv: Sequence[str] | None = None) -> ServerConfig:
    """The configuration from ``--config FILE.yaml`` and flags; flags win."""
    parser = ArgumentParser(prog="python -m serve_app", description="Serve a classifier and its RevMUX adapters.")
    parser.add_argument("--config", action="config", help="YAML file with the settings below; flags win over it")
    parser.add_class_arguments(ServerConfig, as_group=True, skip={"adapters"})
    parser.add_argument(
        "--adapters",
        type=list[str] | str,
        default=[],
        help="adapter folders, models:/name@alias or runs:/id/path, one for each N, separated by commas",
    )
    settings = parser.parse_args(argv).as_dict()
    del settings["config"]
    return server_config(**settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; 0, or 2 for a mistake of the operator's."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("serve_app").setLevel(logging.INFO)
    try:
        config = parse(argv)
        from serve_app.run import deploy, shutdown

        url = deploy(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"serving on {url}; Ctrl-C stops", flush=True)
    stop.wait()
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
