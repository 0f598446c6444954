"""Timing, memory and accuracy of one case, the same way for every implementation.

Correctness first: an implementation whose loss is wrong is not timed; the check is its warm-up. Then repetitions in
turn (A B C C B A ...), medians with the spread between the quartiles. Memory is the peak above inputs and results, in a
fresh process per implementation.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
# Where the CSV files, tables and plots go; the quick run puts its own elsewhere.
RESULTS = ROOT / "benchmarks" / "results"
# The programs whose change would change a figure.
MEASURING = ("harness", "cases", "implementations", "shapes", "head", "end_to_end", "grad_filter")
# A bf16 loss near 14 is off by up to 2^-5, its bf16 logits by as much; fp32 by 2^-20. A mistake is off by more.
LOSS_GATES = {"bfloat16": 0.15, "float32": 1e-3}
# A bf16 log-softmax near -13 is off by up to 2^-5, so are its probabilities; a wrong scale or sign is off by more. In
# fp32, sums in another order move a gradient by some 1e-6 of its norm; bf16 products in their place by 2e-3.
GRADIENT_GATES = {"bfloat16": 0.1, "float32": 1e-3}


def machine() -> str:
    """CPU, cores and versions in one line."""
    model = platform.processor() or "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        model = f"{fields.get('model name', model)} (family {fields.get('cpu family')}, model {fields.get('model')})"
        flags = fields.get("flags", "").split()
        model += "".join(f" {f}" for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags)
    return f"{model}; {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}"


def commit(programs: Sequence[str] = MEASURING) -> str:
    """The commit of this checkout, with a "+" where the packages or these `programs` differ from it."""
    words = ["git", "-C", str(ROOT)]
    head = subprocess.run([*words, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    code = ["flow_kernels", "csrc", "python/flow_finetune", *(f"benchmarks/{name}.py" for name in programs)]
    changed = subprocess.run([*words, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
    return (head.stdout.strip() or "unknown") + ("+" if changed else "")


def provenance(program: str, arguments: list[str] | None = None, programs: Sequence[str] = MEASURING) -> dict:
    """The machine, the commit that is measured (by `programs`) and the command.

    `arguments` stand for those of the command line, where these would name a machine's own paths.
    """
    # Which implementations there are depends on the first, and what they take on the second (huge pages).
    names = ("TRITON_INTERPRET", "THP_MEM_ALLOC_ENABLE")
    variables = "".join(f"{name}=1 " for name in names if os.environ.get(name) == "1")
    words = shlex.join(sys.argv[1:] if arguments is None else arguments)
    return {
        "machine": machine(),
        "commit": commit(programs),
        "command": f"{variables}python benchmarks/{program} {words}",
    }


def provenance_of_model(program: str, model: str, programs: Sequence[str] = MEASURING) -> dict:
    """`provenance`, the model on the command line by its file name, wherever it lay."""
    return provenance(program, [Path(model).name if word == model else word for word in sys.argv[1:]], programs)


def interleave(calls: dict, repetitions: int, budget_s: float) -> dict:
    """Wall and CPU seconds of every (warm) call, `repetitions` times in turn, fewer if `budget_s` runs out after the second round.

    Every other round goes the other way, so that none always comes after the same one.
    """
    times = {name: [] for name in calls}
    begin = time.perf_counter()
    for repetition in range(repetitions):
        if repetition >= 2 and time.perf_counter() - begin > budget_s:
            break
        for name, call in list(calls.items())[:: -1 if repetition % 2 else 1]:
            started = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return times


def summary(times: list) -> dict:
    """Median and quartiles of the wall clock, the median of the CPU seconds, and the number of repetitions.

    CPU seconds are those of all threads: on a machine shared with other work they vary less than the wall clock.
    """
    ordered = sorted(wall for wall, _ in times)
    # The repetitions are all there is: the other method's quartiles of two lie outside of both.
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median_s": round(statistics.median(ordered), 4), "min_s": round(ordered[0], 4),
        "cpu_s": round(statistics.median(cpu for _, cpu in times), 4), "q1_s": round(quartiles[0], 4), "q3_s": round(quartiles[2], 4),
        "repetitions": len(ordered),
    }  # fmt: skip


def paired_ratio(times: list, others: list | None) -> dict:
    """The median over rounds of one call's wall clock by another's, and its bootstrap interval of 95 %; "" without it.

    On a machine that is twice as fast in one minute as in the next, medians of two calls may be of different minutes.
    """
    names = ("paired_first_case", "paired_low", "paired_high")
    if not others:
        return dict.fromkeys(names, "")
    ratios = np.array([wall / other for (wall, _), (other, _) in zip(times, others, strict=True)])
    draws = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    values = np.median(ratios), *np.quantile(medians, (0.025, 0.975))
    return {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}


def within_rounds(row: dict) -> str:
    """The median ratio to plain training within rounds, and its interval where that was recorded."""
    interval = f" [{row['paired_low']}, {row['paired_high']}]" if row.get("paired_low") else ""
    return f"{row.get('paired_first_case', '')}{interval}"


def peak_above(call, result_bytes) -> int:
    """Bytes by which the resident peak of `call` exceeds what was resident before and what it returns (Linux)."""
    status = Path("/proc/self/status")

    def field(name):
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = field("VmRSS")
    result = call()
    return field("VmHWM") - before - result_bytes(result)


def _return_freed_memory() -> None:
    """Give what the warm-up freed back to the system, where glibc holds it: `call` would take it without a trace."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def in_fresh_process(arguments: list[str]) -> str:
    """The last line that `python <arguments>` prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    return done.stdout.strip().splitlines()[-1]


def update_csv(name: str, rows: list[dict], keys: tuple[str, ...], gone: Sequence[dict] = ()) -> None:
    """Write rows to results/<name>.csv, in place of those with the same keys; rows with the keys of `gone` go."""
    old = read_csv(name)
    fresh = {tuple(str(row[k]) for k in keys) for row in (*rows, *gone)}
    kept = [row for row in old if tuple(row[k] for k in keys) not in fresh]
    if not rows and kept == old:
        return
    columns = list(dict.fromkeys(column for row in (*rows, *kept) or old for column in row))
    RESULTS.mkdir(parents=True, exist_ok=True)
    # Beside it and then in its place: a killed program leaves the old file whole.
    temporary = RESULTS / f".{name}.csv.partial"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    temporary.replace(RESULTS / f"{name}.csv")


def update_measured(name: str, rows: list[dict], left_out: list[dict], keys: tuple[str, ...]) -> None:
    """`update_csv` of what was measured, and of <name>_left_out.csv, which loses what is measured by now."""
    update_csv(name, rows, keys)
    update_csv(f"{name}_left_out", left_out, keys, gone=rows)


def read_csv(name: str) -> list[dict]:
    """The rows of results/<name>.csv, none if there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def find(name: str, **wanted) -> list[dict]:
    """The rows of results/<name>.csv with these values."""
    return [row for row in read_csv(name) if all(row.get(k) == str(v) for k, v in wanted.items())]


def sweeps(column: str = "median_s", name: str = "sweep") -> dict:
    """{(case, dimension, implementation): [(size, value), ...]} of a sweep's CSV file."""
    lines = {}
    for row in read_csv(name):
        if row["head"][1:2] == "=" and row[column]:
            dimension = row["head"][0]
            point = (float(row[dimension]), float(row[column]))
            lines.setdefault((row["case"], dimension, row["implementation"]), []).append(point)
    return {key: sorted(points) for key, points in lines.items()}


def fit_exponent(points: list[tuple[float, float]]) -> float:
    """Slope of log time over log size by least squares."""
    x, y = [math.log(p[0]) for p in points], [math.log(p[1]) for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def markdown(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)
