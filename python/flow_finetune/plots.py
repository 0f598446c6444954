"""The pictures of a report, as PNG files. Needs matplotlib, the `report` extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flow_finetune.errors import InputError
from flow_finetune.results import MEAN_ACCURACY, Metric, Run, cell, first_metric, shown_metrics
from flow_finetune.storage import atomic_path

# Okabe and Ito's colours, told apart with any colour vision; marker and line style say the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS, _LINES = "osD^vPX", ("-", "--", "-.", ":")
# Written at 100 dots an inch, so that text of 11 points is as large as a page's own.
_DPI = 100
# Target and retained metric of each panel, and the kind of task that both are of, if one is meant: the last is of images,
# where one source accuracy is all that is kept.
_PANELS = (
    ("nats_per_token", "perplexity", None), ("exact_match", MEAN_ACCURACY, None),
    ("accuracy_bytes", MEAN_ACCURACY, None), ("accuracy", "accuracy", "classification"),
)  # fmt: skip
_CURVES = (
    ("loss", "loss (nats)"),
    ("weighted_loss", "weighted loss (nats)"),
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("distance", "distance from pre-trained weights"),
)


def require_matplotlib() -> None:
    """Raise `InputError` before hours of training, not after them, where the pictures could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the report's plots need matplotlib: pip install matplotlib")


def _figure(width: float, height: float):
    require_matplotlib()
    from matplotlib.figure import Figure

    # A figure of its own, drawn by Agg: no window system and no state shared with the caller's pyplot.
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _tidy(axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def panels_of(metrics: Sequence[Metric]) -> list[tuple[Metric, Metric]]:
    """What is drawn against what: a target's metric and a retained one."""
    found = []
    for target, kept, kind in _PANELS:
        of_kind = [m for m in metrics if kind in (None, m.kind)]
        pair = first_metric(of_kind, "target", target), first_metric(of_kind, "retained", kept)
        if None not in pair:
            found.append(pair)
    return found


def plot_tradeoff(runs: Sequence[Run], path: Path) -> bool:
    """What was learned against what was kept, one point a run; False if the runs do not have both."""
    panels = []
    for x, y in panels_of(shown_metrics(runs)):
        points = [(run, cell(run, x, runs), cell(run, y, runs)) for run in runs]
        points = [point for point in points if None not in point]
        if points:
            panels.append((x.label, y.label, x.higher_is_better, points))
    if not panels:
        return False
    figure = _figure(5.0 * len(panels), 4.4)
    for axes, (x_label, y_label, higher, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for run, x, y in points:
            index = runs.index(run)
            # Beyond seven runs a colour comes again, with another marker.
            axes.errorbar(
                x.value, y.value, xerr=x.standard_error, yerr=y.standard_error, color=_COLOURS[index % 7],
                marker=_MARKERS[(index + index // 7) % 7], markersize=9, capsize=3, elinewidth=1, linestyle="none", label=run.name,
            )  # fmt: skip
        _tidy(axes, x_label, y_label)
        axes.set_title("better: " + ("up and right" if higher else "down and left"), fontsize=11, color="0.35")
        axes.margins(0.12)
    # A run that lacks one panel's metric is in another.
    drawn = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [run.name for run in runs if run.name in drawn]
    figure.legend(
        [drawn[name] for name in names], names, loc="outside upper center", ncols=min(len(runs), 5), fontsize=11,
        frameon=False,
    )  # fmt: skip
    _save(figure, path)
    return True


def plot_losses(loss: np.ndarray, temperature: float, unit: str, path: Path) -> None:
    """Histogram of pre-trained losses with the temperature, and below it the weight that each loss gets."""
    figure = _figure(7.0, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.hist(loss, bins=min(60, max(10, len(loss) // 8)), color=_COLOURS[5], edgecolor="white", linewidth=0.4)
    grid = np.linspace(0.0 if loss.min() < 0.5 * loss.max() else loss.min(), loss.max(), 400)
    bottom.plot(grid, np.exp(-grid / temperature), color=_COLOURS[0], linewidth=2)
    bottom.set_ylim(0, 1.02)
    bottom.plot([temperature], [np.exp(-1)], "o", color=_COLOURS[1], markersize=7)
    bottom.annotate(
        "1/e = 0.37", (temperature, np.exp(-1)), (8, 6), textcoords="offset points", fontsize=11, color=_COLOURS[1]
    )
    for axes in (top, bottom):
        axes.axvline(temperature, color=_COLOURS[1], linestyle="--", linewidth=1.5)
    _tidy(top, "", "samples")
    _tidy(bottom, f"loss under the pre-trained model (nats/{unit})", "weight exp(-loss/τ)")
    top.set_title(
        f"τ = {temperature:.3g} nats/{unit}, the median of {len(loss):,} losses", fontsize=11, color=_COLOURS[1]
    )
    _save(figure, path)


def plot_training(runs: Sequence[Run], path: Path) -> bool:
    """Loss, weighted loss, gradient norm, learning rate and distance against the step; False if nothing was trained."""
    trained = [run for run in runs if run.log]
    if not trained:
        return False
    figure = _figure(10.0, 6.0)
    panels = figure.subplots(2, 3).flat
    for axes, (key, label) in zip(panels, _CURVES, strict=False):
        for run in trained:
            points = [(entry["step"], entry[key]) for entry in run.log if entry.get(key) is not None]
            index = runs.index(run)
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=_COLOURS[index % 7], linestyle=_LINES[trained.index(run) % 4],
                    linewidth=1.6, label=run.name, marker="." if len(points) < 3 else None,
                )  # fmt: skip
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="0.5", fontsize=11)
        _tidy(axes, "step", label)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend = figure.axes[5]
    legend.axis("off")
    legend.legend(*figure.axes[0].get_legend_handles_labels(), loc="center", fontsize=12, frameon=False, handlelength=3)
    _save(figure, path)
    return True
