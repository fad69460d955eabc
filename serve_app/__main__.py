"""Serve in the foreground: ``python -m serve_app --model FOLDER --adapters FOLDER,FOLDER``."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence

from revmux.adapters.config import load_adapter_config
from revmux.errors import UserError
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.location import check_model
from revmux.utils.extras import check_extras
from revmux.utils.parser import Parser
from revmux.utils.redact import without_passwords
from serve_app.config import ServerConfig, server_config
from serve_app.sources import is_mlflow


def parse(argv: Sequence[str] | None = None, prog: str = "python -m serve_app") -> ServerConfig:
    """Read the configuration from ``--config FILE.yaml`` and flags. Flags override the file."""
    parser = Parser(prog=prog, description="Serve a frozen task model and its RevMUX adapters over HTTP.")
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below. Flags override it."
    )
    parser.add_class_arguments(ServerConfig, as_group=True, skip={"adapters"})
    parser.add_argument(
        "--adapters",
        type=list[str] | str,
        default=[],
        help="Adapters separated by commas, one for each N, and one for each later stage of a ladder: folders "
        "or their URIs, Hugging Face ids, models:/NAME@ALIAS or runs:/ID/PATH.",
    )
    settings = parser.parse_args(argv).as_dict()
    del settings["config"]
    return server_config(**settings)


def check_served(config: ServerConfig) -> None:
    """Check the models and the adapter folders before torch and Ray are imported.

    Raises:
        UserError: a folder is missing, or does not contain a model or an adapter.
    """
    for task in config.served.values():
        # If there are adapters, they may record the prompt.
        check_model(BackboneConfig(task.model, prompt=task.prompt), needs_answers=not task.adapters)
        for adapter in task.adapters:
            if not is_mlflow(adapter):
                load_adapter_config(adapter)


def main(argv: Sequence[str] | None = None, prog: str = "python -m serve_app") -> int:
    """Serve until interrupted. Return 0, or 2 after a user error."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("serve_app").setLevel(logging.INFO)
    try:
        config = parse(argv, prog)
        check_extras("serve")
        check_served(config)
        from serve_app.run import deploy, shutdown

        url = deploy(config)
    except UserError as error:
        print(f"error: {without_passwords(str(error))}", file=sys.stderr)
        return 2
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(f"serving on {url}; press Ctrl-C to stop", flush=True)
    stop.wait()
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
