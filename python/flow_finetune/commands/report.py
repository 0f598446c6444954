"""`flow-finetune report`: runs side by side on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.messages import messages
from flow_finetune.progress import say


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of evaluated models, the pre-trained one among them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write report.md and its plots to.")],
    scores: Annotated[Path | None, typer.Option(help="Score file, for the histogram and the extreme samples.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run that others are compared with; the standard one otherwise.")
    ] = None,
) -> None:
    """One Markdown page with plots: what was learned against what was kept.

    **Example**

        flow-finetune report runs/pretrained runs/standard runs/flow --scores runs/scores.parquet -o runs/report
    """
    with messages():
        from flow_finetune.report import write_report

        say(f"report: {write_report(runs, output, scores=scores, baseline=baseline)}")
