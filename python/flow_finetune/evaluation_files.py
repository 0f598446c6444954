"""The files of an evaluated model: `evaluation.json`, every item's value and weight, and what was generated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flow_finetune.errors import InputError
from flow_finetune.progress import say
from flow_finetune.statistics import Items, ratio_and_standard_error
from flow_finetune.storage import SUMMARY_FILE, atomic_path, require_writable, write_json

EVALUATION_FILE, ITEMS_FILE, GENERATIONS_FILE = "evaluation.json", "items.parquet", "generations.jsonl"


def require_unused(output: Path, overwrite: bool = False, source: str | None = None) -> None:
    """Raise `InputError` if `output` holds an evaluation that may not be replaced, or cannot be written to.

    Args:
        source: the model that is evaluated; another trained model's directory is refused, which would seem to be its.
    """
    place = Path(source).expanduser().resolve() if source else None
    holds_model = (output / SUMMARY_FILE).is_file()
    if holds_model and place is not None and output.resolve() not in (place, place.parent):
        raise InputError(f"{output} holds another model than {source}; choose another directory for its evaluation")
    if (output / EVALUATION_FILE).exists() and not overwrite:
        raise InputError(f"{output} already holds an evaluation; choose another directory or pass --overwrite")
    require_writable(output)


def forget_other_evaluation(directory: Path, wanted: dict[str, str], roles: dict[str, str] | None = None) -> None:
    """Remove an evaluation of tasks with other fingerprints than `wanted`; the model stays, and is evaluated again.

    Args:
        roles: of tasks whose role decides what is measured: of images, with which head. No fingerprint has it in it.
    """
    path = directory / EVALUATION_FILE
    if not path.is_file():
        return
    found = {task["name"]: task for task in json.loads(path.read_text())["tasks"]}
    for entry, of, what in (("fingerprint", wanted, "on other items of"), ("role", roles or {}, "in another role of")):
        changed = [name for name in of if found.get(name, {}).get(entry) != of[name]]
        if changed:
            say(f"{directory.name} was evaluated {what} {', '.join(changed)}; evaluating it again")
            path.unlink()
            return


def told_apart(names: Sequence[str], tasks: Sequence) -> list[str]:
    """`names` of `tasks`; of those that have none of their own, equal ones stand behind the name of the source's folder."""
    return [
        f"{_folder_name(task.source)}-{name}" if names.count(name) > 1 and not task.name else name
        for task, name in zip(tasks, names, strict=True)
    ]


def _folder_name(source: str) -> str:
    path = Path(source).expanduser()
    # Of a path such as "test" the folder is that of the call; a hub id has its owner there.
    return (Path(os.path.abspath(path)) if path.exists() else path).parent.name


def summary_of(model: str) -> dict | None:
    """What training said of a model, which its evaluation keeps, so that a report knows that it was trained, and how.

    Args:
        model: a directory that training saved to (of images, its `model/`); anything else has no summary.
    """
    path = Path(model).expanduser()
    # A hub id is no path, even where a directory of its first part is here: the parent of "gpt2" would be this one.
    parents = [path.parent] if path.is_file() or (path.is_dir() and path.name == "model") else []
    found = [d / SUMMARY_FILE for d in (path, *parents) if (d / SUMMARY_FILE).is_file()]
    return json.loads(found[0].read_text()) if found else None


def read_items(directory: Path) -> dict[tuple[str, str], Items]:
    """The items of every (task, metric) of an evaluated directory."""
    path = Path(directory) / ITEMS_FILE
    if not path.is_file():
        raise InputError(f"{directory} has no {ITEMS_FILE}; evaluate it first")
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    keys = {}
    for row, key in enumerate(zip(columns["task"], columns["metric"], strict=True)):
        keys.setdefault(key, []).append(row)
    return {
        key: Items(columns["item"][rows].tolist(), columns["value"][rows], columns["weight"][rows])
        for key, rows in keys.items()
    }


def metric_record(items: Items) -> dict:
    """A metric as `evaluation.json` holds it."""
    value, standard_error = ratio_and_standard_error(items.value, items.weight)
    # JSON has no NaN; one item has no standard error.
    return {
        "value": value,
        "standard_error": None if math.isnan(standard_error) else standard_error,
        "num_items": len(items.ids),
        **({} if items.higher_is_better is None else {"higher_is_better": items.higher_is_better}),
    }


def exponential(metric: dict) -> dict:
    """A metric's exponential, its standard error to first order."""
    value = math.exp(min(metric["value"], 700.0))
    error = metric["standard_error"]
    return {**metric, "value": value, "standard_error": None if error is None else value * error}


def write_evaluation(
    output: Path,
    source: str,
    fingerprints: dict[str, str],
    records: list[dict],
    columns: list[tuple[str, str, Items]],
    generations: Sequence[dict] = (),
    summary: dict | None = None,
) -> dict:
    """Write everything, the file that says it is complete last, and return what that holds.

    Args:
        output: directory.
        source: where the model came from.
        fingerprints: of the model, and of what turns its input into tensors.
        records: one a task, with its `metrics`.
        columns: task, metric and items of every metric.
        generations: what was generated, one a line of `generations.jsonl`.
        summary: of the training that made the model, where it was trained and is evaluated into another directory.
    """
    evaluation = {"model": source, "fingerprints": fingerprints, "tasks": records}
    if summary is not None:
        evaluation["summary"] = summary
    (output / EVALUATION_FILE).unlink(missing_ok=True)
    (output / GENERATIONS_FILE).unlink(missing_ok=True)
    if generations:
        with atomic_path(output / GENERATIONS_FILE) as temporary:
            lines = "".join(json.dumps(g, ensure_ascii=False) + "\n" for g in generations)
            temporary.write_text(lines, encoding="utf-8")
    table = pa.table(
        {
            "task": pa.array([task for task, _, items in columns for _ in items.ids], pa.string()),
            "metric": pa.array([metric for _, metric, items in columns for _ in items.ids], pa.string()),
            "item": pa.array([id for _, _, items in columns for id in items.ids], pa.string()),
            "value": np.concatenate([items.value for *_, items in columns]).astype(np.float64),
            "weight": np.concatenate([items.weight for *_, items in columns]).astype(np.float64),
        }
    )
    with atomic_path(output / ITEMS_FILE) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    write_json(output / EVALUATION_FILE, evaluation)
    return evaluation
