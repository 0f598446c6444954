"""Tables in Markdown, and how values and differences are written in them."""

from __future__ import annotations

from collections.abc import Sequence

from flow_finetune.results import Cell, Metric, verdict
from flow_finetune.statistics import Difference

NONE = "-"


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first column left-aligned, and an empty one."""

    def line(texts):
        return "| " + " | ".join(t.replace("|", "\\|") for t in texts) + " |"

    return [line(head), "| --- |" + " ---: |" * (len(head) - 1), *(line(row) for row in rows), ""]


def value_text(shown: Cell | None, metric: Metric) -> str:
    """A value and its standard error, with the digits of its metric."""
    if shown is None:
        return NONE
    text = f"{shown.value:.{metric.digits}f}"
    return text if shown.standard_error is None else f"{text} ± {shown.standard_error:.{metric.digits}f}"


def interval_text(difference: Difference, metric: Metric) -> str:
    """A difference and its interval."""
    value, low, high = (f"{v:+.{metric.digits}f}" for v in difference)
    return f"{value} [{low}, {high}]"


def marked_text(difference: Difference | None, metric: Metric) -> str:
    """The same in bold, with "better" or "worse", where the interval excludes 0."""
    if difference is None:
        return NONE
    text = interval_text(difference, metric)
    word = verdict(difference, metric)
    return f"**{text} {word}**" if word else text
