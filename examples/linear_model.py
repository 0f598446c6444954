"""Why easy samples first forgets less: the linear model of the FLOW paper's section 7, drawn.

    python examples/linear_model.py --output linear_model.png

Left, the way of gradient descent from the old optimum theta* to the new one in the plane of e = theta* - theta~* and
the direction that the inputs are correlated with: plain descent is far off to one side after a step and at the new
optimum soon after; FLOW goes there the more slowly and the nearer to the line between the two optima the smaller tau
is. On that line lie the averages (WiSE-FT). Right, the sum of the errors on both tasks against the step: FLOW with
a tau of at most 1, stopped at its best step, is below the best average.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from flow_finetune.theory import LinearModel
from matplotlib.figure import Figure

MODEL = LinearModel(rho=0.6, distance=1.7)
# In units of ||e||^2, from nearly plain descent to nearly the line of the averages.
TEMPERATURES = (10.0, 1.0, 0.3, 0.03)
NUM_STEPS = 60
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7")


def trajectories(model: LinearModel = MODEL) -> dict[str, np.ndarray]:
    """`[NUM_STEPS + 1, 2]` offsets from the new optimum of plain descent and of FLOW for several temperatures."""
    steps = np.arange(NUM_STEPS + 1)
    found = {"plain": np.stack([model.plain_iterate(k) for k in steps])}
    for ratio in TEMPERATURES:
        beta = model.beta_of(ratio * model.distance**2)
        found[f"FLOW, τ = {ratio:g} ‖e‖²"] = model.flow_iterate(beta, steps)
    return found


def draw(model: LinearModel, ways: dict[str, np.ndarray], path: Path) -> None:
    """Write the two panels as a PNG file."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    plane, errors = figure.subplots(1, 2)
    styles = [{"color": "black", "linestyle": "--"}, *({"color": colour} for colour in COLOURS)]
    for (name, way), style in zip(ways.items(), styles, strict=True):
        plane.plot(*way.T, marker=".", label=name, **style)
        errors.plot(np.arange(1, len(way) + 1), model.total_error(way) / model.distance**2, marker=".", **style)
    share, best = model.best_average()
    plane.plot(*model.average(np.linspace(0, 1, 2)).T, color="0.7", linewidth=4, zorder=0, label="averages")
    plane.plot(*model.average(share), "o", color="0.5", markersize=9)
    for name, place in (("new optimum", np.zeros(2)), ("old optimum", model.error_vector)):
        plane.annotate(name, place, (0, 9), textcoords="offset points", ha="center", fontsize=10)
    plane.set(xlabel="along e", ylabel="along the correlated direction", aspect="equal")
    plane.margins(0.15)
    errors.axhline(best / model.distance**2, color="0.7", linewidth=4, zorder=0, label="best average")
    errors.axhline(1.0, color="0.7", linestyle=":", label="either optimum, at least")
    errors.set(xlabel="step + 1", xscale="log", ylabel="error on both tasks / ‖e‖²")
    errors.legend(fontsize=9)
    figure.legend(*plane.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main(path: Path) -> dict[str, float]:
    """Draw, and return the lowest total error of each way and of averaging, over ||e||^2."""
    ways = trajectories()
    draw(MODEL, ways, path)
    best = {name: float(MODEL.total_error(way).min()) / MODEL.distance**2 for name, way in ways.items()}
    best["best average"] = MODEL.best_average()[1] / MODEL.distance**2
    for name, error in best.items():
        print(f"{name:24} lowest error on both tasks: {error:.3f} ‖e‖²")
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("linear_model.png"))
    main(parser.parse_args().output)
