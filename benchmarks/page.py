"""Put the figures of ``benchmarks/results/`` into README.md and docs/results.md.

python -m benchmarks.page
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from revmux.report import comparison_table

ROOT = Path(__file__).resolve().parent.parent
MARKS = re.compile(r"(<!-- quickstart -->\n).*?(<!-- /quickstart -->)", re.DOTALL)


def quickstart_words(result: dict[str, Any]) -> str:
    """The table of a quickstart with what it was measured on."""
    meta, rows = result["meta"], result["rows"]
    data, machine, seconds = meta["data"], meta["machine"], meta["seconds"]
    steps = ", ".join(f"{step.lower()} {value:.0f} s" for step, value in seconds.items())
    return (
        f"{comparison_table(rows)}\n\n"
        f"One seed; accuracy on {data['test']} test inputs after {data['train']} training examples, mean ± spread over 10 "
        f"shuffles of who shares a group; {machine['cores']} cores, torch {meta['versions']['torch']}, "
        f"commit `{(meta['commit'] or 'unknown')[:8]}`. Cost is counted at the mean length; throughput is the model alone, median "
        f"of pairs against SISO.\n\nTime: {steps}; {sum(seconds.values()) / 60:.1f} minutes up to the report.\n"
    )


def main() -> None:
    """Write both pages from the result files."""
    words = quickstart_words(json.loads((ROOT / "benchmarks/results/quickstart.json").read_text()))
    for page in (ROOT / "README.md", ROOT / "docs/results.md"):
        text = page.read_text()
        if not MARKS.search(text):
            raise SystemExit(f"error: {page.name} lacks <!-- quickstart --> and <!-- /quickstart -->; put them back")
        page.write_text(MARKS.sub(lambda match: match[1] + words + match[2], text))


if __name__ == "__main__":
    main()
