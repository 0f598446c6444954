"""Progress bars with tokens per second and time left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True)


def print_table(table: Table) -> None:
    """Print a table to stdout, at its full width where that is not a terminal."""
    output = Console()
    (output if output.is_terminal else Console(width=200)).print(table)


def say(message: str) -> None:
    """Print one line of information to stderr, unbroken whatever the width of the terminal, and once per launch."""
    if os.environ.get("RANK", "0") == "0":
        console.print(message, markup=False, highlight=False, soft_wrap=True)


class Tracker:
    """Counts what was done; `advance` after every piece of work."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task
        self._start = time.perf_counter()
        self.tokens = 0

    def advance(self, steps: int = 1, tokens: int = 0, note: str = "") -> None:
        self.tokens += tokens
        rate = f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens else ""
        self._progress.update(self._task, advance=steps, rate=rate, note=note)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.perf_counter() - self._start, 1e-9)


@contextmanager
def track(description: str, total: int, *, visible: bool = True) -> Iterator[Tracker]:
    """A bar over `total` steps: share done, tokens/s, time left, and a note."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not visible) as progress:
        yield Tracker(progress, progress.add_task(description, total=total, rate="", note=""))
