"""What the quickstart shows: headings, live bars and small tables on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ray_jobs.training.progress_board import Progress as Work

PLAIN_WIDTH = 120
PLAIN_INTERVAL_S = 15.0
POLL_S = 0.4
Read = Callable[[], Mapping[str, Work]]


class Screen:
    """The output of the quickstart.

    Args:
        file: where to write; by default the standard output. Control codes are used only on a terminal that has them.
        steps: number of steps, for the headings.
        interval: seconds between two lines of progress where there are no live bars.
    """

    def __init__(self, file: TextIO | None = None, steps: int = 0, interval: float = PLAIN_INTERVAL_S) -> None:
        file = file or sys.stdout
        self.console = Console(file=file, highlight=False, emoji=False)
        self.is_live = self.console.is_terminal and not self.console.is_dumb_terminal
        if not self.is_live:
            self.console = Console(
                file=file, highlight=False, emoji=False, color_system=None, force_terminal=False, width=PLAIN_WIDTH
            )
        self.steps, self.interval = steps, interval
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, description: str) -> Iterator[None]:
        """Show the heading of a step, run the body, and show its duration."""
        self.console.print(f"\n[bold cyan]Step {len(self.seconds) + 1} of {self.steps}[/]  [bold]{escape(title)}[/]")
        self.line(description)
        started = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - started, 1)
        self.console.print(f"   [dim]{self.seconds[title]:.0f} s[/]")

    def line(self, text: str) -> None:
        """Show a line, indented."""
        self.console.print(f"   {escape(text)}", soft_wrap=True)

    def text(self, text: str) -> None:
        """Show text without indentation and without wrapping it, so that it can be copied."""
        self.console.print(escape(text), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> None:
        """Show a small table.

        Args:
            columns: headings.
            rows: cells.
            numbers: headings of the columns that are aligned to the right.
        """
        table = Table(box=SIMPLE_HEAD if self.is_live else None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(escape(column), justify="right" if column in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        indented = Padding(table, (0, 0, 0, 3))
        if self.is_live:
            self.console.print(indented)
            return
        with self.console.capture() as capture:
            self.console.print(indented)
        for line in capture.get().splitlines():
            self.text(line.rstrip())

    @contextmanager
    def working(self, read: Read, waiting: str, labels: Mapping[str, str] | None = None) -> Iterator[None]:
        """Show the progress of work while the body runs.

        Args:
            read: returns the progress of each piece of work by its title.
            waiting: what is happening before the first piece of work reports.
            labels: what to show instead of some titles. If given, other titles are not shown.
        """
        ended = threading.Event()
        show = self._show_bars if self.is_live else self._show_lines

        def shown() -> dict[str, Work]:
            work = read()
            return {
                (labels or {}).get(title, title): work[title] for title in work if labels is None or title in labels
            }

        thread = threading.Thread(target=show, args=(shown, waiting, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _show_bars(self, read: Read, waiting: str, ended: threading.Event) -> None:
        columns = (
            TextColumn("  "),
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
            TimeElapsedColumn(),
        )
        bars = Progress(*columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False)
        with bars:
            first = bars.add_task(escape(waiting), total=None, note="")
            tasks: dict[str, int] = {}
            while not ended.wait(POLL_S):
                for title, work in read().items():
                    if title not in tasks:
                        tasks[title] = bars.add_task(escape(title), total=work.total, note="")
                        bars.update(first, visible=False)
                    bars.update(tasks[title], completed=work.done, total=work.total, note=escape(work.note))  # type: ignore[arg-type]

    def _show_lines(self, read: Read, waiting: str, ended: threading.Event) -> None:
        self.line(f"{waiting} ...")
        started = shown_at = time.perf_counter()
        shown: list[str] = []
        while not ended.wait(min(POLL_S, self.interval)):
            now = time.perf_counter()
            if now - shown_at < self.interval:
                continue
            shown_at = now
            running = [
                f"{title} {work.done} of {work.total}" for title, work in read().items() if work.done < work.total
            ]
            if running and running != shown:
                shown = running
                self.line(f"{', '.join(running)} ({now - started:.0f} s)")


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Inside the context, append everything that this process and its workers print to a file.

    Args:
        log: created with its folder if missing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield
