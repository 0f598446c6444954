"""Finished runs read back from their directories, and what is shown of them: columns, cells and paired differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flow_finetune import derived
from flow_finetune.config import MethodConfig, without_defaults
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import EVALUATION_FILE, read_items
from flow_finetune.statistics import Difference, Items, paired_difference, paired_mean_difference
from flow_finetune.storage import SUMMARY_FILE

LOG_FILE = "train/log.jsonl"
MEAN_ACCURACY = "mean retained accuracy"
COMMONSENSE = "commonsense average"
OVERALL = "mean of retained and target accuracy"
# What is worked out from several tasks, in this order.
_MEANS = {COMMONSENSE: derived.commonsense, MEAN_ACCURACY: derived.retained_mean, OVERALL: derived.overall_mean}
# What is shown of each kind of task, in this order: metric, its words, whether higher is better.
_SHOWN = {
    "qa": (("nats_per_token", "loss (nats/token)", False), ("exact_match", "exact match (%)", True),
           ("token_accuracy", "token accuracy (%)", True)),
    "perplexity": (("perplexity", "perplexity", False),),
    "completion": (("nats_per_byte", "loss (nats/byte)", False), ("accuracy", "accuracy (%)", True)),
    "classification": (("accuracy", "accuracy (%)", True), ("nats", "loss (nats)", False)),
    "multiple_choice": (("accuracy_bytes", "accuracy, byte-normalised (%)", True), ("accuracy", "accuracy (%)", True)),
}  # fmt: skip
# Of a target's hardest items: metric, its words, whether higher is better.
_HARDEST = {
    "qa": (("nats_per_token", "loss (nats/token)", False), ("exact_match", "exact match (%)", True)),
    "completion": (("nats_per_byte", "loss (nats/byte)", False), ("accuracy", "accuracy (%)", True)),
    "classification": (("nats", "loss (nats)", False), ("accuracy", "accuracy (%)", True)),
}


@dataclass(frozen=True)
class Run:
    """One evaluated model; `summary` and `log` only if it was trained."""

    name: str
    evaluation: dict
    items: dict[tuple[str, str], Items]
    summary: dict | None = None
    log: list[dict] = field(default_factory=list)

    @property
    def tasks(self) -> dict[str, dict]:
        return {task["name"]: task for task in self.evaluation["tasks"]}

    def metrics(self, task: str) -> dict[str, dict]:
        """The metrics of a task; none where the run lacks it."""
        return self.tasks.get(task, {"metrics": {}})["metrics"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity, as it is shown."""

    task: str  # empty for a mean over tasks
    name: str
    role: str
    label: str
    higher_is_better: bool
    kind: str = ""
    hardest: bool = False  # over the hardest items only

    @property
    def scale(self) -> float:
        """What a value is multiplied by to have the unit of the label."""
        return 100.0 if self.label.endswith("(%)") else 1.0

    @property
    def digits(self) -> int:
        return 2 if self.scale == 100 or self.name == "perplexity" else 3


@dataclass(frozen=True)
class Cell:
    """A value and its standard error in the units of its metric's label."""

    value: float
    standard_error: float | None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, in the order given.

    Raises:
        InputError: a directory without evaluation, two runs of one name, or runs that were evaluated on other data.
    """
    runs = [_load_run(Path(path)) for path in paths]
    if not runs:
        raise InputError("there are no runs to report; give at least one directory that was evaluated")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two runs are named {name!r}; rename one of the directories")
    for run in runs[1:]:
        for name, task in run.tasks.items():
            first = next(r for r in runs if name in r.tasks)
            if task["fingerprint"] != first.tasks[name]["fingerprint"]:
                raise InputError(
                    f"runs {first.name!r} and {run.name!r} were not evaluated on the same tokens of {name!r} (another "
                    "file, limit, template or tokenizer); evaluate both the same way"
                )
            # Older evaluations do not say.
            first = next((r for r in runs if "settings" in r.tasks.get(name, {})), first)
            settings, others = (t.get("settings", {}) for t in (task, first.tasks[name]))
            different = [option for option in settings.keys() & others.keys() if settings[option] != others[option]]
            if different:
                raise InputError(
                    f"runs {first.name!r} and {run.name!r} were evaluated on {name!r} with another "
                    f"{', '.join(sorted(different))}; evaluate both the same way"
                )
    return runs


def _load_run(path: Path) -> Run:
    path = path.resolve()
    if not (path / EVALUATION_FILE).is_file():
        raise InputError(f"{path} is not an evaluated run: it has no {EVALUATION_FILE}")
    evaluation = _read_json(path / EVALUATION_FILE)
    # Beside the model that training left; else in the evaluation, where that was made elsewhere.
    summary = _read_json(path / SUMMARY_FILE) if (path / SUMMARY_FILE).is_file() else evaluation.get("summary")
    log = []
    if (path / LOG_FILE).is_file():
        log = [_parse(line, path / LOG_FILE) for line in (path / LOG_FILE).read_text().splitlines()]
    return Run(path.name, evaluation, read_items(path), summary, log)


def _read_json(path: Path) -> dict:
    return _parse(path.read_text(), path)


def _parse(text: str, path: Path) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: {error}; make it again") from error


def shown_metrics(runs: Sequence[Run]) -> list[Metric]:
    """Every metric that any run has, target tasks first, then what is worked out from them."""
    tasks = {}
    for run in runs:
        for name, task in run.tasks.items():
            tasks.setdefault(name, task)
    metrics = []
    for name, task in sorted(tasks.items(), key=lambda item: item[1]["role"] != "target"):
        for metric, words, higher in _SHOWN.get(task["kind"]) or _named_by_the_harness(task):
            if any(metric in run.metrics(name) for run in runs):
                metrics.append(Metric(name, metric, task["role"], f"{name} {words}", higher, task["kind"]))
        if task["role"] == "target":
            metrics += _hardest_metrics(runs, name, task["kind"])
    for name, parts in _MEANS.items():
        # A mean over one task is that task's accuracy, which stands there already.
        if len(parts(runs)) > 1:
            metrics.append(Metric("", name, "both" if name == OVERALL else "retained", f"{name} (%)", True))
    return metrics


def _named_by_the_harness(task: dict) -> list[tuple[str, str, bool]]:
    """Metrics of a task of lm-evaluation-harness, each with the direction that the harness gives it.

    Files written before it was kept lack it: there losses are nats, everything else is better the higher it is.
    """
    return [
        (name, name, record.get("higher_is_better", not name.startswith("nats")))
        for name, record in task["metrics"].items()
    ]


def _hardest_metrics(runs: Sequence[Run], task: str, kind: str) -> list[Metric]:
    pretrained = find_pretrained(runs)
    return [
        Metric(task, metric, "hardest", f"{task} hardest 10 %: {words}", higher, kind, hardest=True)
        for metric, words, higher in _HARDEST.get(kind, ())
        if derived.has_hardest(pretrained, task, metric)
    ]


def items_text(task: dict) -> str:
    """How many items a task of an evaluation has, how many a metric has that is of fewer, and what became of others."""
    counts = {name: metric["num_items"] for name, metric in task["metrics"].items() if "num_items" in metric}
    fewer = [f"{count:,} of them for {name}" for name, count in counts.items() if count != task["num_items"]]
    lost = [(task.get("num_truncated"), "truncated"), (task.get("num_dropped"), "more left out")]
    return ", ".join([f"{task['num_items']:,}", *fewer, *(f"{count:,} {what}" for count, what in lost if count)])


def first_metric(metrics: Sequence[Metric], role: str, name: str) -> Metric | None:
    """The first metric of that role and name."""
    return next((m for m in metrics if m.role == role and m.name == name), None)


def cell(run: Run, metric: Metric, runs: Sequence[Run]) -> Cell | None:
    """What one run shows of one metric; `runs` are all runs, which say what means are over and which items are hard."""
    if not metric.task:
        value, error = derived.mean_and_error(run, _MEANS[metric.name](runs))
    elif metric.hardest:
        items = derived.hardest(run, find_pretrained(runs), metric.task, metric.name)
        if items is None:
            return None
        value, error = derived.value_and_error(items)
    else:
        found = run.metrics(metric.task).get(metric.name)
        if found is None:
            return None
        value, error = found["value"], found["standard_error"]
    return Cell(metric.scale * value, None if error is None else metric.scale * error)


def compare(run: Run, other: Run, metric: Metric, runs: Sequence[Run]) -> Difference | None:
    """`run` minus `other` on one metric over the items of both, in the units of its label; None if one lacks it."""
    if not metric.task:
        shares, keys = zip(*_MEANS[metric.name](runs), strict=True)
        difference = paired_mean_difference([(run.items[key], other.items[key]) for key in keys], shares=shares)
    else:
        pair = [_compared_items(r, metric, runs) for r in (run, other)]
        if None in pair:
            return None
        difference = paired_difference(*pair, transform=np.exp if metric.name == "perplexity" else None)
    return Difference(*(metric.scale * value for value in difference))


def _compared_items(run: Run, metric: Metric, runs: Sequence[Run]) -> Items | None:
    if metric.hardest:
        return derived.hardest(run, find_pretrained(runs), metric.task, metric.name)
    return run.items.get((metric.task, "nats_per_token" if metric.name == "perplexity" else metric.name))


def verdict(difference: Difference, metric: Metric) -> str:
    """ "better" or "worse" where the interval excludes 0, else nothing."""
    if not difference.excludes_zero:
        return ""
    return "better" if (difference.difference > 0) == metric.higher_is_better else "worse"


def find_baseline(runs: Sequence[Run], name: str | None = None) -> Run | None:
    """The run of that name, else the first of plain fine-tuning: no weights, and nothing else of a method either."""
    if name is not None:
        found = [run for run in runs if run.name == name]
        if not found:
            raise InputError(f"there is no run {name!r} to compare with; there are {', '.join(r.name for r in runs)}")
        return found[0]
    return next((run for run in runs if run.summary and _is_plain(run.summary["method"])), None)


def _is_plain(method: dict) -> bool:
    options = without_defaults(MethodConfig, method)
    return {name: value for name, value in options.items() if name not in ("name", "learning_rate")} == {
        "weights": "none"
    }


def find_pretrained(runs: Sequence[Run]) -> Run | None:
    """The first run that was not trained and is the model that others were trained from, else the first not trained."""
    untrained = [run for run in runs if run.summary is None]
    starts = _starts(runs)
    return next((run for run in untrained if _model_of(run) in starts), untrained[0] if untrained else None)


def is_another_model(pretrained: Run, runs: Sequence[Run]) -> bool:
    """Whether runs were trained, and none of them from this model (or from it in another dtype)."""
    starts = _starts(runs)
    return bool(starts) and _model_of(pretrained) not in starts


def _starts(runs: Sequence[Run]) -> set[str]:
    """Fingerprints of the models that runs were trained from, as far as they say."""
    found = (run.summary.get("fingerprints", {}).get("model") for run in runs if run.summary)
    return {model for model in found if model}


def _model_of(run: Run) -> str | None:
    return run.evaluation.get("fingerprints", {}).get("model")


def comparisons(runs: Sequence[Run], baseline: str | None = None) -> list[tuple[Run, list[Run]]]:
    """Reference runs, each with the trained runs compared with it: first the baseline, then the untrained model."""
    trained = [run for run in runs if run.summary is not None]
    references = [find_baseline(runs, baseline)]
    references += [run for run in (find_pretrained(runs),) if run is not references[0]]
    pairs = [(ref, [run for run in trained if run is not ref]) for ref in references if ref is not None]
    return [(reference, others) for reference, others in pairs if others]
