"""One Markdown page with plots from any number of runs, and the same figures as a table for the terminal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table

from flow_finetune import derived
from flow_finetune.errors import InputError
from flow_finetune.markdown import NONE, interval_text, marked_text, table_lines, value_text
from flow_finetune.plots import plot_losses, plot_tradeoff, plot_training
from flow_finetune.results import (
    COMMONSENSE,
    MEAN_ACCURACY,
    Metric,
    Run,
    cell,
    compare,
    comparisons,
    find_baseline,
    find_pretrained,
    is_another_model,
    items_text,
    load_runs,
    shown_metrics,
)
from flow_finetune.scores import METADATA_KEY
from flow_finetune.storage import atomic_path

REPORT_FILE = "report.md"
# A sample's text is cut here: enough to see what it is.
_TEXT_LENGTH = 700


def write_report(
    runs: Sequence[Path], output: Path, *, scores: Path | None = None, baseline: str | None = None
) -> Path:
    """Write `output/report.md` and its PNG files from run directories; returns the path of the page.

    Args:
        runs: directories that were evaluated; a run is named after its directory.
        output: directory for the page; an older report in it is replaced.
        scores: the pre-trained model's score file, for the histogram and the easiest and hardest samples.
        baseline: the run that the others are compared with; the first that was trained without weights by default.

    Raises:
        InputError: something that is no run, runs that cannot be compared, or matplotlib is not installed.
    """
    loaded = load_runs([Path(run) for run in runs])
    scored = None if scores is None else _read_scores(Path(scores))
    find_baseline(loaded, baseline)
    # Everything that can be wrong with the input is known here, before the first file is written.
    output = Path(output)
    lines = ["# Fine-tuning report", "", *_intro(loaded), *_results(loaded)]
    lines += _comparisons(loaded, baseline)
    if plot_tradeoff(loaded, output / "tradeoff.png"):
        lines += _picture("Learned and kept", "tradeoff.png", _TRADEOFF_CAPTION)
    if scored is not None:
        is_image = any(task["kind"] == "classification" for run in loaded for task in run.tasks.values())
        lines += _scores(*scored, "image" if is_image else "token", output)
    if plot_training(loaded, output / "training.png"):
        lines += _picture("Training", "training.png", _TRAINING_CAPTION)
    page = output / REPORT_FILE
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def summary_table(runs: Sequence[Path], baseline: str | None = None) -> Table:
    """Metrics by runs with standard errors, seconds, and the paired difference of each trained run and the baseline."""
    loaded = load_runs([Path(run) for run in runs])
    table = Table(
        caption="± standard error; [95 % interval of the paired difference; infinite of fewer than 6 items], * excludes 0"
    )
    table.add_column("metric", no_wrap=True)
    for run in loaded:
        table.add_column(run.name, justify="right", no_wrap=True)
    pairs = [(other, reference) for reference, others in comparisons(loaded, baseline)[:1] for other in others]
    for other, reference in pairs:
        table.add_column(f"{other.name} - {reference.name}", justify="right", no_wrap=True)
    for metric in shown_metrics(loaded):
        cells = [value_text(cell(run, metric, loaded), metric) for run in loaded]
        differences = [compare(other, reference, metric, loaded) for other, reference in pairs]
        texts = [
            NONE if d is None else interval_text(d, metric) + ("*" if d.excludes_zero else " ") for d in differences
        ]
        table.add_row(metric.label.replace("accuracy, byte-normalised (%)", "accuracy/byte (%)"), *cells, *texts)
    table.add_section()
    table.add_row("training seconds", *(_summary(run, "seconds", ",.0f") for run in loaded), *("" for _ in pairs))
    return table


def _intro(runs: Sequence[Run]) -> list[str]:
    models = sorted({run.summary["model"] for run in runs if run.summary} or {run.evaluation["model"] for run in runs})
    tasks = {name: task for run in runs for name, task in run.tasks.items()}
    listed = ", ".join(f"{name} ({items_text(task)})" for name, task in tasks.items())
    lines = [f"Pre-trained model: {', '.join(f'`{m}`' for m in models)}. Items evaluated: {listed}.", ""]
    pretrained = find_pretrained(runs)
    if pretrained is None:
        lines += [
            "No run of the pre-trained model is among them, so nothing is said of forgetting or of the hardest items.",
            "",
        ]
    alone = [name for name in tasks if any(name not in run.tasks for run in runs)]
    if alone:
        lines += [f"Not every run has {', '.join(alone)}; means over tasks are over those that all have.", ""]
    is_text = "classification" not in {task["kind"] for task in tasks.values()}
    if pretrained is not None and is_text and is_another_model(pretrained, runs):
        lines += [
            f"{pretrained.name} is not the model that the trained runs started from, or is held in another dtype; what is "
            "hardest is by its losses.",
            "",
        ]
    return lines


def _results(runs: Sequence[Run]) -> list[str]:
    metrics = shown_metrics(runs)
    accuracies = [m for m in metrics if m.kind == "multiple_choice"]
    lines = ["## Results", "", "Value ± standard error over items.", ""]
    shown = [m for m in metrics if m not in accuracies]
    rows = []
    for run in runs:
        row = [run.name, *(value_text(cell(run, m, runs), m) for m in shown)]
        row += [_summary(run, "mean_weight", ".3f"), _summary(run, "effective_sample_size", ",.0f")]
        rows.append([*row, _rate(run), _summary(run, "num_steps", ","), _summary(run, "seconds", ",.0f")])
    head = ["run", *(m.label for m in shown), "mean(w)", "effective sample size", "learning rate", "steps", "seconds"]
    lines += table_lines(head, rows)
    lines += _explanations(shown, runs)
    for name, words in (("accuracy_bytes", "byte-normalised"), ("accuracy", "highest log-likelihood")):
        shown = [m for m in accuracies if m.name == name]
        if shown:
            rows = [[run.name, *(value_text(cell(run, m, runs), m) for m in shown)] for run in runs]
            lines += [
                f"Multiple-choice accuracy in %, {words}:",
                "",
                *table_lines(["run", *(m.task for m in shown)], rows),
            ]
    return lines


def _explanations(shown: Sequence[Metric], runs: Sequence[Run]) -> list[str]:
    """What the worked-out columns are, of those that are there."""
    lines = []
    if any(m.name == COMMONSENSE for m in shown):
        lines += [f"The commonsense average is the mean accuracy over {', '.join(derived.COMMONSENSE)}.", ""]
    if any(m.name == MEAN_ACCURACY for m in shown):
        tasks = ", ".join(f"{task} ({share:.1%})" for share, (task, _) in derived.retained_mean(runs))
        lines += [
            f"The mean retained accuracy is over {tasks}; of multiple-choice tasks it takes the byte-normalised accuracy, "
            "of BLiMP's pairs the likelihood's.",
            "",
        ]
    if any(m.hardest for m in shown):
        lines += [
            "The hardest 10 % are the items of the target on which the pre-trained model loses most, the same for every "
            f"run ({_hardest_counts(shown, runs)}); where a metric is of a part of the items, a tenth of that part. It was "
            "the one they were picked by, so compare the trained runs. They are few, and intervals over few "
            "items are somewhat too narrow.",
            "",
        ]
    return lines


def _hardest_counts(shown: Sequence[Metric], runs: Sequence[Run]) -> str:
    pretrained = find_pretrained(runs)
    counts = []
    for metric in shown:
        items = derived.hardest(pretrained, pretrained, metric.task, metric.name) if metric.hardest else None
        if items is not None:
            counts.append(f"{len(items.ids)} of {metric.label.partition(': ')[2].partition(' (')[0]}")
    return ", ".join(counts)


def _comparisons(runs: Sequence[Run], baseline: str | None) -> list[str]:
    found = comparisons(runs, baseline)
    if not found:
        return []
    lines = [
        "## Paired differences",
        "",
        "Run minus reference on the same items, with the 95 % interval of a bootstrap over items (10,000 resamples). "
        "Bold: the interval excludes 0. The intervals hold the chance of which items were evaluated, not of another "
        "training seed; of many intervals, one in twenty excludes 0 without any difference. Fewer than 6 items give no "
        "interval (infinite ends).",
        "",
    ]
    for reference, others in found:
        rows = []
        for metric in shown_metrics(runs):
            differences = [compare(other, reference, metric, runs) for other in others]
            if any(d is not None for d in differences):
                rows.append([metric.label, *(marked_text(d, metric) for d in differences)])
        head = ["metric", *(f"{other.name} - {reference.name}" for other in others)]
        lines += [f"### Against {reference.name}", "", *table_lines(head, rows)]
    return lines


def _scores(loss: np.ndarray, metadata: dict, unit: str, output: Path) -> list[str]:
    """What the score file says; `unit` is what a loss is in nats per."""
    temperature = metadata.get("temperature")
    lines = []
    # Without a temperature (all losses 0) there is no weight curve.
    if temperature:
        plot_losses(loss, temperature, unit, output / "losses.png")
        lines += _picture("Losses of the pre-trained model", "losses.png", _LOSSES_CAPTION)
    for key, title in (("easiest", "Easiest samples"), ("hardest", "Hardest samples")):
        samples = metadata.get("extremes", {}).get(key, [])
        if samples:
            lines += [f"## {title}", ""]
            for sample in samples:
                lines += _sample(sample, temperature, unit)
    return lines


def _read_scores(path: Path) -> tuple[np.ndarray, dict]:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        table = pq.read_table(path, columns=["loss"])
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a score file; make one with flow-finetune score") from error
    return table["loss"].to_numpy(), metadata


def _sample(sample: dict, temperature: float | None, unit: str) -> list[str]:
    weight = f", w = {math.exp(-sample['loss'] / temperature):.3f}" if temperature else ""
    text = f"{_shorten(sample['prompt'])}\n→ {_shorten(sample['response'])}"
    # Longer than any fence inside, so no text of a sample can end it.
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`*", text)))
    return [f"Sample {sample['id']}: {sample['loss']:.3f} nats/{unit}{weight}", "", f"{fence}text", text, fence, ""]


def _shorten(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH] + " […]"


def _picture(title: str, file: str, caption: str) -> list[str]:
    return [f"## {title}", "", f"![{title}]({file})", "", caption, ""]


def _summary(run: Run, key: str, spec: str) -> str:
    value = run.summary.get(key) if run.summary else None
    return NONE if value is None else format(value, spec)


def _rate(run: Run) -> str:
    """The learning rate that a run was trained at: its method's own, where it has one."""
    groups = [(run.summary or {}).get(group, {}) for group in ("method", "train")]
    rate = next((group["learning_rate"] for group in groups if group.get("learning_rate")), None)
    return NONE if rate is None else f"{rate:g}"


_TRADEOFF_CAPTION = (
    "Each point is a run, bars are standard errors. Left, where both axes are losses, lower left is better; with "
    "accuracies on both axes, upper right is better."
)
_LOSSES_CAPTION = (
    "Mean loss of each fine-tuning sample (per target token, or of the image) under the pre-trained model, τ (dashed), and the weight "
    "exp(-loss/τ) before any clipping or normalisation."
)
_TRAINING_CAPTION = (
    "Per logged step. Loss: nats per target token or image, unweighted. Weighted loss: what is minimised, Σ w·nll over "
    "the number of target tokens or images; its scale is not comparable between methods. Distance: Euclidean norm of the change of "
    "all weights."
)
