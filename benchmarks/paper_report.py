"""The page, CSV files and plot of an experiment, from its records alone."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from experiment import Cell, ImageSearch, Row, Search
from flow_finetune.config import non_defaults
from flow_finetune.markdown import marked_text, table_lines, value_text
from flow_finetune.methods import needs_scores
from flow_finetune.plots import plot_tradeoff
from flow_finetune.results import Metric, Run, cell, compare, items_text, shown_metrics, verdict
from flow_finetune.statistics import Difference
from flow_finetune.storage import atomic_path
from paper_results import Results, seed_mean, short_key

_INTERVALS = (
    "Row minus {baseline} of the same seed on the same items (the pre-trained model: minus the {baseline} of this "
    "table), with the 95 % interval of a bootstrap over items (10,000 resamples). Bold: the interval excludes 0. The "
    "intervals hold the chance of which items were evaluated, not of another training seed; of many intervals, one in "
    "twenty excludes 0 without any difference. Fewer than 6 items give no interval (infinite ends)."
)


def write_paper_report(results: Results, output: Path, command: str) -> Path:
    """Write `NAME.md`, `NAME.csv`, `NAME_seeds.csv` and `NAME_tradeoff.png` into `output`; returns the page."""
    experiment = results.experiment
    runs = results.shown_runs()
    metrics = shown_metrics(runs)
    page = [f"# {experiment.name}", "", *_protocol(results, command)]
    for title, shown in _groups(metrics):
        page += [f"## {title}", "", *_values(results, shown), _INTERVALS.format(baseline=experiment.baseline), ""]
        page += _differences(results, shown)
    if plot_tradeoff(runs, output / f"{experiment.name}_tradeoff.png"):
        page += ["## Learned against kept", "", f"![trade-off]({experiment.name}_tradeoff.png)", ""]
        page += ["One point a row (the seed of the tables above); bars are standard errors over items.", ""]
    page += [*_combinations(results, metrics), *_seeds(results, metrics), *_searches(results), *_costs(results)]
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
    machines = {key: record["machine"] for key, record in results.records.items()}
    names = sorted(set(machines.values()))
    lines += ["", "on", "", *(f"- {m}" + (f": {_cells(machines, m)}" if len(names) > 1 else "") for m in names), ""]
    lines += [f"- {_words(name, setup[name])}" for name in ("model", "data") if name in setup]
    lines += _train_settings(results)
    listed = ", ".join(f"{n} {items_text(t)}" for n, t in results.shown_runs()[0].tasks.items())
    lines.append(f"- items evaluated: {listed}")
    commits = {key: record.get("commit", "not recorded") for key, record in results.records.items()}
    lines += [f"- commit {made}: {_cells(commits, made)}" for made in sorted(set(commits.values()))]
    left = [short_key(c.key) for c in experiment.cells() if c.candidate is None and c.key not in results.records]
    lines += [f"- not run yet: {', '.join(left)}"] if left else []
    alone = [
        f"{row.name} {seed}"
        for row in experiment.rows
        for seed in results.seeds_done(row)
        if seed not in results.common_seeds(row)
    ]
    lines += [f"- seeds without {experiment.baseline}, so without a difference: {', '.join(alone)}"] if alone else []
    return [*lines, ""]


def _train_settings(results: Results) -> list[str]:
    """How the rows were trained, every default named; where cells were trained in several ways, which cell how."""
    # A record lacks the options that came after it; it was trained as if at their defaults.
    stated = dataclasses.asdict(results.experiment.setup.train)
    trained = {key: (run.summary or {}).get("train") for key, run in results.runs.items()}
    settings = {key: _words("train", _shared({**stated, **train})) for key, train in trained.items() if train}
    if len(set(settings.values())) > 1:
        return [f"- {text} ({_cells(settings, text)})" for text in sorted(set(settings.values()))]
    return [f"- {text}" for text in set(settings.values()) or [_words("train", _shared(stated))]]


def _shared(train: dict) -> dict:
    """Training options without those that differ from cell to cell, which stand in the table of costs."""
    return {name: value for name, value in train.items() if name not in ("learning_rate", "seed")}


def _words(name: str, options: dict) -> str:
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in options.items())


def _cells(values: dict[str, str], value: str) -> str:
    return ", ".join(short_key(key) for key, found in values.items() if found == value)


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
    runs = results.shown_runs()
    rows = [[run.name, *(value_text(cell(run, m, runs), m) for m in metrics)] for run in runs]
    return ["Value ± standard error over items.", "", *table_lines(["row", *map(_label, metrics)], rows)]


def _differences(results: Results, metrics: Sequence[Metric]) -> list[str]:
    rows = []
    for run, _, seed in _compared(results):
        found = [_against_baseline(results, run, seed, m) for m in metrics]
        rows.append([run.name, *(marked_text(d, m) for d, m in zip(found, metrics, strict=True))])
    return table_lines(["row", *map(_label, metrics)], rows)


def _compared(results: Results) -> list[tuple[Run, Row | None, int | None]]:
    """What is shown but the baseline."""
    return [(run, row, seed) for run, row, seed in results.shown() if row is not results.baseline]


def _against_baseline(results: Results, run: Run, seed: int | None, metric: Metric) -> Difference | None:
    """A run minus the baseline's of the same seed, None where that is not finished.

    The pre-trained model, which has no seed, is compared with the baseline that is shown.
    """
    if seed is None:
        reference = next((other for other, row, _ in results.shown() if row is results.baseline), None)
    else:
        reference = results.run(results.baseline, seed)
    return None if reference is None else compare(run, reference, metric, results.shown_runs())


def _combinations(results: Results, metrics: Sequence[Metric]) -> list[str]:
    """Rows that name another one to be compared with: a method with FLOW's weights against the method alone."""
    pairs = []
    for row in results.experiment.rows:
        other = results.experiment.row(row.options.compare_with) if row.options.compare_with else None
        common = [s for s in results.seeds_done(row) if other is not None and results.run(other, s) is not None]
        if common:
            pairs.append((f"{row.name} - {other.name}", results.run(row, common[0]), results.run(other, common[0])))
    if not pairs:
        return []
    rows, runs = [], results.shown_runs()
    for metric in metrics:
        rows.append(
            [metric.label, *(marked_text(compare(run, other, metric, runs), metric) for _, run, other in pairs)]
        )
    text = "Differences of the first seed that both have, on the same items, with intervals as above."
    return ["## Combinations", "", text, "", *table_lines(["metric", *(name for name, _, _ in pairs)], rows)]


def _seeds(results: Results, metrics: Sequence[Metric]) -> list[str]:
    """Each seed of the rows that have several, and the difference of the means over seeds."""
    several = [row for row in results.experiment.rows if len(results.seeds_done(row)) > 1]
    if not several:
        return []
    lines = ["## Over seeds", "", "Mean over seeds ± standard deviation over seeds (each seed's value).", ""]
    rows, runs = [], results.shown_runs()
    for metric in metrics:
        texts = []
        for row in several:
            values = [c.value for s in results.seeds_done(row) if (c := cell(results.run(row, s), metric, runs))]
            each = ", ".join(f"{v:.{metric.digits}f}" for v in values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            texts.append(
                f"{np.mean(values):.{metric.digits}f} ± {spread:.{metric.digits}f} ({each})" if values else "-"
            )
        rows.append([metric.label, *texts])
    lines += table_lines(
        ["metric", *(f"{r.name}, seeds {', '.join(map(str, results.seeds_done(r)))}" for r in several)], rows
    )
    for row in several:
        lines += _seed_differences(results, row, metrics)
    return lines


def _seed_differences(results: Results, row: Row, metrics: Sequence[Metric]) -> list[str]:
    baseline, common = results.baseline, results.common_seeds(row)
    if row is baseline:
        return []
    named = ", ".join(map(str, common))
    if len(common) < 2:
        reason = f"they have only seed {named} in common" if common else "they have no seed in common"
        return [f"{row.name} minus {baseline.name} over seeds: not known, as {reason}.", ""]
    runs = results.shown_runs()
    means = [seed_mean([results.run(r, s) for s in common]) for r in (row, baseline)]
    rows = []
    for metric in metrics:
        mean = compare(*means, metric, runs)
        if mean is not None:
            each = [_against_baseline(results, results.run(row, s), s, metric).difference for s in common]
            values = ", ".join(f"{d:+.{metric.digits}f}" for d in each)
            rows.append(
                [metric.label, marked_text(mean, metric), values, f"{statistics.stdev(each):.{metric.digits}f}"]
            )
    return [
        f"{row.name} minus {baseline.name}, items averaged over seeds {named} (a perplexity is the exponential of the "
        "mean loss), 95 % interval over items; of each seed, with the standard deviation over seeds:", "",
        *table_lines(["metric", "difference of the means", "of each seed", "standard deviation"], rows),
    ]  # fmt: skip


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
    # Of images the time has the decoding, the features and the head's training in it, which every row starts from.
    images = results.experiment.task == "image"
    for key, record in results.records.items():
        run, seconds = results.runs[key], record["seconds"]
        summary = run.summary or {}
        scored = not images and bool(summary) and needs_scores(results.experiment.row(run.name).method)
        rows.append([
            run.name, "" if record["seed"] is None else str(record["seed"]), _number(record.get("learning_rate"), "g"),
            _number(summary.get("num_steps"), ","), _number(summary.get("mean_weight"), ".3f"),
            _number(summary.get("effective_sample_size"), ",.0f"),
            *([] if images else [_number(score if scored else None, ",.0f")]),
            _number(seconds.get("train"), ",.0f"), _number(seconds.get("evaluate"), ",.0f"), _number(seconds["cell"], ",.0f"),
        ])  # fmt: skip
    head = ["row", "seed", "learning rate", "steps", "mean(w)", "effective sample size",
            *([] if images else ["score s"]), "train s", "evaluate s", "cell s"]  # fmt: skip
    once = "the training data is scored once for all rows"
    if images:
        once = f"decoding, features, the new head and the scores took {_number(score, ',.0f')} s once, before all rows"
    text = f"Wall time in seconds; {once}. A cell's time has the loading in it."
    total = sum(record["seconds"]["cell"] for record in results.records.values())
    if results.search_seconds:
        searched = sum(results.search_seconds)
        text += f" {len(results.search_seconds)} learning rates were tried in {searched:,.0f} s."
        total += searched
    text += f" All together {total / 3600:.1f} h."
    return ["## Cost", "", text, "", *table_lines(head, rows)]


def _csv_rows(results: Results, metrics: Sequence[Metric]) -> list[dict]:
    runs, rows = results.shown_runs(), []
    for run, row, seed in results.shown():
        for metric in metrics:
            shown = cell(run, metric, runs)
            difference = None if row is results.baseline else _against_baseline(results, run, seed, metric)
            rows.append({
                "row": run.name, "task": metric.task, "metric": metric.label, "role": metric.role,
                "value": shown and shown.value, "standard_error": shown and shown.standard_error,
                "difference": difference and difference.difference, "low": difference and difference.low,
                "high": difference and difference.high, "verdict": difference and verdict(difference, metric),
            })  # fmt: skip
    return rows


def _seed_rows(results: Results, metrics: Sequence[Metric]) -> list[dict]:
    runs = results.shown_runs()
    return [
        {"row": row.name, "seed": seed, "metric": metric.label, "value": found.value}
        for row in results.experiment.rows
        for seed in results.seeds_done(row)
        for metric in metrics
        if (found := cell(results.run(row, seed), metric, runs)) is not None
    ]


def _write_csv(path: Path, rows: list[dict]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
