"""The command line: score, train, wise-ft, evaluate, report, run."""

from __future__ import annotations

from typing import Annotated

import typer

import flow_kernels
from flow_finetune.commands.evaluate import evaluate
from flow_finetune.commands.report import report
from flow_finetune.commands.run import run
from flow_finetune.commands.score import score
from flow_finetune.commands.train import train
from flow_finetune.commands.wise_ft import wise_ft

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fine-tune a language model so that it keeps what it could do: weight every sample by how well the "
    "pre-trained model knows it (FLOW, arXiv 2502.02797).",
)
# In the order in which --help lists them.
for _command in (score, train, wise_ft, evaluate, report, run):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flow-kernels {flow_kernels.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Options of no command."""


def main() -> None:
    """Entry point of `flow-finetune`."""
    app()


if __name__ == "__main__":
    main()
