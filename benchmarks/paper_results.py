"""The finished cells of an experiment, as its tables need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from experiment import PRETRAINED, Cell, Experiment, Row
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import exponential, metric_record
from flow_finetune.results import Run, load_runs
from flow_finetune.statistics import Items
from records import Records


@dataclasses.dataclass(frozen=True)
class Results:
    """The finished cells of an experiment."""

    experiment: Experiment
    records: dict[str, dict]  # cell.json by cell key
    runs: dict[str, Run]  # by cell key; a run is named after its row
    searches: dict[str, dict[float, float | None]]  # validation loss by learning rate, by row
    search_seconds: tuple[float, ...]  # wall time of each learning rate that was tried

    @property
    def baseline(self) -> Row:
        """The row that others are compared with."""
        return self.experiment.row(self.experiment.baseline)

    def run(self, row: Row, seed: int) -> Run | None:
        """The run of a row with a seed."""
        return self.runs.get(Cell(row, seed).key)

    def seeds_done(self, row: Row) -> list[int]:
        """The finished seeds of a row."""
        return [seed for seed in row.options.seeds if self.run(row, seed) is not None]

    def common_seeds(self, row: Row) -> list[int]:
        """The finished seeds of a row that the baseline has as well."""
        return [seed for seed in self.seeds_done(row) if self.run(self.baseline, seed) is not None]

    def shown(self) -> list[tuple[Run, Row | None, int | None]]:
        """The pre-trained model and one run of every row, in the order of the file, with its seed.

        A row's seed is its first finished one that the baseline has as well, else its first finished one. Where that is
        not the first of the file, the run's name says which it is.
        """
        found = [(self.runs[Cell(None).key], None, None)]
        for row in self.experiment.rows:
            for seed in (self.common_seeds(row) or self.seeds_done(row))[:1]:
                name = row.name if seed == row.options.seeds[0] else f"{row.name} (seed {seed})"
                found.append((dataclasses.replace(self.run(row, seed), name=name), row, seed))
        return found

    def shown_runs(self) -> list[Run]:
        """The runs of `shown`."""
        return [run for run, _, _ in self.shown()]


def read_results(experiment: Experiment, records: Records) -> Results:
    """Read every finished cell.

    Raises:
        InputError: there is none of the pre-trained model, or records that do not belong together.
    """
    cells = [c for c in experiment.cells() if c.candidate is None]
    found = {c.key: record for c in cells if (record := records.read(c)) is not None}
    if Cell(None).key not in found:
        raise InputError(f"{records.path} has no record of the pre-trained model; run the experiment first")
    done = [c for c in cells if c.key in found]
    runs = load_runs([records.directory(c) for c in done])
    _check_same_start(records, done)
    named = [
        dataclasses.replace(run, name=c.row.name if c.row else PRETRAINED) for c, run in zip(done, runs, strict=True)
    ]
    searches = {row.name: records.search_losses(row) for row in experiment.rows if row.options.learning_rates}
    tried = (records.read(c) for c in experiment.cells() if c.candidate is not None)
    seconds = tuple(record["seconds"]["cell"] for record in tried if record is not None)
    return Results(experiment, found, dict(zip((c.key for c in done), named, strict=True)), searches, seconds)


def _check_same_start(records: Records, done: Sequence[Cell]) -> None:
    """Refuse cells that were not made from one model and one set of training samples."""
    cells: dict[str, dict[str, list[str]]] = {}  # their names by fingerprint, by what it is of
    for c in done:
        for kind, fingerprint in records.start(c).items():
            cells.setdefault(kind, {}).setdefault(fingerprint, []).append(short_key(c.key))
    for kind, groups in cells.items():
        if len(groups) > 1:
            listed = " against ".join(", ".join(names) for names in groups.values())
            raise InputError(f"the records in {records.path} do not belong together, their {kind} differs: {listed}")


def seed_mean(runs: Sequence[Run]) -> Run:
    """One run whose items are the means over runs of the same items: a metric's items keep their weights."""
    items = {}
    for key in runs[0].items:
        first = runs[0].items[key]
        rows = [dict(zip(run.items[key].ids, run.items[key].value, strict=True)) for run in runs]
        items[key] = Items(first.ids, np.mean([[row[i] for i in first.ids] for row in rows], axis=0), first.weight)
    tasks = []
    for task in runs[0].evaluation["tasks"]:
        metrics = {metric: metric_record(found) for (name, metric), found in items.items() if name == task["name"]}
        if "perplexity" in task["metrics"]:
            metrics["perplexity"] = exponential(metrics["nats_per_token"])
        tasks.append({**task, "metrics": metrics})
    return dataclasses.replace(runs[0], evaluation={**runs[0].evaluation, "tasks": tasks}, items=items)


def short_key(key: str) -> str:
    """A cell's key without the folder."""
    return key.partition("/")[2]
