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
from flow_finetune.plots import plot_losses, plot_tradeoff, plot_training
from flow_finetune.results import (
    COMMONSENSE,
    MEAN_ACCURACY,
    Cell,
    Metric,
    Run,
    cell,
    compare,
    comparisons,
    find_baseline,
    load_runs,
    shown_metrics,
    verdict,
)
from flow_finetune.statistics import Difference
from flow_finetune.storage import atomic_path

REPORT_FILE = "report.md"
_NONE = "-"
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
        lines += _scores(*scored, output)
    if plot_training(loaded, output / "training.png"):
        lines += _picture("Training", "training.png", _TRAINING_CAPTION)
    page = output / REPORT_FILE
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def summary_table(runs: Sequence[Path], baseline: str | None = None) -> Table:
    """Metrics by runs with standard errors, seconds, and the paired difference of each trained run and the baseline."""
    loaded = load_runs([Path(run) for run in runs])
    table = Table(caption="± standard error; [95 % interval of the paired difference], * excludes 0")
    table.add_column("metric")
    for run in loaded:
        table.add_column(run.name, justify="right", no_wrap=True)
    pairs = [(other, reference) for reference, others in comparisons(loaded, baseline)[:1] for other in others]
    for other, reference in pairs:
        table.add_column(f"{other.name} - {reference.name}", justify="right", no_wrap=True)
    for metric in shown_metrics(loaded):
        cells = [_cell(cell(run, metric, loaded), metric) for run in loaded]
        differences = [compare(other, reference, metric, loaded) for other, reference in pairs]
        texts = [_NONE if d is None else _interval(d, metric) + ("*" if d.excludes_zero else " ") for d in differences]
        table.add_row(metric.label.replace("accuracy, byte-normalised (%)", "accuracy/byte (%)"), *cells, *texts)
    table.add_section()
    table.add_row("training seconds", *(_summary(run, "seconds", ",.0f") for run in loaded), *("" for _ in pairs))
    return table


def _intro(runs: Sequence[Run]) -> list[str]:
    models = sorted({run.summary["model"] for run in runs if run.summary} or {run.evaluation["model"] for run in runs})
    tasks = {name: task for run in runs for name, task in run.tasks.items()}
    listed = ", ".join(f"{name} ({task['num_items']:,})" for name, task in tasks.items())
    return [f"Pre-trained model: {', '.join(f'`{m}`' for m in models)}. Items evaluated: {listed}.", ""]


def _results(runs: Sequence[Run]) -> list[str]:
    metrics = shown_metrics(runs)
    accuracies = [m for m in metrics if m.kind == "multiple_choice"]
    lines = ["## Results", "", "Value ± standard error over items.", ""]
    shown = [m for m in metrics if m not in accuracies]
    rows = []
    for run in runs:
        row = [run.name, *(_cell(cell(run, m, runs), m) for m in shown)]
        row += [_summary(run, "mean_weight", ".3f"), _summary(run, "effective_sample_size", ",.0f")]
        rows.append([*row, _summary(run, "num_steps", ","), _summary(run, "seconds", ",.0f")])
    head = ["run", *(m.label for m in shown), "mean(w)", "effective sample size", "steps", "seconds"]
    lines += _table(head, rows)
    lines += _explanations(shown)
    for name, words in (("accuracy_bytes", "byte-normalised"), ("accuracy", "highest log-likelihood")):
        shown = [m for m in accuracies if m.name == name]
        if shown:
            rows = [[run.name, *(_cell(cell(run, m, runs), m) for m in shown)] for run in runs]
            lines += [f"Multiple-choice accuracy in %, {words}:", "", *_table(["run", *(m.task for m in shown)], rows)]
    return lines


def _explanations(shown: Sequence[Metric]) -> list[str]:
    """What the worked-out columns are, of those that are there."""
    lines = []
    if any(m.name == COMMONSENSE for m in shown):
        lines += [f"The commonsense average is the mean accuracy over {', '.join(derived.COMMONSENSE)}.", ""]
    if any(m.name == MEAN_ACCURACY for m in shown):
        lines += [
            "The mean retained accuracy is over the retained tasks, each counting the same; of multiple-choice tasks it "
            "takes the byte-normalised accuracy.",
            "",
        ]
    if any(m.hardest for m in shown):
        lines += [
            "The hardest 10 % are the items of the target on which the pre-trained model loses most, the same for every "
            "run. It was the one they were picked by, so compare the trained runs.",
            "",
        ]
    return lines


def _comparisons(runs: Sequence[Run], baseline: str | None) -> list[str]:
    found = comparisons(runs, baseline)
    if not found:
        return []
    lines = [
        "## Paired differences",
        "",
        "Run minus reference on the same items, with the 95 % interval of a bootstrap over items (10,000 resamples). "
        "Bold: the interval excludes 0. The intervals hold the chance of which items were evaluated, not of another "
        "training seed; of many intervals, one in twenty excludes 0 without any difference.",
        "",
    ]
    for reference, others in found:
        rows = []
        for metric in shown_metrics(runs):
            differences = [compare(other, reference, metric, runs) for other in others]
            if any(d is not None for d in differences):
                rows.append([metric.label, *(_marked(d, metric) for d in differences)])
        head = ["metric", *(f"{other.name} - {reference.name}" for other in others)]
        lines += [f"### Against {reference.name}", "", *_table(head, rows)]
    return lines


def _scores(loss: np.ndarray, metadata: dict, output: Path) -> list[str]:
    temperature = metadata.get("temperature")
    lines = []
    # Without a temperature (all losses 0) there is no weight curve.
    if temperature:
        plot_losses(loss, temperature, output / "losses.png")
        lines += _picture("Losses of the pre-trained model", "losses.png", _LOSSES_CAPTION)
    for key, title in (("easiest", "Easiest samples"), ("hardest", "Hardest samples")):
        samples = metadata.get("extremes", {}).get(key, [])
        if samples:
            lines += [f"## {title}", ""]
            for sample in samples:
                lines += _sample(sample, temperature)
    return lines


def _read_scores(path: Path) -> tuple[np.ndarray, dict]:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        table = pq.read_table(path, columns=["loss"])
        metadata = json.loads(table.schema.metadata[b"flow_finetune"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a score file; make one with flow-finetune score") from error
    return table["loss"].to_numpy(), metadata


def _sample(sample: dict, temperature: float | None) -> list[str]:
    weight = f", w = {math.exp(-sample['loss'] / temperature):.3f}" if temperature else ""
    text = f"{_shorten(sample['prompt'])}\n→ {_shorten(sample['response'])}"
    # Longer than any fence inside, so no text of a sample can end it.
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`*", text)))
    return [f"Sample {sample['id']}: {sample['loss']:.3f} nats/token{weight}", "", f"{fence}text", text, fence, ""]


def _shorten(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH] + " […]"


def _picture(title: str, file: str, caption: str) -> list[str]:
    return [f"## {title}", "", f"![{title}]({file})", "", caption, ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(texts):
        return "| " + " | ".join(t.replace("|", "\\|") for t in texts) + " |"

    return [line(head), "| --- |" + " ---: |" * (len(head) - 1), *(line(row) for row in rows), ""]


def _summary(run: Run, key: str, spec: str) -> str:
    value = run.summary.get(key) if run.summary else None
    return _NONE if value is None else format(value, spec)


def _cell(shown: Cell | None, metric: Metric) -> str:
    if shown is None:
        return _NONE
    text = f"{shown.value:.{metric.digits}f}"
    return text if shown.standard_error is None else f"{text} ± {shown.standard_error:.{metric.digits}f}"


def _interval(difference: Difference, metric: Metric) -> str:
    value, low, high = (f"{v:+.{metric.digits}f}" for v in difference)
    return f"{value} [{low}, {high}]"


def _marked(difference: Difference | None, metric: Metric) -> str:
    if difference is None:
        return _NONE
    text = _interval(difference, metric)
    word = verdict(difference, metric)
    return f"**{text} {word}**" if word else text


_TRADEOFF_CAPTION = (
    "Each point is a run, bars are standard errors. Left, where both axes are losses, lower left is better; with "
    "accuracies on both axes, upper right is better."
)
_LOSSES_CAPTION = (
    "Mean loss per target token of each fine-tuning sample under the pre-trained model, τ (dashed), and the weight "
    "exp(-loss/τ) before any clipping or normalisation."
)
_TRAINING_CAPTION = (
    "Per logged step. Loss: nats per target token, unweighted. Weighted loss: what is minimised, Σ w·nll over the "
    "number of target tokens; its scale is not comparable between methods. Distance: Euclidean norm of the change of "
    "all weights."
)
