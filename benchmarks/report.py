"""results/head.md and the plots, from the CSV files that the benchmarks have written."""

from __future__ import annotations

import math

import harness

FLOW = "flow cpu"


def _number(row: dict, column: str) -> float:
    return float(row[column])


def fit_exponent(points: list[tuple[float, float]]) -> float:
    """Slope of log time over log size by least squares."""
    x, y = [math.log(p[0]) for p in points], [math.log(p[1]) for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def speed_tables() -> list[str]:
    """One table per head and case, fastest first, with each time over that of the fused kernels."""
    parts = []
    groups = {}
    for row in harness.read_csv("head"):
        groups.setdefault((row["head"], row["N"], row["D"], row["V"], row["dtype"], row["case"]), []).append(row)
    for (head, n, d, v, dtype, case), rows in sorted(groups.items()):
        own = next(((_number(r, "median_s"), _number(r, "cpu_s")) for r in rows if r["implementation"] == FLOW), None)
        table = [
            {
                "implementation": row["implementation"],
                "median s": row["median_s"],
                "quartiles": f"{row['q1_s']} - {row['q3_s']}",
                "min s": row["min_s"],
                "CPU s": row["cpu_s"],
                "time / flow cpu": f"{_number(row, 'median_s') / own[0]:.2f}" if own else "",
                "CPU / flow cpu": f"{_number(row, 'cpu_s') / own[1]:.2f}" if own else "",
                "peak MiB": row.get("peak_MiB", ""),
                "n": row["repetitions"],
            }
            for row in sorted(rows, key=lambda row: _number(row, "median_s"))
        ]
        parts.append(f"### {head}, {case}: N={n}, D={d}, V={v}, {dtype}\n\n" + harness.markdown(table, list(table[0])))
        parts.append(f"`{rows[0]['command']}`")
    return parts


def accuracy_table() -> list[str]:
    """Errors against fp64."""
    rows = harness.read_csv("accuracy")
    columns = ["head", "N", "rows", "implementation", "loss_error", "dinput_error", "dweight_error"]
    return [harness.markdown(rows, columns)] if rows else ["Not measured yet."]


def sweeps() -> dict:
    """{(case, dimension, implementation): [(size, seconds, MiB), ...]} of results/sweep.csv."""
    lines = {}
    for row in harness.read_csv("sweep"):
        dimension = row["head"][0]
        memory = row.get("peak_MiB", "")
        # CPU seconds: the wall clock of a shared machine would fit a slope to what else ran.
        point = (_number(row, dimension), _number(row, "cpu_s"), float(memory) if memory.isdigit() else None)
        lines.setdefault((row["case"], dimension, row["implementation"]), []).append(point)
    return {key: sorted(points) for key, points in lines.items()}


def sweep_table() -> list[str]:
    """Growth exponents of CPU seconds over an 8 x range."""
    rows = [
        {
            "case": case,
            "over": f"{dimension} = {points[0][0]:.0f} ... {points[-1][0]:.0f}",
            "implementation": name,
            "exponent": f"{fit_exponent([p[:2] for p in points]):.2f}",
            "CPU seconds": ", ".join(f"{p[1]:.3f}" for p in points),
            "peak MiB": ", ".join("" if p[2] is None else f"{p[2]:.0f}" for p in points),
        }
        for (case, dimension, name), points in sorted(sweeps().items())
        if len(points) > 2
    ]
    return [harness.markdown(rows, list(rows[0]))] if rows else ["Not measured yet."]


def plots() -> list[str]:
    """Time against N and V, memory against N, error against fp64; PNG files beside the tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = []
    for dimension, column, label in (("N", 1, "time"), ("V", 1, "time"), ("N", 2, "memory")):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for (case, over, name), points in sorted(sweeps().items()):
            chosen = [(p[0], p[column]) for p in points if p[column]]
            if over == dimension and case == "train" and chosen:
                axes.plot(*zip(*chosen, strict=True), marker="o", label=name)
        unit = "CPU seconds" if column == 1 else "MiB above inputs and results"
        axes.set(xlabel=dimension, ylabel=unit, xscale="log", yscale="log", title=f"train: {label} against {dimension}")
        if axes.lines:
            axes.legend(fontsize=7)
            figures.append(f"head_{label}_{dimension}.png")
            figure.savefig(harness.RESULTS / figures[-1], dpi=110)
        plt.close(figure)
    rows = harness.read_csv("accuracy")
    if rows:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        kinds = list(dict.fromkeys(row["rows"] for row in rows))
        for name in dict.fromkeys(row["implementation"] for row in rows):
            found = {row["rows"]: _number(row, "dinput_error") for row in rows if row["implementation"] == name}
            axes.plot(kinds, [found.get(kind) for kind in kinds], marker="o", label=name)
        axes.set(yscale="log", ylabel="relative error of the input gradient", title="error against fp64")
        axes.legend(fontsize=7)
        figures.append("head_accuracy.png")
        figure.savefig(harness.RESULTS / figures[-1], dpi=110)
        plt.close(figure)
    return figures


def write_report() -> None:
    """Write results/head.md."""
    machines = sorted({row["machine"] for row in (*harness.read_csv("head"), *harness.read_csv("sweep"))})
    parts = [
        "# The head alone",
        *machines,
        "Medians of repetitions in turn. Some rows were measured while the machine was shared: where the two disagree, CPU "
        "seconds tell more than the wall clock.",
    ]
    parts += ["## Time and memory", *speed_tables(), "## Error against fp64", *accuracy_table()]
    parts += ["## Growth", *sweep_table(), *(f"![{name}]({name})" for name in plots())]
    (harness.RESULTS / "head.md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {harness.RESULTS / 'head.md'}")
