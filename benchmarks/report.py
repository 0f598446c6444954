"""head.md, end_to_end.md and the plots, from the CSV files that the benchmarks have written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import harness
from goals import goal_table
from harness import find, fit_exponent, sweeps
from implementations import FLOOR


def peak_mib(row: dict) -> str:
    """The peak memory of a timed row, measured by its own program."""
    keys = ("case", "head", "N", "dtype", "implementation")
    found = find("head_memory", **{key: row[key] for key in keys})
    return found[0]["peak_MiB"] if found else ""


def errors(head: str, name: str) -> dict[str, str]:
    """Loss and dW error on random and on confident rows, of the head's largest N that was measured."""
    cells = {}
    for kind in ("random", "p=0.99"):
        found = sorted(find("accuracy", head=head, implementation=name, rows=kind), key=lambda row: int(row["N"]))
        cells[f"loss error, {kind}"] = found[-1]["loss_error"] if found else ""
        cells[f"dW error, {kind}"] = found[-1]["dweight_error"] if found else ""
    return cells


def case_table() -> list[str]:
    """The fused kernels with weights, ignored rows and a frozen head beside plain training; ratios are within a row's run."""
    rows = harness.read_csv("head_cases")
    table = [
        {
            "head": row["head"],
            "case": row["case"],
            "median s": row["median_s"],
            "quartiles": f"{row['q1_s']} - {row['q3_s']}",
            "time / plain train": row["over_first_case"],
            "within rounds": harness.within_rounds(row),
            "n": row["repetitions"],
        }
        for row in rows
    ]
    commands = sorted({f"Commit {row['commit']}: `{row['command']}`" for row in rows})
    return [harness.markdown(table, list(table[0])), *commands] if rows else ["Not measured yet."]


def speed_tables() -> list[str]:
    """One table per head and case, fastest first: time, its ratios within the run, memory, error."""
    groups = {}
    for row in harness.read_csv("head"):
        groups.setdefault((row["head"], row["N"], row["D"], row["V"], row["dtype"], row["case"]), []).append(row)
    parts = []
    for (head, n, d, v, dtype, case), rows in sorted(groups.items()):
        table = [
            {
                "implementation": row["implementation"],
                "median s": row["median_s"],
                "quartiles": f"{row['q1_s']} - {row['q3_s']}",
                "time / flow cpu": row["over_flow"],
                "time / torch.mm": row["over_mm"],
                "peak MiB": peak_mib(row),
                **({} if row["implementation"] == FLOOR else errors(head, row["implementation"])),
                "n": row["repetitions"],
            }
            for row in sorted(rows, key=lambda row: float(row["median_s"]))
        ]
        parts.append(f"### {head}, {case}: N={n}, D={d}, V={v}, {dtype}")
        parts.append(harness.markdown(table, list(dict.fromkeys(c for row in table for c in row))))
        parts += [
            f"Not timed: {r['implementation']} ({r['reason']})"
            for r in find("head_left_out", head=head, case=case, N=n)
        ]
        parts += [
            f"In a run that was made again since: {r['implementation']} in {r['median_s']} s, {r['over_flow']} of ours "
            f"({r['repetitions']} repetitions, commit {r['commit']})"
            for r in find("head_slower", head=head, case=case, N=n)
        ]
        parts += sorted({f"Commit {row['commit']}: `{row['command']}`" for row in rows})
    return parts


def alone_table() -> list[str]:
    """Every implementation in processes of its own."""
    rows = sorted(harness.read_csv("head_alone"), key=lambda r: (r["head"], r["case"], float(r["median_s"])))
    columns = ["head", "case", "implementation", "median_s", "q1_s", "q3_s", "over_flow", "repetitions", "processes"]
    commands = sorted({f"Commit {row['commit']}: `{row['command']}`" for row in rows})
    return [harness.markdown(rows, columns), *commands] if rows else ["Not measured yet."]


def accuracy_table() -> list[str]:
    """Errors against fp64."""
    rows = sorted(
        harness.read_csv("accuracy"), key=lambda row: (row["head"], int(row["N"]), row["rows"] != "random", row["rows"])
    )
    columns = ["head", "N", "rows", "implementation", "loss_error", "dinput_error", "dweight_error", "commit"]
    commands = sorted({f"`{row['command']}`" for row in rows})
    note = (
        "N is no power of two: with one, 1/N times a bf16 number is a bf16 number, and every dW of random rows, nearly all of "
        "which is -h/N in the targets' rows, looks 20 times as exact as it is."
    )
    return [note, harness.markdown(rows, columns), *commands] if rows else ["Not measured yet."]


def memory_table() -> list[str]:
    """Peak memory of every implementation, head, case and N."""
    rows = sorted(harness.read_csv("head_memory"), key=lambda r: (r["head"], r["case"], int(r["N"])))
    columns = ["head", "dtype", "case", "N", "implementation", "peak_MiB", "commit"]
    commands = sorted({f"`{row['command']}`" for row in rows})
    failed = [
        f"Not measured: {r['implementation']}, {r['head']}, {r['case']}, N = {r['N']} ({r['reason']})"
        for r in harness.read_csv("head_memory_left_out")
    ]
    return [harness.markdown(rows, columns), *failed, *commands] if rows else ["Not measured yet."]


def sweep_table() -> list[str]:
    """Growth exponents of seconds over an 8 x range, and every time over ours in the same run."""
    ratios = sweeps("over_flow")
    rows = [
        {
            "case": case,
            "over": f"{dimension} = {points[0][0]:.0f} ... {points[-1][0]:.0f}",
            "implementation": name,
            "exponent": f"{fit_exponent(points):.2f}",
            "seconds": ", ".join(f"{p[1]:.3f}" for p in points),
            "time / flow cpu": ", ".join(f"{p[1]:.2f}" for p in ratios.get((case, dimension, name), [])),
        }
        for (case, dimension, name), points in sorted(sweeps().items())
        if len(points) > 2
    ]
    commands = sorted({f"Commit {row['commit']}: `{row['command']}`" for row in harness.read_csv("sweep")})
    return [harness.markdown(rows, list(rows[0])), *commands] if rows else ["Not measured yet."]


@contextmanager
def _panels(path: str, count: int, width: float) -> Iterator[Sequence]:
    """The axes of `count` panels beside each other, written to results/<path> at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, count, figsize=(width * count, 4), layout="constrained", squeeze=False)
    yield all_axes[0]
    figure.savefig(harness.RESULTS / path, dpi=100)
    plt.close(figure)


def _log_plot(path: str, title: str, unit: str, panels: dict[str, dict[str, list]]) -> list[str]:
    """One log-log panel for each case; [name of the file], or [] where nothing was measured at three sizes."""
    panels = {case: {name: p for name, p in lines.items() if len(p) > 2} for case, lines in panels.items()}
    panels = {case: lines for case, lines in panels.items() if lines}
    if not panels:
        return []
    with _panels(path, len(panels), 5.5) as all_axes:
        _draw(all_axes, title, unit, panels)
    return [path]


def _draw(all_axes: Sequence, title: str, unit: str, panels: dict[str, dict[str, list]]) -> None:
    for axes, (case, lines) in zip(all_axes, panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=title.split()[-1], ylabel=unit, xscale="log", yscale="log", title=f"{case}: {title}")
        axes.legend(fontsize=7)


def plots() -> list[str]:
    """Time against N and V, memory against N, error against fp64; PNG files beside the tables."""

    def panels(lines, dimension):
        return {
            case: {name: points for (c, over, name), points in sorted(lines.items()) if (c, over) == (case, dimension)}
            for case in ("score", "train")
        }

    figures = []
    for dimension in ("N", "V", "D"):
        figures += _log_plot(
            f"head_time_{dimension}.png", f"time against {dimension}", "seconds", panels(sweeps(), dimension)
        )
    memory = sweeps("peak_MiB", "head_memory")
    figures += _log_plot("head_memory_N.png", "memory against N", "MiB above inputs and results", panels(memory, "N"))
    return figures + accuracy_plot()


def accuracy_plot() -> list[str]:
    """Errors of dH over the confidence of the rows, one panel for each head."""
    rows = harness.read_csv("accuracy")
    heads = sorted({row["head"] for row in rows})
    if not rows:
        return []
    kinds = sorted({r["rows"] for r in rows}, key=lambda kind: (kind != "random", kind))
    with _panels("head_accuracy.png", len(heads), 5) as all_axes:
        for axes, head in zip(all_axes, heads, strict=True):
            for name in dict.fromkeys(r["implementation"] for r in rows if r["head"] == head):
                own = [r for r in rows if (r["head"], r["implementation"]) == (head, name)]
                found = {r["rows"]: float(r["dinput_error"]) for r in own}
                axes.plot(kinds, [found.get(kind, math.nan) for kind in kinds], marker="o", label=name)
            axes.set(yscale="log", ylabel="relative error of dH against fp64", title=head)
            axes.legend(fontsize=6)
    return ["head_accuracy.png"]


def chunk_table() -> list[str]:
    """Seconds of F.linear_cross_entropy by chunk size."""
    rows = sorted(harness.read_csv("head_chunks"), key=lambda r: (r["head"], r["case"], int(r["chunk_rows"])))
    columns = ["head", "case", "chunk_rows", "median_s", "repetitions", "commit"]
    # The sizes are those of shapes.py, for every machine.
    missing = 'Not measured here: "best chunk" is the size that was fastest on the AMD EPYC of benchmarks/results.'
    return [harness.markdown(rows, columns)] if rows else [missing]


def write_end_to_end() -> None:
    """Write end_to_end.md."""
    rows, parts = harness.read_csv("end_to_end"), harness.read_csv("end_to_end_parts")
    if not rows:
        return
    columns = ["program", "device", "baseline", "model", "samples", "tokens", "targets", "flow_tokens_per_second",
               "transformers_tokens_per_second", "ratio", "ratio_of_each_part", "mean_loss_difference",
               "largest_loss_difference"]  # fmt: skip
    text = ["# End to end", *sorted({row["machine"] for row in rows})]
    text.append(
        "Whole `score` and `train` steps of `flow_finetune` with our loss and with that of transformers, batch by batch in "
        'turn in one process. Baseline "all": logits of every position, as `AutoModelForCausalLM` makes them; "targets": only '
        "of the positions that predict a target. Losses: of a sample's mean loss (score), of the first step (train)."
    )
    text += [harness.markdown(rows, columns), *sorted({f"Commit {r['commit']}: `{r['command']}`" for r in parts})]
    if exact := harness.read_csv("end_to_end_exact"):
        text += ["## Error of a sample's mean loss against fp64 on the same hidden states"]
        text += [harness.markdown(exact, [c for c in exact[0] if c not in ("machine", "command")])]
        text += [f"`{row['command']}`" for row in exact]
    (harness.RESULTS / "end_to_end.md").write_text("\n\n".join(text) + "\n")


def write_report() -> None:
    """Write head.md, end_to_end.md and the plots."""
    names = ("head", "sweep", "head_memory", "accuracy")
    machines = sorted({row["machine"] for name in names for row in harness.read_csv(name)})
    text = ["# The head alone", *machines]
    text.append(
        "Medians of repetitions in turn within one process; every "
        "ratio is within the run that measured the row (a table may name two). The goals were set for CPUs with AMX. Errors are against fp64: the largest of a row's loss, the "
        "relative Frobenius norm of a gradient's, at the largest N that was measured for the implementation (the table of "
        "errors has each N). Peak memory is that of a fresh process, above inputs and results."
    )
    text += ["## Goals", *goal_table(), "## Time, memory and error", *speed_tables()]
    text += ["## Each in processes of its own, in turn", *alone_table()]
    text += ["## Weights, ignored rows and a frozen head", *case_table()]
    text += ["## Error against fp64", *accuracy_table(), "## Peak memory", *memory_table()]
    text += ["## Growth", *sweep_table(), *(f"![{name}]({name})" for name in plots())]
    text += ["## Chunk sizes of F.linear_cross_entropy", *chunk_table()]
    path: Path = harness.RESULTS / "head.md"
    path.write_text("\n\n".join(text) + "\n")
    write_end_to_end()
    print(f"wrote {path}")
