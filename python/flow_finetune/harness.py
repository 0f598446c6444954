"""Any task of EleutherAI's lm-evaluation-harness by name, or one of your own YAML files. Needs the `eval` extra.

The harness makes the requests and judges the answers (https://github.com/EleutherAI/lm-evaluation-harness); its
per-item values become items here, so that two models are compared on them in pairs as on any other task.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import math
import numbers
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_finetune.config import TaskConfig
from flow_finetune.errors import InputError
from flow_finetune.progress import say
from flow_finetune.statistics import Items

# The harness's own, so that its randomly drawn shots are the same here (its --seed).
_SHOTS_SEED = 1234
_ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
# Metrics whose per-item values are log-likelihoods, alone or with a count, and what `Σ -value / Σ count` is called here.
_LIKELIHOODS = {"perplexity": "nats", "word_perplexity": "nats_per_word", "byte_perplexity": "nats_per_byte"}


@dataclass
class HarnessTasks:
    """The tasks that one name stands for (several, where it is a group or a tag), their requests made."""

    loaded: dict  # of the harness's TaskManager
    num_items: int
    requests: list[bytes]  # what is asked and what is right, for the fingerprint
    num_truncated: int = 0  # known once they are run


def load_harness(config: TaskConfig) -> HarnessTasks:
    """Find the tasks, read their data and make their requests.

    Raises:
        InputError: the harness is not installed, has no task of that name, or cannot read its data.
    """
    wanted = config.source or config.name
    if not wanted:
        raise InputError("an lm_eval task lacks its name")
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise InputError(f"include_path of {wanted!r} is not a directory: {config.include_path}")
    manager = task_manager(config.include_path)
    if wanted not in manager.all_tasks:
        close = difflib.get_close_matches(wanted, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "give include_path for YAML tasks of your own"
        raise InputError(f"lm-evaluation-harness has no task {wanted!r}; {hint}")
    try:
        with _code_allowed(config):
            loaded = manager.load([wanted])
            _build(loaded, config)
    except InputError:
        raise
    except Exception as error:  # whatever a task's own code or the hub raises
        # The metric asks for permission as soon as its task is read.
        if _ALLOW_CODE in str(error):
            raise _runs_code(wanted) from error
        detail = str(error).strip().splitlines()
        raise InputError(
            f"lm_eval task {wanted!r} could not be made ready: {detail[0] if detail else type(error).__name__} (its data "
            "must be on this machine or its hub within reach)"
        ) from error
    instances = [instance for task in loaded["tasks"].values() for instance in task.instances]
    _check_generation(wanted, instances, config.max_length)
    requests = [json.dumps([i.doc_id, i.args, i.doc], default=str, sort_keys=True).encode() for i in instances]
    return HarnessTasks(loaded, len({(i.task_name, i.doc_id) for i in instances}), requests)


def _check_generation(name: str, instances: list, max_length: int) -> None:
    """Raise `InputError` for answers that cannot be made, before any task is run."""
    asked = [i.args[1] for i in instances if i.request_type == "generate_until"]
    if not asked:
        return
    from flow_finetune.harness_model import generation_options

    for options in dict.fromkeys(json.dumps(options, sort_keys=True) for options in asked):
        generation_options(json.loads(options), name, max_length)


@functools.lru_cache(maxsize=4)
def task_manager(include_path: str | None):
    """The harness's index of all tasks; kept, because it reads thousands of files.

    Raises:
        InputError: the harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm_eval tasks need lm-evaluation-harness ({error}): pip install lm-eval") from error
    # It warns of every default that a task file relies on.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path)


def _build(loaded: dict, config: TaskConfig) -> None:
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not config.run_model_code:
            raise _runs_code(name)
        fixed = task.get_config("num_fewshot")
        if config.num_shots and fixed == 0:
            # As the harness does: its prompt has its examples in it, or must have none.
            say(f"{name} is without shots by its definition; num_shots={config.num_shots} is left away there")
        elif config.num_shots is not None:
            task.set_config(key="num_fewshot", value=config.num_shots)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        # Also when requests are made again: its generator goes on from call to call.
        task.set_fewshot_seed(seed=_SHOTS_SEED)
        task.build_all_requests(limit=config.limit, rank=0, world_size=1)


@contextlib.contextmanager
def _code_allowed(config: TaskConfig) -> Iterator[None]:
    """What the metrics that run code ask for, set for this task alone."""
    before = os.environ.get(_ALLOW_CODE)
    if config.run_model_code:
        os.environ[_ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_ALLOW_CODE, None)
        else:
            os.environ[_ALLOW_CODE] = before


def _runs_code(name: str) -> InputError:
    return InputError(
        f"lm_eval task {name!r} runs code that the model writes, with all rights of this process; allow it with "
        "run_model_code: true (--run-model-code), best in a container"
    )


def run_harness(lm, tokenizer, task, batch_tokens, precision, generations) -> dict[str, Items]:
    """Items of every metric of a prepared task that is a ratio over items."""
    from lm_eval.evaluator import evaluate

    from flow_finetune.harness_model import HarnessModel

    model = HarnessModel(lm, tokenizer, task.name, task.config.max_length, batch_tokens, precision)
    for part in task.harness.loaded["tasks"].values():
        part.set_fewshot_seed(seed=_SHOTS_SEED)
    with _code_allowed(task.config):
        results = evaluate(
            model, task.harness.loaded, limit=task.config.limit, bootstrap_iters=0, log_samples=True,
            confirm_run_unsafe_code=task.config.run_model_code,
        )  # fmt: skip
    task.harness.num_truncated = model.num_truncated
    if model.num_truncated:
        say(
            f"{task.name}: {model.num_truncated:,} texts lost their beginning, the first shots and any BOS, to max_length="
            f"{task.config.max_length}; raise it if the model can take more"
        )
    _say_of_groups(task)
    columns, dropped, higher = defaultdict(list), set(), {}
    for part, samples in results["samples"].items():
        directions = task.harness.loaded["tasks"][part].higher_is_better()
        aggregations = task.harness.loaded["tasks"][part].aggregation()
        for sample in sorted(samples, key=lambda s: s["doc_id"]):
            id = str(sample["doc_id"]) if len(results["samples"]) == 1 else f"{part}/{sample['doc_id']}"
            for metric in sample["metrics"]:
                name, value, weight = _item(metric, sample["filter"], sample[metric])
                function = aggregations.get(metric)
                aggregation = "mean" if function is None else getattr(function, "__name__", "")
                if value is not None and (weight == 0.0 or (math.isnan(value) and aggregation == "nanmean")):
                    continue  # an empty text, or an item without a value
                if value is None or math.isnan(value) or not _is_ratio(metric, aggregation):
                    dropped.add(metric)
                else:
                    columns[name].append((id, value, weight))
                    higher.setdefault(name, metric not in _LIKELIHOODS and bool(directions.get(metric, True)))
    # One item without a value leaves the whole metric out, as its mean would be without a value.
    columns = {name: rows for name, rows in columns.items() if name.partition(",")[0] not in map(_name_of, dropped)}
    if dropped:
        say(
            f"{task.name}: {', '.join(sorted(dropped))} left out, which {'is' if len(dropped) == 1 else 'are'} no mean over items"
        )
    if not columns:
        raise InputError(f"lm_eval task {task.name!r} has no metric that is a mean over items")
    return {name: _items(rows, higher[name]) for name, rows in columns.items()}


def _name_of(metric: str) -> str:
    return _LIKELIHOODS.get(metric, metric)


def _is_ratio(metric: str, aggregation: str) -> bool:
    """Whether the harness makes the metric of its items as it is made here, by the name of its function."""
    # Such as item response theory's score, whose items look like accuracies.
    expected = ("perplexity", "weighted_perplexity") if metric in _LIKELIHOODS else ("mean", "nanmean")
    return aggregation in expected


def _say_of_groups(task) -> None:
    """That a group's value is over all its items, where the harness takes the mean over its tasks."""
    for group in task.harness.loaded["groups"].values():
        unequal = len({len({i.doc_id for i in part.instances}) for part in group.get_all_tasks()}) > 1
        if unequal and any(not config.weight_by_size for config in getattr(group, "aggregate_metric_list", None) or ()):
            say(
                f"{task.name}: the harness takes the mean over the tasks of {group.name}, which are of different sizes; the "
                "values here are over all items together"
            )


def _item(metric: str, filter: str, found: object) -> tuple[str, float | None, float]:
    """Name, value and weight of one item's metric; no value where it is not one of a ratio over items."""
    name = _name_of(metric)
    name = name if filter == "none" else f"{name},{filter}"
    sign = -1.0 if metric in _LIKELIHOODS else 1.0
    if isinstance(found, numbers.Real | np.bool_):
        return name, sign * float(found), 1.0
    if metric in _LIKELIHOODS and isinstance(found, tuple) and len(found) == 2:
        return name, sign * float(found[0]), float(found[1])
    return name, None, 1.0


def _items(rows: list[tuple[str, float, float]], higher_is_better: bool) -> Items:
    ids, values, weights = zip(*rows, strict=True)
    return Items(ids, np.asarray(values, np.float64), np.asarray(weights, np.float64), higher_is_better)
