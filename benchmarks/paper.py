"""The paper's experiments: run an experiment file's cells, and write its tables.

    python benchmarks/paper.py run benchmarks/paper/language.yaml --output runs/paper --data DIR
    python benchmarks/paper.py report benchmarks/paper/language.yaml

A finished cell leaves a small record and is not run again; a killed call continues when it is made again. Two calls
with the same --output share the work; machines without a shared disk take `--shard 1/2` and `--shard 2/2`, exchange
their records (benchmarks/results/paper/NAME) after the search of the learning rates, and run again.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from experiment import Experiment, read_experiment, select
from flow_finetune.commands.messages import messages
from flow_finetune.errors import InputError
from flow_finetune.progress import say
from paper_report import write_paper_report
from paper_results import read_results
from records import Records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper"
# As in the project's workplace: the data lies beside the checkout, and is not carried by the repository.
DATA = Path("../shared/data")

# The programs whose change would change a cell.
PROGRAMS = ("paper", "experiment", "records", "runner", "laboratory", "image_laboratory")

File = Annotated[Path, typer.Argument(help="Experiment file, such as benchmarks/paper/language.yaml.")]
RecordsOption = Annotated[Path, typer.Option("--records", help="Directory for records, tables and plots.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for models and scores.")],
    data: Annotated[Path, typer.Option(help="Directory that the file's sources are relative to.")] = DATA,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another place of the same model.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; may be given again.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be given again.")] = None,
    shard: Annotated[str | None, typer.Option(help="Only one part of the cells, such as 1/2.")] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep every model, 1 GB and more each.")] = False,
    records: RecordsOption = RESULTS,
) -> None:
    """Run the cells that have no record yet, then write the report."""
    with messages():
        from harness import provenance
        from runner import Runner

        experiment = read_experiment(file)
        cells = select(experiment, only=only or (), seeds=seed or (), part=shard)
        if not data.is_dir():
            raise InputError(f"no such directory: {data}; give the data's with --data")
        kept = Records(experiment, records)
        for cell in cells:
            kept.read(cell)  # a record of other settings is met before any time is spent
        work = output / experiment.name
        source = model or _model_file(experiment.mapping["model"]["source"], output / "models")
        names = {str(data) + "/": "", str(work) + "/": "", source: experiment.mapping["model"]["source"]}
        names = {f"{work}/pretrained/model": experiment.mapping["model"]["source"], **names}
        made = provenance("paper.py", ["run", _shown(file), "--output", "DIR"], PROGRAMS)
        made["machine"] += _gpu()
        laboratory = _laboratory(kept, experiment.located(data, source), work)
        runner = Runner(experiment, kept, laboratory, work, made, names, keep_models)
        failed, left = runner.run(cells)
        if failed:
            say(f"failed, see the messages above: {', '.join(c.key for c in failed)}")
        if left:
            say(f"left to other processes or until their learning rate is known: {', '.join(c.key for c in left)}")
        _report(experiment, kept, records, file)
        if failed:
            raise InputError(f"{len(failed)} cells failed; see the messages above")


@app.command()
def report(file: File, records: RecordsOption = RESULTS) -> None:
    """Write the tables and the plot from the records."""
    with messages():
        experiment = read_experiment(file)
        _report(experiment, Records(experiment, records), records, file)


@app.command()
def cells(file: File, records: RecordsOption = RESULTS) -> None:
    """List every cell, and whether it is finished."""
    with messages():
        experiment = read_experiment(file)
        kept = Records(experiment, records)
        for cell in experiment.cells():
            print(f"{'finished' if kept.read(cell) else 'to do   '}  {cell.key}")


def _report(experiment: Experiment, kept: Records, records: Path, file: Path) -> None:
    command = f"python benchmarks/paper.py report {_shown(file)}"
    say(f"report: {write_paper_report(read_results(experiment, kept), records, command)}")


def _gpu() -> str:
    """Its name, where the cells are made on one."""
    import torch

    return f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def _shown(file: Path) -> str:
    """The file's path from the repository's root, which is where commands are given."""
    file = file.resolve()
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name


def _model_file(name: str, directory: Path) -> str:
    """A model's file inside its package, where the demo knows the name; else the name is a place already."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return str(demo.gguf_file(name, directory)) if name in demo.LEARNING_RATE else name


def _laboratory(kept: Records, setup: object, work: Path):
    experiment = kept.experiment
    if experiment.task == "image":
        from image_laboratory import ImageLaboratory

        return ImageLaboratory(setup, experiment.search, work, check_start=kept.check_start)
    from laboratory import LanguageLaboratory, token_losses_needed

    tokens = token_losses_needed([row.method for row in experiment.rows])
    return LanguageLaboratory(setup, experiment.search, work, tokens=tokens, check_start=kept.check_start)


if __name__ == "__main__":
    app()
