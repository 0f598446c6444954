"""What stays of a cell when its model is gone: a small directory that the tables are made from.

    cells/ROW-seedK/evaluation.json     as an evaluation leaves it, without this machine's paths
    cells/ROW-seedK/items.parquet
    cells/ROW-seedK/train/summary.json, log.jsonl
    cells/ROW-seedK/cell.json           what the cell is, its wall times, command and commit; written last
    search/ROW-lrX/...                  the same of a learning rate that was tried

A cell whose cell.json is there is finished, on whichever machine it was run.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiment import Cell, Experiment
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import EVALUATION_FILE, ITEMS_FILE
from flow_finetune.results import LOG_FILE
from flow_finetune.storage import SUMMARY_FILE, atomic_path, write_json

CELL_FILE = "cell.json"


class Records:
    """The records of one experiment."""

    def __init__(self, experiment: Experiment, root: Path) -> None:
        self.experiment = experiment
        self.path = root / experiment.name
        self._finished: dict[str, dict] = {}

    def directory(self, cell: Cell) -> Path:
        """Where a cell's record is or will be."""
        return self.path / cell.key

    def read(self, cell: Cell) -> dict | None:
        """The `cell.json` of a finished cell.

        Raises:
            InputError: the record is of other settings than the experiment file's.
        """
        if cell.key in self._finished:
            return self._finished[cell.key]
        path = self.directory(cell) / CELL_FILE
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        # While learning rates are still being tried (the grid was made wider, say), nothing is known against its own.
        is_ready = self.is_ready(cell)
        learning_rate = self.learning_rate(cell) if is_ready else record["learning_rate"]
        wanted = self.experiment.identity(cell, learning_rate)
        found = record["identity"]
        # Records of averages did not always say of what.
        known = {*wanted, *found} - ({"averaged_method"} - found.keys())
        different = [key for key in sorted(known) if wanted.get(key) != found.get(key)]
        if different:
            raise InputError(
                f"{path.parent} was made with another {', '.join(different)} than {self.experiment.name} has now; remove "
                "it, or give another --records"
            )
        if is_ready:
            self._finished[cell.key] = record
        return record

    def learning_rate(self, cell: Cell) -> float | None:
        """The learning rate that a cell is trained with; None if it is not trained or the search is not finished."""
        if cell.row is None:
            return None
        if cell.candidate is not None:
            return cell.candidate
        row = (self.experiment.source_of(cell) or cell).row
        owner = self.experiment.row(row.options.learning_rate_of or row.name)
        if not owner.options.learning_rates:
            return owner.method.learning_rate
        losses = self.search_losses(owner)
        if None in losses.values():
            return None
        best = min(losses, key=losses.get)
        if losses[best] == math.inf:
            raise InputError(f"{owner.name} diverged at every learning rate of its grid; add lower ones")
        return best

    def is_ready(self, cell: Cell) -> bool:
        """Whether the search that a cell takes its learning rate from is finished."""
        if cell.row is None or cell.candidate is not None:
            return True
        needed = self.experiment.candidates((self.experiment.source_of(cell) or cell).row)
        return all(self.read(candidate) is not None for candidate in needed)

    def search_losses(self, owner) -> dict[float, float | None]:
        """Validation loss of every candidate of a row, in nats per token or image.

        None where it is not measured, infinite where the training diverged.
        """
        cells = list(self.experiment.candidates(owner))
        records = {cell.candidate: self.read(cell) for cell in cells}
        self._check_validation(owner, [cell for cell in cells if records[cell.candidate] is not None])
        return {rate: record and _validation_loss(record) for rate, record in records.items()}

    def _check_validation(self, owner, done: list[Cell]) -> None:
        """Refuse losses of a grid that were trained or measured on different samples: their lowest means nothing."""
        # What diverged was not evaluated.
        files = [path for cell in done if (path := self.directory(cell) / EVALUATION_FILE).is_file()]
        measured = {json.loads(path.read_text())["tasks"][0]["fingerprint"] for path in files}
        starts = [self.start(cell) for cell in done]
        trained = {kind: {start[kind] for start in starts if kind in start} for kind in ("data", "images")}
        for samples, found in (("validation", measured), *(("training", of) for of in trained.values())):
            if len(found) > 1:
                raise InputError(
                    f"the learning rates of {owner.name} were tried on different {samples} samples; remove the records "
                    f"{owner.name}-lr* in {self.path / 'search'} that are not of this data"
                )

    def start(self, cell: Cell) -> dict[str, str]:
        """Fingerprints of the model and the training data that a cell is made from; none where it has no record."""
        # The pre-trained model's own stand in its evaluation; what a training started from is in its summary.
        path = self.directory(cell) / (EVALUATION_FILE if cell.row is None else SUMMARY_FILE)
        found = json.loads(path.read_text()).get("fingerprints", {}) if path.is_file() else {}
        # The probed head of an image run is this machine's own: another CPU's differs in its last bits.
        return {kind: of for kind, of in found.items() if (self.experiment.task, kind) != ("image", "model")}

    def check_start(self, found: dict[str, str]) -> None:
        """Refuse a training that would start from anything else than the finished cells did."""
        for cell in self.experiment.cells():
            different = [kind for kind, of in self.start(cell).items() if found.get(kind, of) != of]
            if cell.candidate is None and different:
                raise InputError(
                    f"{self.directory(cell)} was made from another {', '.join(different)} than this training would be; "
                    "give the same model and data, or another --records"
                )

    def write(self, cell: Cell, made: Path, record: dict, names: dict[str, str]) -> None:
        """Keep what is small of the directory `made`, the `record` last.

        Args:
            names: text to replace in JSON files: the paths of this machine.
        """
        with atomic_path(self.directory(cell)) as temporary:
            for name in (EVALUATION_FILE, ITEMS_FILE, SUMMARY_FILE, LOG_FILE):
                if (made / name).is_file():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(made / name, temporary / name)
                    if name.endswith(".json"):
                        write_json(temporary / name, _rename(json.loads((made / name).read_text()), names))
            identity = self.experiment.identity(cell, self.learning_rate(cell))
            write_json(temporary / CELL_FILE, {**record, "identity": json.loads(json.dumps(identity))})


def _validation_loss(record: dict) -> float:
    # JSON has no infinity: a training that diverged is recorded with null.
    return math.inf if record["validation_loss"] is None else record["validation_loss"]


def _rename(value: object, names: dict[str, str]) -> object:
    if isinstance(value, dict):
        return {key: _rename(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_rename(item, names) for item in value]
    if isinstance(value, str):
        for before, after in names.items():
            value = value.replace(before, after)
    return value


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file `path` if no other process does; yields whether it is held.

    The lock goes with the process, so a killed one leaves none behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
