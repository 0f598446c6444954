"""Runs the cells of an experiment that have no record yet; a killed call continues when it is made again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from experiment import Cell, Experiment
from flow_finetune.errors import DivergedError, InputError
from flow_finetune.evaluation_files import EVALUATION_FILE
from flow_finetune.progress import say
from flow_finetune.storage import SUMMARY_FILE
from records import Records, locked


@dataclasses.dataclass
class Runner:
    """Makes cells in `work` and records them.

    Args:
        laboratory: makes and measures models (laboratory.LanguageLaboratory says how).
        work: directory for models; locks in it keep two processes from making the same cell.
        provenance: the command, commit and machine, kept with every record.
        names: paths of this machine and what stands for them in a record.
        keep_models: do not delete a model that no cell needs any more.
    """

    experiment: Experiment
    records: Records
    laboratory: object
    work: Path
    provenance: dict[str, str]
    names: dict[str, str]
    keep_models: bool = False

    def run(self, cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
        """Run `cells` in order; returns those that failed and those left: they wait for another process or a search."""
        failed: list[Cell] = []
        made = True
        # Again until nothing changes: what another process makes meanwhile may be what a cell waits for.
        while made:
            made = False
            for cell in cells:
                if cell in failed:
                    continue
                try:
                    # A record may be of other settings by now: of what was best before the grid was made wider.
                    made |= self.records.read(cell) is None and self._try(cell)
                except InputError as error:
                    say(f"{cell.key} failed: {error}")
                    failed.append(cell)
        self._remove_models()
        return failed, [cell for cell in cells if cell not in failed and self.records.read(cell) is None]

    def _try(self, cell: Cell) -> bool:
        """Make one cell, unless it cannot be made now; returns whether it was made."""
        if not self.records.is_ready(cell):
            return False
        with locked(self.work / "locks" / cell.key.replace("/", "-")) as mine:
            if not mine or self.records.read(cell) is not None:
                return False
            say(f"{self.experiment.name}: {cell.key}")
            return self._make(cell)

    def _make(self, cell: Cell) -> bool:
        directory = self.work / cell.key
        # Of a call that was killed before it wrote the record, or of other tasks: whatever it is, it is made again.
        (directory / EVALUATION_FILE).unlink(missing_ok=True)
        record = {
            "row": cell.row.name if cell.row else None,
            "seed": cell.seed if cell.row else None,
            "learning_rate": self.records.learning_rate(cell),
            **self.provenance,
        }
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        if cell.row is None:
            seconds |= self.laboratory.make_pretrained(directory)
        elif cell.candidate is not None:
            try:
                record["validation_loss"] = self.laboratory.try_out(self._method(cell), cell.seed, directory)
            except DivergedError as error:
                # A finding like any other: this learning rate is not taken, and it is not tried again.
                say(f"{cell.key}: {error}")
                record["validation_loss"] = None
        else:
            if not self._make_model(cell, directory):
                return False
            self.laboratory.evaluate(directory)
        parts = _seconds(directory)
        # Parts that a killed call has made are in these alone; what it took to load is not known.
        whole = max(time.perf_counter() - started, sum(parts.values()))
        record["seconds"] = {**seconds, **parts, "cell": whole}
        self.records.write(cell, directory, record, self.names)
        self._remove_models()
        return True

    def _make_model(self, cell: Cell, directory: Path) -> bool:
        """Train, or average; False if the model to average is being made by another process."""
        source = self.experiment.source_of(cell)
        if source is None:
            self.laboratory.train(self._method(cell), cell.seed, directory)
            return True
        with locked(self.work / "locks" / source.key.replace("/", "-")) as mine:
            if not mine:
                return False
            finetuned = self.work / source.key
            # It was deleted if this row came later; the same training gives the same weights again.
            self.laboratory.train(self._method(source), source.seed, finetuned)
            self.laboratory.average(cell.row.method, finetuned, directory)
        return True

    def _method(self, cell: Cell):
        return dataclasses.replace(cell.row.method, learning_rate=self.records.learning_rate(cell))

    def _remove_models(self) -> None:
        """Delete the models of finished cells that no unfinished cell is made from."""
        if self.keep_models:
            return
        cells = self.experiment.cells()
        needed = {source.key for c in cells if (source := self.experiment.source_of(c)) and not self._is_finished(c)}
        for cell in cells[1:]:
            directory = self.work / cell.key
            if directory.is_dir() and cell.key not in needed and self._is_finished(cell):
                shutil.rmtree(directory, ignore_errors=True)

    def _is_finished(self, cell: Cell) -> bool:
        """Whether a cell has a record; one of other settings is to be made again, and says so when that is tried."""
        try:
            return self.records.read(cell) is not None
        except InputError:
            return False


def _seconds(directory: Path) -> dict[str, float]:
    """Wall time of training and evaluation, as their own files have it."""
    seconds = {}
    if (directory / SUMMARY_FILE).is_file():
        seconds["train"] = json.loads((directory / SUMMARY_FILE).read_text()).get("seconds", 0.0)
    if (directory / EVALUATION_FILE).is_file():
        tasks = json.loads((directory / EVALUATION_FILE).read_text())["tasks"]
        seconds["evaluate"] = sum(task["seconds"] for task in tasks)
    return seconds
