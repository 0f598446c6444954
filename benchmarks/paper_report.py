"""The page, CSV files and plot of an experiment, from its records alone."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from experiment import PRETRAINED, Cell, Experiment, ImageSearch, Row, Search
from flow_finetune.config import non_defaults
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import exponential, metric_record
from flow_finetune.markdown import marked_text, table_lines, value_text
from flow_finetune.methods import needs_scores
from flow_finetune.plots import plot_tradeoff
from flow_finetune.results import Metric, Run, cell, compare, load_runs, shown_metrics, verdict
from flow_finetune.statistics import Difference, Items
from flow_finetune.storage import atomic_path
from records import Records

_INTERVALS = (
    "Row minus {baseline} of the same seed on the same items, with the 95 % interval of a bootstrap over items (10,000 "
    "resamples). Bold: the interval excludes 0. The intervals hold the chance of which items were evaluated, not of "
    "another training seed; of many intervals, one in twenty excludes 0 without any difference."
)


@dataclasses.dataclass(frozen=True)
class Results:
    """The finished cells of an experiment."""

    experiment: Experiment
    records: dict[str, dict]  # cell.json by cell key
    runs: dict[str, Run]  # by cell key; a run is named after its row
    searches: dict[str, dict[float, float | None]]  # validation loss by learning rate, by row

    def run(self, row: Row, seed: int | None = None) -> Run | None:
        """The run of a row with a seed, its first one when not given."""
        return self.runs.get(Cell(row, row.options.seeds[0] if seed is None else seed).key)

    def first_runs(self) -> list[Run]:
        """The pre-trained model and every row's first seed, in the order of the file."""
        found = [self.runs.get(Cell(None).key), *(self.run(row) for row in self.experiment.rows)]
        return [run for run in found if run is not None]


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
    bases = {run.summary["fingerprints"]["model"] for run in runs if run.summary and "fingerprints" in run.summary}
    # The probed head of an image run is this machine's own: another CPU's differs in its last bits.
    if experiment.task == "language" and len(bases) > 1:
        raise InputError(f"the records in {records.path} were trained from {len(bases)} different models")
    named = [
        dataclasses.replace(run, name=c.row.name if c.row else PRETRAINED) for c, run in zip(done, runs, strict=True)
    ]
    searches = {row.name: records.search_losses(row) for row in experiment.rows if row.options.learning_rates}
    return Results(experiment, found, dict(zip((c.key for c in done), named, strict=True)), searches)


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


def write_paper_report(results: Results, output: Path, command: str) -> Path:
    """Write `NAME.md`, `NAME.csv`, `NAME_seeds.csv` and `NAME_tradeoff.png` into `output`; returns the page."""
    experiment = results.experiment
    runs = results.first_runs()
    metrics = shown_metrics(runs)
    page = [f"# {experiment.name}", "", *_protocol(results, command)]
    for title, shown in _groups(metrics):
        page += [f"## {title}", "", *_values(results, shown), _INTERVALS.format(baseline=experiment.baseline), ""]
        page += _differences(results, shown)
    if plot_tradeoff(runs, output / f"{experiment.name}_tradeoff.png"):
        page += ["## Learned against kept", "", f"![trade-off]({experiment.name}_tradeoff.png)", ""]
        page += ["One point a row (its first seed); bars are standard errors over items.", ""]
    page += [*_seeds(results, metrics), *_searches(results), *_costs(results)]
    _write_csv(output / f"{experiment.name}.csv", _csv_rows(results, metrics))
    _write_csv(output / f"{experiment.name}_seeds.csv", _seed_rows(results, metrics))
    path = output / f"{experiment.name}.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(page).rstrip() + "\n")
    return path


def _protocol(results: Results, command: str) -> list[str]:
    experiment = results.experiment
    setup = non_defaults(experiment.setup)
    lines = [f"Written by `{command}` from the records in `{experiment.name}/`; these were made by", ""]
    lines += [f"- `{made}`" for made in sorted({record["command"] for record in results.records.values()})]
    lines += ["", "on", "", *(f"- {m}" for m in sorted({record["machine"] for record in results.records.values()})), ""]
    for name in ("model", "data", "train"):
        if name in setup:
            lines.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in setup[name].items()))
    tasks = results.first_runs()[0].tasks
    listed = ", ".join(f"{n} {t['num_items']:,}" for n, t in tasks.items())
    left = [c.key.partition("/")[2] for c in experiment.cells() if c.candidate is None and c.key not in results.records]
    lines += [f"- items evaluated: {listed}"] + ([f"- not run yet: {', '.join(left)}"] if left else [])
    return [*lines, ""]


def _groups(metrics: Sequence[Metric]) -> list[tuple[str, list[Metric]]]:
    """Metrics by the table that shows them."""
    choices = {m.task for m in metrics if m.name == "accuracy_bytes"}
    groups = {
        "What was learned": lambda m: m.role in ("target", "hardest"),
        "What was kept": lambda m: m.task not in choices,
        "Retained tasks, byte-normalised accuracy in %": lambda m: m.name == "accuracy_bytes",
        "Retained tasks, accuracy by the highest log-likelihood in %": lambda m: True,
    }
    found = {title: [] for title in groups}
    for metric in metrics:
        found[next(title for title, holds in groups.items() if holds(metric))].append(metric)
    return [(title, shown) for title, shown in found.items() if shown]


def _label(metric: Metric) -> str:
    return metric.task if metric.name == "accuracy_bytes" and metric.role == "retained" else metric.label


def _values(results: Results, metrics: Sequence[Metric]) -> list[str]:
    runs = results.first_runs()
    rows = [[run.name, *(value_text(cell(run, m, runs), m) for m in metrics)] for run in runs]
    return ["Value ± standard error over items.", "", *table_lines(["row", *map(_label, metrics)], rows)]


def _differences(results: Results, metrics: Sequence[Metric]) -> list[str]:
    rows = []
    for run, row in _compared(results):
        found = [_against_baseline(results, run, row, m) for m in metrics]
        rows.append([run.name, *(marked_text(d, m) for d, m in zip(found, metrics, strict=True))])
    return table_lines(["row", *map(_label, metrics)], rows)


def _compared(results: Results) -> list[tuple[Run, Row | None]]:
    """The first run of everything but the baseline."""
    pairs = [(results.runs[Cell(None).key], None), *((results.run(row), row) for row in results.experiment.rows)]
    return [(run, row) for run, row in pairs if run is not None and run.name != results.experiment.baseline]


def _against_baseline(results: Results, run: Run, row: Row | None, metric: Metric, seed=None) -> Difference | None:
    """A run minus the baseline's of the same seed, or its first seed where it lacks that."""
    baseline = results.experiment.row(results.experiment.baseline)
    seed = row.options.seeds[0] if row is not None and seed is None else seed
    reference = results.run(baseline, seed) or results.run(baseline)
    return None if reference is None else compare(run, reference, metric, results.first_runs())


def _seeds(results: Results, metrics: Sequence[Metric]) -> list[str]:
    """Each seed of the rows that have several, and the difference of the means over seeds."""
    several = [row for row in results.experiment.rows if len(_seeds_done(results, row)) > 1]
    if not several:
        return []
    lines = ["## Over seeds", "", "Mean over seeds ± standard deviation over seeds (each seed's value).", ""]
    rows = []
    for metric in metrics:
        texts = []
        for row in several:
            values = [c.value for s in _seeds_done(results, row) if (c := _value(results, row, s, metric))]
            each = ", ".join(f"{v:.{metric.digits}f}" for v in values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            texts.append(
                f"{np.mean(values):.{metric.digits}f} ± {spread:.{metric.digits}f} ({each})" if values else "-"
            )
        rows.append([metric.label, *texts])
    lines += table_lines(
        ["metric", *(f"{r.name}, seeds {', '.join(map(str, _seeds_done(results, r)))}" for r in several)], rows
    )
    for row in several:
        lines += _seed_differences(results, row, metrics)
    return lines


def _seed_differences(results: Results, row: Row, metrics: Sequence[Metric]) -> list[str]:
    baseline = results.experiment.row(results.experiment.baseline)
    common = [s for s in _seeds_done(results, row) if s in _seeds_done(results, baseline)]
    if row is baseline or len(common) < 2:
        return []
    runs = results.first_runs()
    means = [seed_mean([results.run(r, s) for s in common]) for r in (row, baseline)]
    rows = []
    for metric in metrics:
        mean = compare(*means, metric, runs)
        each = [_against_baseline(results, results.run(row, s), row, metric, s) for s in common]
        if mean is not None:
            values = ", ".join(f"{d.difference:+.{metric.digits}f}" for d in each if d is not None)
            rows.append([metric.label, marked_text(mean, metric), values])
    return [
        f"{row.name} minus {baseline.name}, items averaged over seeds {', '.join(map(str, common))} (a perplexity is the "
        "exponential of the mean loss), 95 % interval over items:", "",
        *table_lines(["metric", "difference of the means", "of each seed"], rows),
    ]  # fmt: skip


def _seeds_done(results: Results, row: Row) -> list[int]:
    return [seed for seed in row.options.seeds if results.run(row, seed) is not None]


def _value(results: Results, row: Row, seed: int, metric: Metric):
    return cell(results.run(row, seed), metric, results.first_runs())


def _searches(results: Results) -> list[str]:
    if not results.searches:
        return []
    lines = ["## Learning rates", "", f"{_search_words(results.experiment.search)} The lowest loss is taken.", ""]
    rows = []
    for name, losses in results.searches.items():
        done = {rate: loss for rate, loss in losses.items() if loss is not None}
        best = min(done, key=done.get) if len(done) == len(losses) and min(done.values()) < math.inf else None
        at_edge = best is not None and len(losses) > 1 and best in (min(losses), max(losses))
        others = [r.name for r in results.experiment.rows if r.options.learning_rate_of == name]
        text = ", ".join(f"{rate:g}: {_loss_text(loss)}" for rate, loss in losses.items())
        chosen = "-" if best is None else f"{best:g}" + (" (at the grid's edge)" if at_edge else "")
        rows.append([name, text, chosen, ", ".join(others)])
    return lines + table_lines(["row", "learning rate: validation loss", "taken", "also for"], rows)


def _loss_text(loss: float | None) -> str:
    if loss is None:
        return "-"
    return "diverged" if loss == math.inf else f"{loss:.4f}"


def _search_words(search: Search | ImageSearch) -> str:
    if isinstance(search, ImageSearch):
        return (
            f"Trained for {search.epochs} epoch(s) without a random {100 * search.holdout:g} % of the training images; "
            "loss on these."
        )
    last = search.validation_first + search.validation_samples - 1
    return (
        f"Trained on the first {search.num_samples} training samples for {search.epochs} epoch(s); loss on rows "
        f"{search.validation_first} to {last} of the training file, which no row is trained on."
    )


def _costs(results: Results) -> list[str]:
    rows, score = [], results.records[Cell(None).key]["seconds"].get("score")
    for key, record in results.records.items():
        run, seconds = results.runs[key], record["seconds"]
        summary = run.summary or {}
        scored = bool(summary) and needs_scores(results.experiment.row(run.name).method)
        rows.append([
            run.name, "" if record["seed"] is None else str(record["seed"]), _number(record.get("learning_rate"), "g"),
            _number(summary.get("num_steps"), ","), _number(summary.get("mean_weight"), ".3f"),
            _number(summary.get("effective_sample_size"), ",.0f"),
            _number(score if scored else None, ",.0f"),
            _number(seconds.get("train"), ",.0f"), _number(seconds.get("evaluate"), ",.0f"), _number(seconds["cell"], ",.0f"),
        ])  # fmt: skip
    head = ["row", "seed", "learning rate", "steps", "mean(w)", "effective sample size", "score s", "train s",
            "evaluate s", "cell s"]  # fmt: skip
    text = "Wall time in seconds; the training data is scored once for all rows. A cell's time has the loading in it."
    return ["## Cost", "", text, "", *table_lines(head, rows)]


def _csv_rows(results: Results, metrics: Sequence[Metric]) -> list[dict]:
    runs, rows = results.first_runs(), []
    compared = {run.name: row for run, row in _compared(results)}
    for run in runs:
        for metric in metrics:
            shown = cell(run, metric, runs)
            difference = None
            if run.name in compared:
                difference = _against_baseline(results, run, compared[run.name], metric)
            rows.append({
                "row": run.name, "task": metric.task, "metric": metric.label, "role": metric.role,
                "value": shown and shown.value, "standard_error": shown and shown.standard_error,
                "difference": difference and difference.difference, "low": difference and difference.low,
                "high": difference and difference.high, "verdict": difference and verdict(difference, metric),
            })  # fmt: skip
    return rows


def _seed_rows(results: Results, metrics: Sequence[Metric]) -> list[dict]:
    return [
        {"row": row.name, "seed": seed, "metric": metric.label, "value": found.value}
        for row in results.experiment.rows
        for seed in _seeds_done(results, row)
        for metric in metrics
        if (found := _value(results, row, seed, metric)) is not None
    ]


def _write_csv(path: Path, rows: list[dict]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
