"""Run the tests that are marked long, in two processes as ``make test-all`` does, and write how long each file took.

python -m benchmarks.long_tests [FILES] [--workers 2]

Files whose tests passed at this commit are kept, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import digest, kept_rows
from revmux.utils.files import write_json
from revmux.utils.run_info import describe_run, git_commit

RESULT, KEPT = Path("benchmarks/results/long-tests.json"), Path("runs/long-tests")
MINUTES = 30
"""The limit on two cores."""


class Recorder:
    """A pytest plugin for the process that starts the workers; it makes one row per file.

    Args:
        commit: the commit of the tests.
    """

    def __init__(self, commit: str | None) -> None:
        self.commit = commit
        self.expected: Counter[str] = Counter()
        self.ended: dict[str, set[str]] = defaultdict(set)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Count the tests of each file; every worker collects the same."""
        self.expected = Counter(one.partition("::")[0] for one in ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a report, of which a test has up to three; keep the file's row if all its tests have passed."""
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        if report.failed:
            self.outcomes[file]["failed"] += 1
        elif report.skipped:
            self.outcomes[file]["skipped"] += 1
        if report.when == "teardown":
            self.ended[file].add(report.nodeid)
        if len(self.ended[file]) == self.expected[file] and not self.outcomes[file]["failed"]:
            kept_rows(KEPT, Path(file).stem, self.commit, lambda: self.row(file))

    def row(self, file: str) -> dict[str, Any]:
        """The row of a file."""
        found = self.outcomes[file]
        words = [f"{found[outcome]} {outcome}" for outcome in ("failed", "skipped") if found[outcome]]
        if missing := self.expected[file] - len(self.ended[file]):
            words.append(f"{missing} not ended")
        return {
            "file": file,
            "tests": self.expected[file],
            "seconds": round(self.seconds[file]),
            "result": ", ".join(words) or "passed",
        }


def long_tests_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the table for the page's mark."""
    meta, rows = result["meta"], result["rows"]
    lines = ["| file | tests | seconds | result |", "|---|---|---|---|"]
    lines += [f"| `{row['file']}` | {row['tests']} | {row['seconds']} | {row['result']} |" for row in rows]
    total = sum(row["seconds"] for row in rows)
    minutes = total / 60 / meta["data"]["workers"]
    words = (
        f"{sum(row['tests'] for row in rows)} tests, {total / 60:.0f} minutes in all, {minutes:.0f} minutes for each of "
        f"{meta['data']['workers']} processes (limit: {MINUTES}). {meta['machine']['cores']} cores, "
        f"{meta['date'][:10]}, commit `{(meta['commit'] or 'unknown')[:8]}`."
    )
    return {"long-tests": "\n".join(lines) + f"\n\n{words}\n"}


def main() -> None:
    """Run the tests that are not kept, then write the result file.

    Raises:
        SystemExit: a test failed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=["tests"], help="test files; by default all")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    settings = parser.parse_args()
    commit = git_commit()
    kept = {file.name.rpartition("-")[0] for file in KEPT.glob(f"*-{digest(commit)}.json")}
    recorder, started = Recorder(commit), time.perf_counter()
    flags = ["-m", "long", "-n", str(settings.workers), "--dist", "loadgroup", "--no-loadscope-reorder"]
    flags += [f"--ignore=tests/{name}.py" for name in sorted(kept)]
    status = pytest.main([*settings.files, *flags], plugins=[recorder])
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    names = sorted(kept | {Path(file).stem for file in recorder.ended})
    rows = []
    for name in names:
        file = KEPT / f"{name}-{digest(commit)}.json"
        rows.append(kept_rows(KEPT, name, commit, dict) if file.is_file() else recorder.row(f"tests/{name}.py"))
    meta = describe_run("python -m benchmarks.long_tests", {"workers": settings.workers}, {})
    write_json(RESULT, {"meta": meta, "rows": rows})
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(status))


if __name__ == "__main__":
    main()
