"""An experiment file: what is compared, and the cells that its table is made of.

A cell is one model that is trained (or averaged) and evaluated: a row, which is a method, and a seed. Where a row's
learning rate is chosen, each candidate is a cell of the search: trained on fewer samples, measured by its loss on
training rows that no cell is trained on.

    task: language                 # or image
    model, data, train, tasks ...  # as in a file of flow-finetune run; sources are relative to --data
    search: {num_samples: 128, epochs: 1, validation_first: 500, validation_samples: 128}
    baseline: standard             # the row that others are compared with
    rows:                          # each a method (flow_finetune.config.MethodConfig), and
      - name: standard
        weights: none
        learning_rates: [1.0e-5, 3.0e-5]   # a search of its own, or learning_rate, or
      - name: l2
        weights: none
        penalty: l2
        learning_rate_of: standard         # the choice of another row
        seeds: [0, 1, 2]                   # 0 when not given
        compare_with: standard             # besides the baseline, of a combination the method alone
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flow_finetune.config import (
    DataConfig,
    MethodConfig,
    RunConfig,
    TaskConfig,
    choose,
    from_mapping,
    non_defaults,
    read_yaml,
)
from flow_finetune.errors import InputError
from flow_finetune.methods import check_method, check_name

PRETRAINED = "pretrained"
_SOURCES = ("source", "test_source", "shots_source", "include_path")
_NAME = r"[A-Za-z0-9._+-]+"


@dataclass(frozen=True)
class Search:
    """How learning rates are chosen: on a part of the training file, rows counted from 0."""

    num_samples: int  # the first so many rows are trained on
    validation_first: int  # the loss on these rows decides
    validation_samples: int
    epochs: int = 1


@dataclass(frozen=True)
class ImageSearch:
    """How learning rates are chosen for images: on a random share of the training images."""

    holdout: float = 0.1  # this share is not trained on, and the loss on it decides
    epochs: int = 1


@dataclass(frozen=True)
class RowOptions:
    """What an experiment file says of a row beside its method."""

    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = ()
    learning_rate_of: str | None = None
    compare_with: str | None = None  # a row it is compared with besides the baseline


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    method: MethodConfig
    options: RowOptions

    @property
    def name(self) -> str:
        return self.method.name


@dataclass(frozen=True)
class Cell:
    """One model to make and measure; `row` is None for the pre-trained one."""

    row: Row | None
    seed: int = 0
    candidate: float | None = None  # the learning rate of a cell of the search

    @property
    def key(self) -> str:
        """Its directory, relative to those of the experiment."""
        if self.row is None:
            return f"cells/{PRETRAINED}"
        if self.candidate is not None:
            return f"search/{self.row.name}-lr{self.candidate:g}"
        return f"cells/{self.row.name}-seed{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A whole file."""

    name: str  # the file's stem
    task: str  # "language" or "image"
    setup: object  # RunConfig, or vision's ImageRunConfig; without methods, sources as the file has them
    mapping: dict  # what setup was read from
    rows: tuple[Row, ...]
    search: Search | ImageSearch | None
    baseline: str

    @functools.cached_property
    def _stated(self) -> dict:
        return non_defaults(self.setup)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def located(self, data: Path, model: str) -> object:
        """`setup` with its sources below the directory `data`, and the model at `model`."""
        mapping = _locate(self.mapping, data)
        mapping["model"] = {**mapping["model"], "source": model}
        return from_mapping(_setup_class(self.task), mapping, self.name)

    def candidates(self, row: Row) -> list[Cell]:
        """The cells of the search that decide this row's learning rate; none if it is stated."""
        owner = self.row(row.options.learning_rate_of) if row.options.learning_rate_of else row
        return [Cell(owner, owner.options.seeds[0], rate) for rate in owner.options.learning_rates]

    def cells(self) -> list[Cell]:
        """Every cell, each after those it needs: the pre-trained model, the search, trained rows, averaged rows."""
        search = [cell for row in self.rows if row.options.learning_rates for cell in self.candidates(row)]
        final = [Cell(row, seed) for row in self.rows for seed in row.options.seeds]
        return [Cell(None), *search, *sorted(final, key=lambda cell: cell.row.method.of is not None)]

    def untuned(self, row: Row) -> bool:
        """Whether a row has no learning rate: an average, or the probed model of an image run as it is."""
        return row.method.of is not None or (self.task == "image" and row.method.train == "head")

    def source_of(self, cell: Cell) -> Cell | None:
        """The cell whose trained model `cell` averages with the pre-trained one."""
        of = cell.row.method.of if cell.row is not None else None
        return Cell(self.row(of), cell.seed) if of is not None else None

    def identity(self, cell: Cell, learning_rate: float | None) -> dict:
        """What a record must agree in to be this cell's."""
        setup = dict(self._stated)
        if cell.row is None:
            return setup
        searched = {"search": non_defaults(self.search)} if cell.candidate is not None else {}
        if searched:
            setup.pop("tasks", None)
        # An average is of that row's model: another definition of the row makes another model.
        source = self.source_of(cell)
        averaged = {"averaged_method": self._identified(source.row, learning_rate)} if source is not None else {}
        method = self._identified(cell.row, learning_rate)
        return {**setup, **searched, **averaged, "method": method, "seed": cell.seed}

    @staticmethod
    def _identified(row: Row, learning_rate: float | None) -> dict:
        return non_defaults(dataclasses.replace(row.method, learning_rate=learning_rate))


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        InputError: a key, row or reference that makes no sense.
    """
    mapping = dict(read_yaml(path))
    task = choose(f"{path}: task", mapping.pop("task", "language"), ("language", "image"))
    rows = mapping.pop("rows", None)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} needs rows: a list of methods")
    search = mapping.pop("search", None)
    baseline = mapping.pop("baseline", "standard")
    experiment = Experiment(
        path.stem, task, from_mapping(_setup_class(task), mapping, str(path)), mapping,
        tuple(_rows(rows, str(path))), from_mapping(_search_class(task), search, f"{path}: search") if search else None, baseline,
    )  # fmt: skip
    _check(experiment, str(path))
    return experiment


def _setup_class(task: str) -> type:
    if task == "language":
        return RunConfig
    from flow_finetune.vision.config import ImageRunConfig

    return ImageRunConfig


def _search_class(task: str) -> type:
    return ImageSearch if task == "image" else Search


def _rows(rows: list, where: str) -> Iterator[Row]:
    options = {field.name for field in dataclasses.fields(RowOptions)}
    for number, entry in enumerate(rows):
        place = f"{where}: rows[{number}]"
        if not isinstance(entry, dict):
            raise InputError(f"{place} must be a mapping, got {type(entry).__name__}")
        if entry.get("name") == PRETRAINED:
            if len(entry) > 1:
                raise InputError(f"{place}: {PRETRAINED} is the model itself and takes no options")
            continue
        method = from_mapping(MethodConfig, {k: v for k, v in entry.items() if k not in options}, place)
        chosen = from_mapping(RowOptions, {k: v for k, v in entry.items() if k in options}, place)
        yield Row(method, chosen)


def _check(experiment: Experiment, where: str) -> None:
    if experiment.search is not None:
        _check_search(experiment, f"{where}: search")
    names = [row.name for row in experiment.rows]
    if experiment.baseline not in names:
        raise InputError(f"{where}: the baseline {experiment.baseline!r} is none of the rows {', '.join(names)}")
    for row in experiment.rows:
        method, options, place = row.method, row.options, f"{where}: row {row.name}"
        if not re.fullmatch(_NAME, row.name) or names.count(row.name) > 1:
            raise InputError(f"{place}: a row's name must be a plain directory name that no other row has")
        if not options.seeds or len(set(options.seeds)) < len(options.seeds):
            raise InputError(f"{place} needs seeds that differ, got {list(options.seeds)}")
        if len(set(options.learning_rates)) < len(options.learning_rates):
            raise InputError(f"{place} has a learning rate twice: {list(options.learning_rates)}")
        check_method(method)
        check_name(method)
        if experiment.task == "image":
            _check_image_method(method)
        if method.of is not None:
            _check_averaged(experiment, row, place)
        if options.compare_with is not None and options.compare_with not in set(names) - {row.name}:
            raise InputError(f"{place}: compare_with names {options.compare_with!r}, which is no other row")
        ways = [method.learning_rate is not None, bool(options.learning_rates), options.learning_rate_of is not None]
        if experiment.untuned(row):
            if any(ways):
                raise InputError(f"{place} is not trained and takes no learning rate")
            continue
        if sum(ways) != 1:
            raise InputError(f"{place} needs one of learning_rate, learning_rates and learning_rate_of")
        if options.learning_rate_of is not None:
            owner = next((r for r in experiment.rows if r.name == options.learning_rate_of), None)
            if owner is None or not (owner.options.learning_rates or owner.method.learning_rate):
                raise InputError(f"{place}: {options.learning_rate_of!r} is no row with a learning rate of its own")
        if options.learning_rates and experiment.search is None:
            raise InputError(f"{place} has learning_rates to choose from, but the file says no search")


def _check_search(experiment: Experiment, place: str) -> None:
    """Refuse a search that would choose learning rates on what is trained on, or on what is tested on."""
    data, search = experiment.setup.data, experiment.search
    if experiment.task == "image":
        if data.part != "all":
            raise InputError(
                f"{place} takes a share of all training images, of which data has only the part {data.part!r}; leave "
                "part out (and give the test images as files of their own), or state the learning rates"
            )
    elif data.limit is None or search.validation_first < max(data.limit, search.num_samples):
        raise InputError(
            f"{place}: the validation rows from {search.validation_first} on are trained on; give data a limit, and let "
            "them begin behind it and behind num_samples"
        )
    else:
        validation = (search.validation_first, search.validation_first + search.validation_samples)
        for task in experiment.setup.tasks:
            if _has_rows(task, data, *validation):
                raise InputError(
                    f"{place}: the task {task.name or task.source} is of rows {validation[0]} to {validation[1] - 1} of "
                    f"{data.source} too, which learning rates are chosen on; give it others, as in split "
                    f"'{data.split}[{validation[1]}:]'"
                )


def _has_rows(task: TaskConfig, data: DataConfig, first: int, end: int) -> bool:
    """Whether a task is of any of the rows from `first` to before `end` of the training data, as far as its split says."""
    slice_of = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", task.split.replace(" ", ""))
    if task.kind == "lm_eval" or slice_of is None:
        return False
    name, start, stop = slice_of[1], int(slice_of[2] or 0), int(slice_of[3] or sys.maxsize)
    if (task.source, task.subset, name) != (data.source, data.subset, data.split):
        return False
    stop = stop if task.limit is None else min(stop, start + task.limit)
    return max(start, first) < min(stop, end)


def _check_image_method(method: MethodConfig) -> None:
    from flow_finetune.vision.train import check_image_method

    check_image_method(method)


def _check_averaged(experiment: Experiment, row: Row, place: str) -> None:
    of = next((r for r in experiment.rows if r.name == row.method.of), None)
    if of is None or of.method.of is not None:
        raise InputError(f"{place} averages {row.method.of!r}, which is no trained row")
    missing = [seed for seed in row.options.seeds if seed not in of.options.seeds]
    if missing:
        raise InputError(f"{place} has seed {missing[0]}, which {of.name} lacks")


def _locate(value: object, data: Path) -> object:
    if isinstance(value, dict):
        # The source of a task of lm-evaluation-harness is its name.
        places = [key for key in _SOURCES if not (key == "source" and value.get("kind") == "lm_eval")]
        return {
            key: str(data / item) if key in places and isinstance(item, str) else _locate(item, data)
            for key, item in value.items()
        }
    return [_locate(item, data) for item in value] if isinstance(value, list) else value


def shard(experiment: Experiment, part: str) -> set[str]:
    """Keys of the cells of one part such as "1/2": disjoint, complete, an averaged row with the row it averages.

    The pre-trained model is in every part: all that it costs is an evaluation, and its scores are needed everywhere.
    """
    matched = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = map(int, matched.groups()) if matched else (0, 0)
    if not 1 <= index <= count:
        raise InputError(f"--shard takes PART/PARTS such as 1/2, got {part!r}")
    cells = experiment.cells()
    chosen = {cells[0].key}
    # The search and the rows are dealt out one after the other, so that every part has its share of both.
    for kind in ([c for c in cells[1:] if c.candidate is not None], [c for c in cells[1:] if c.candidate is None]):
        leaders = [c for c in kind if experiment.source_of(c) is None]
        part_of = {c.key: number % count for number, c in enumerate(leaders)}
        chosen |= {c.key for c in kind if part_of[(experiment.source_of(c) or c).key] == index - 1}
    return chosen


def select(
    experiment: Experiment, *, only: Sequence[str] = (), seeds: Sequence[int] = (), part: str | None = None
) -> list[Cell]:
    """The cells to run: of these rows and seeds, with the searches that they need, in this part."""
    unknown = [name for name in only if name != PRETRAINED and name not in [row.name for row in experiment.rows]]
    if unknown:
        names = [PRETRAINED, *(row.name for row in experiment.rows)]
        raise InputError(f"{experiment.name} has no row {unknown[0]!r}; it has {', '.join(names)}")
    keys = {
        cell.key
        for cell in experiment.cells()
        if cell.candidate is None
        and (not only or (cell.row.name if cell.row else PRETRAINED) in only)
        and (not seeds or cell.row is None or cell.seed in seeds)
    }
    if not keys:
        raise InputError(f"{experiment.name} has no row with that seed")
    # The hardest items and the report are the pre-trained model's; its scores are needed in any case.
    keys.add(Cell(None).key)
    for cell in experiment.cells():
        if cell.key in keys and cell.row is not None:
            source = experiment.source_of(cell)
            trained = (source or cell).row
            keys |= {c.key for c in experiment.candidates(trained)} | ({source.key} if source else set())
    if part is not None:
        keys &= shard(experiment, part)
    return [cell for cell in experiment.cells() if cell.key in keys]
