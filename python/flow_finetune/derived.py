"""What is worked out from several tasks or from a part of one: means over accuracies, and the hardest items.

Means are of tasks, not of items: each task counts the same, whatever its size, but the paper's six commonsense tasks
together count as one where all of them are there, as in the paper. The hardest items are those on which the
pre-trained model loses most, the same for every run, so runs stay paired on them; they were picked by that model's
losses, so its own loss on them is high by selection and the comparison that tells something is between trained runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flow_finetune.statistics import Items, ratio_and_standard_error

if TYPE_CHECKING:
    from flow_finetune.results import Run

HARDEST_SHARE = 0.1
COMMONSENSE = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "siqa", "openbookqa")
# Their names in lm-evaluation-harness, where these differ.
_ALIASES = {"social_iqa": "siqa"}
# Pairs of sentences of which the likelier one is meant to win, whatever their lengths.
_BY_LIKELIHOOD = ("blimp",)
# The one accuracy of a task that enters a mean, the first that it has.
_ACCURACY = {
    "multiple_choice": ("accuracy_bytes",),
    "classification": ("accuracy",),
    "qa": ("exact_match",),
    # The last three are of MBPP, its form for chats, and HumanEval.
    "lm_eval": (
        "acc_norm",
        "acc",
        "exact_match",
        "exact_match,strict-match",
        "pass_at_1",
        "pass_at_1,extract_code",
        "pass@1,create_test",
    ),
}
# What says how hard an item is.
_LOSS = {"qa": "nats_per_token", "completion": "nats_per_token", "classification": "nats"}

Key = tuple[str, str]  # task and metric


def accuracies(runs: Sequence[Run], role: str) -> dict[str, Key]:
    """Task and metric of the accuracy of every task of that role which all runs have, by the paper's name of the task."""
    found = {}
    for name, task in runs[0].tasks.items():
        if task["role"] != role:
            continue
        wanted = ("accuracy",) if name in _BY_LIKELIHOOD else ()
        for metric in (*wanted, *_ACCURACY.get(task["kind"], ())):
            if all(metric in run.metrics(name) for run in runs):
                known = _ALIASES.get(name, name)
                found[name if known in runs[0].tasks else known] = (name, metric)
                break
    return found


def commonsense(runs: Sequence[Run]) -> list[tuple[float, Key]]:
    """The mean over the paper's six tasks, if all runs have all of them under these names: share and key of each."""
    found = {**accuracies(runs, "retained"), **accuracies(runs, "target")}
    if not all(name in found for name in COMMONSENSE):
        return []
    return [(1 / len(COMMONSENSE), found[name]) for name in COMMONSENSE]


def retained_mean(runs: Sequence[Run]) -> list[tuple[float, Key]]:
    """The mean over the accuracies of all retained tasks that all runs have, the commonsense average being one of them."""
    keys = accuracies(runs, "retained")
    six = [keys.pop(name) for name in COMMONSENSE] if all(name in keys for name in COMMONSENSE) else []
    groups = [[key] for key in keys.values()] + ([six] if six else [])
    return [(1 / len(groups) / len(group), key) for group in groups for key in group]


def overall_mean(runs: Sequence[Run]) -> list[tuple[float, Key]]:
    """The mean of the retained mean and of the mean accuracy on the targets; nothing where either is missing."""
    retained, targets = retained_mean(runs), accuracies(runs, "target").values()
    if not retained or not targets:
        return []
    return [*((share / 2, key) for share, key in retained), *((0.5 / len(targets), key) for key in targets)]


def mean_and_error(run: Run, parts: Sequence[tuple[float, Key]]) -> tuple[float, float | None]:
    """The weighted mean of metrics and its standard error; items of different tasks are independent."""
    found = [(share, run.tasks[task]["metrics"][metric]) for share, (task, metric) in parts]
    errors = [metric["standard_error"] for _, metric in found]
    error = None if None in errors else math.sqrt(sum((s * m["standard_error"]) ** 2 for s, m in found))
    return sum(share * metric["value"] for share, metric in found), error


def has_hardest(pretrained: Run | None, task: str, metric: str) -> bool:
    """Whether the hardest items of a task are known and more than one."""
    return pretrained is not None and len(_hardest_ids(pretrained, task, metric)) > 1


def hardest(run: Run, pretrained: Run, task: str, metric: str) -> Items | None:
    """The metric's items that are among the tenth on which the pre-trained model loses most."""
    items = run.items.get((task, metric))
    if items is None:
        return None
    chosen = _hardest_ids(pretrained, task, metric)
    rows = [row for row, id in enumerate(items.ids) if id in chosen]
    if len(rows) != len(chosen):
        return None
    return Items([items.ids[row] for row in rows], np.asarray(items.value)[rows], np.asarray(items.weight)[rows])


def _hardest_ids(pretrained: Run, task: str, metric: str) -> set[str]:
    """Of the items that have the metric, a tenth, rounded up; of equally hard ones the first."""
    loss = pretrained.items.get((task, _LOSS.get(pretrained.tasks.get(task, {}).get("kind"), "")))
    counted = pretrained.items.get((task, metric))
    if loss is None or counted is None:
        return set()
    mean = dict(zip(loss.ids, (np.asarray(loss.value) / np.asarray(loss.weight)).tolist(), strict=True))
    ids = sorted((id for id in counted.ids if id in mean), key=lambda id: -mean[id])
    return set(ids[: math.ceil(HARDEST_SHARE * len(ids))])


def value_and_error(items: Items) -> tuple[float, float | None]:
    """A metric over some items, and its standard error."""
    value, error = ratio_and_standard_error(items.value, items.weight)
    return value, None if math.isnan(error) else error
