"""Run the tests that are marked long, in two processes as ``make test-all`` does, and write how long each file took.

python -m benchmarks.long_tests [FILES] [--workers 2]

Files whose tests have passed at this commit are left out, so that an interrupted run continues. Rows of files that do not run
stay as they were recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run, git_commit

RESULT = Path("benchmarks/results/long-tests.json")
MINUTES = 30
"""The limit on two cores."""


class Recorder:
    """A pytest plugin for the process that starts the workers; it writes a row per file.

    Args:
        commit: the commit of the tests.
        workers: number of processes.
    """

    def __init__(self, commit: str | None, workers: int) -> None:
        self.commit, self.workers = commit, workers
        kept = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["file"]: row for row in kept}
        self.expected: Counter[str] = Counter()
        self.ended: dict[str, set[str]] = defaultdict(set)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)

    @property
    def passed(self) -> list[str]:
        """The files whose tests have passed at this commit."""
        return sorted(
            name
            for name, row in self.rows.items()
            if row["commit"] == self.commit and not re.search("failed|not ended", row["result"])
        )

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Count the tests of each file; every worker collects the same."""
        self.expected = Counter(one.partition("::")[0] for one in ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a report, of which a test has up to three; write the file's row once all its tests have ended."""
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        if report.failed or report.skipped:
            self.outcomes[file][report.outcome] += 1
        if report.when == "teardown":
            self.ended[file].add(report.nodeid)
        if len(self.ended[file]) == self.expected[file]:
            self.write(file)

    def pytest_sessionfinish(self) -> None:
        """Write the rows of files with tests that did not end, because a process was lost."""
        for file, ended in self.ended.items():
            if len(ended) < self.expected[file]:
                self.write(file)

    def write(self, file: str) -> None:
        """Write the row of a file."""
        found, missing = self.outcomes[file], self.expected[file] - len(self.ended[file])
        words = [f"{found[outcome]} {outcome}" for outcome in ("failed", "skipped") if found[outcome]]
        words += [f"{missing} not ended"] if missing else []
        self.rows[file] = {
            "file": file,
            "tests": self.expected[file],
            "seconds": round(self.seconds[file]),
            "result": ", ".join(words) or "passed",
            "commit": self.commit,
        }
        meta = describe_run("python -m benchmarks.long_tests", {"workers": self.workers}, {})
        write_json(RESULT, {"meta": meta, "rows": [self.rows[name] for name in sorted(self.rows)]})


def long_tests_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the table for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    lines = ["| file | tests | seconds | result | commit |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row['file']}` | {row['tests']} | {row['seconds']} | {row['result']} | `{(row['commit'] or 'unknown')[:8]}` |"
        for row in rows
    ]
    total = sum(row["seconds"] for row in rows)
    minutes = total / 60 / meta["data"]["workers"]
    words = (
        f"{sum(row['tests'] for row in rows)} tests, {total / 60:.0f} minutes in all, {minutes:.0f} minutes for each of "
        f"{meta['data']['workers']} processes (limit: {MINUTES}). {meta['machine']['cores']} cores, {meta['date'][:10]}."
    )
    return {"long-tests": "\n".join(lines) + f"\n\n{words}\n"}


def main() -> None:
    """Run the tests that have not passed at this commit.

    Raises:
        SystemExit: a test failed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=["tests"], help="test files; by default all")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    settings = parser.parse_args()
    recorder, started = Recorder(git_commit(), settings.workers), time.perf_counter()
    flags = ["-m", "long", "-n", str(settings.workers), "--dist", "loadgroup", "--no-loadscope-reorder"]
    flags += [f"--ignore={file}" for file in recorder.passed]
    status = pytest.main([*settings.files, *flags], plugins=[recorder])
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(status))


if __name__ == "__main__":
    main()
