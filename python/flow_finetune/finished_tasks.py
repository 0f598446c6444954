"""Tasks that an evaluation has finished, kept until all are: a call that was killed, or failed, does not run them again.

DIR/.finished-tasks.partial/KEY.json    the record, the items and what was generated of one task
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from flow_finetune.progress import say
from flow_finetune.statistics import Items
from flow_finetune.storage import atomic_path, fingerprint
from flow_finetune.tasks import Task

Finished = tuple[dict, dict[str, Items], list[dict]]


class FinishedTasks:
    """Those of one directory, found again by everything that decides their results.

    Args:
        output: the evaluation's directory, for which what is kept in it counts as nothing.
        measured: what is the same for all tasks of the call: the model, the precision, the batches.
    """

    def __init__(self, output: Path, measured: dict) -> None:
        self._directory = output / ".finished-tasks.partial"
        self._measured = measured

    def read(self, task: Task) -> Finished | None:
        """What a call before kept of `task`; None where there is nothing."""
        path = self._path(task)
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        say(f"{task.name}: finished by the call before")
        items = {
            name: Items(m["ids"], np.asarray(m["value"]), np.asarray(m["weight"]), m["higher_is_better"])
            for name, m in kept["items"].items()
        }
        return kept["record"], items, kept["generations"]

    def write(self, task: Task, record: dict, items: dict[str, Items], generations: list[dict]) -> None:
        """Keep the result of `task`."""
        columns = {
            name: {"ids": list(i.ids), "value": np.asarray(i.value, np.float64).tolist(),
                   "weight": np.asarray(i.weight, np.float64).tolist(), "higher_is_better": i.higher_is_better}
            for name, i in items.items()
        }  # fmt: skip
        kept = {"record": record, "items": columns, "generations": generations}
        with atomic_path(self._path(task)) as temporary:
            temporary.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, task: Task) -> Path:
        # The harness's tasks are more than their requests: what is made of the answers is in their configuration.
        harness = (
            {name: part.dump_config() for name, part in task.harness.loaded["tasks"].items()} if task.harness else {}
        )
        decides = [
            self._measured,
            dataclasses.asdict(task.config),
            task.name,
            task.fingerprint(),
            task.settings(),
            harness,
        ]
        return self._directory / f"{fingerprint([json.dumps(decides, sort_keys=True, default=repr).encode()])}.json"
