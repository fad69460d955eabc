"""python -m benchmarks.serving.picture --model MODEL --adapters ADAPTER,ADAPTER [--output FILE.png]

The picture of the server's web page in docs/serve.md: the sample texts with their answers, while other requests arrive.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import ArgumentParser

from benchmarks.browser import CHROMIUM, browser
from benchmarks.serving.path import ROOT, Form, serving

PICTURE = Path("docs/images/serve-page.png")
SECONDS = 30
"""Seconds of load before the picture, of which the charts show one point each."""

_LOAD = """
window.load = setInterval(() => {
  const inputs = SAMPLES.flatMap((text) => [[text], [text.toLowerCase()]]);
  const waves = 2 + 2 * Math.sin(performance.now() / 3000);  // the load rises and falls
  for (let wave = 0; wave < waves; wave++) fetch("predict", { method: "POST", body: JSON.stringify({ inputs }) });
}, 250)
"""


def take_picture(flags: Sequence[str], output: Path) -> None:
    """Serve, classify the sample texts on the page under load, and save its picture.

    Args:
        flags: flags of the server.
        output: the PNG file.
    """
    with TemporaryDirectory(prefix="revmux-picture-") as name:
        folder = Path(name)
        with serving(Form("page", ROOT), flags, folder) as (url, _), browser(folder / "profile") as page:
            page.resize(1000, 900)
            page.open(f"{url}/")
            page.run("describe()")
            page.run(_LOAD)
            page.run("document.getElementById('sample').click()")
            page.wait(f"document.getElementById('latency-line').points.length > {SECONDS}")
            page.run("document.querySelector('#ask button[type=submit]').click()")
            page.wait("!document.getElementById('answers').hidden")
            page.run("document.activeElement.blur()")
            output.write_bytes(page.picture())


def main(argv: Sequence[str] | None = None) -> int:
    """Take the picture; return 2 if there is no browser."""
    parser = ArgumentParser(prog="python -m benchmarks.serving.picture", description=str(__doc__))
    parser.add_argument("--model", type=str, required=True, help="the task model to serve")
    parser.add_argument("--adapters", type=str, required=True, help="its adapters, separated by commas")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the file to write")
    chosen = parser.parse_args(argv)
    if CHROMIUM is None:
        print("error: Chromium is not installed; install it, for example: apt install chromium", file=sys.stderr)
        return 2
    take_picture(["--model", chosen.model, "--adapters", chosen.adapters], chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
