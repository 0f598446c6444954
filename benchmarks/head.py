"""The head alone: time, memory and error of a linear cross-entropy, against the ways it is done without one.

python benchmarks/head.py time --case score --head gemma-3-270m      one case of one head, all implementations in turn
python benchmarks/head.py memory --case train --head gemma-3-270m    peak memory, a fresh process each
python benchmarks/head.py sweep --case train --over N                8 x range of N, V or D
python benchmarks/head.py alone --case train --head gemma-3-270m     each implementation in processes of its own, in turn
python benchmarks/head.py sweep --case train --over N --alone        the sweep of ours, the sizes in fresh processes in turn
python benchmarks/head.py chunks --case train --head gemma-3-270m    chunk sizes of F.linear_cross_entropy
python benchmarks/head.py accuracy                                   errors against fp64
python benchmarks/head.py report                                     head.md and plots from the CSV files
python benchmarks/head.py quick                                      three minutes of the above, to runs/bench
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness
from cases import AUTOCAST, CASES, call_of, relative_error, right_calls, tensors
from implementations import DEFAULT_CHUNKS, FLOOR, FLOW, IMPLEMENTATIONS, REFERENCE
from shapes import HEADS, SWEEPS, Head

from flow_kernels import reference

QUICK_RESULTS = harness.ROOT / "runs" / "bench"
CONFIDENCE = {"random": None, "p=0.9": 0.9, "p=0.99": 0.99, "p=0.999": 0.999}
CALLS_OF_A_PROCESS = 3
# By default left out: the definition, and the one that takes minutes a call where V is large.
DEFAULT_NAMES = [name for name in IMPLEMENTATIONS if name not in (REFERENCE, DEFAULT_CHUNKS)]


def _about(head: Head, case: str, name: str) -> dict:
    shape = {"N": head.num_rows, "D": head.dim, "V": head.num_classes, "dtype": head.dtype}
    return {"case": case, "head": head.name, **shape, "implementation": name}


KEYS = ("case", "head", "N", "dtype", "implementation")


def time_cases(cases: list[str], head: Head, names: list[str], repetitions: int, budget_s: float, csv: str) -> None:
    """Time `names` in turn and write one row each to <csv>.csv; of further cases, the first implementation only.

    Besides the seconds a row has the ratios of its median to those of the fused kernels, of the product alone and of
    plain training within the same run, and of the last also the median of the ratios within each round, with its
    interval. What is left out goes to <csv>_left_out.csv with the reason.
    """
    calls, left_out = {}, []
    for case in cases:
        right, reasons = right_calls(case, head, names if case == cases[0] else names[:1])
        calls |= {(case, name): call for name, call in right.items()}
        left_out += [_about(head, case, name) | {"reason": reason} for name, reason in reasons.items()]
    for row in left_out:
        print(f"{row['case']}, {row['implementation']}: not timed: {row['reason']}", flush=True)
    times = harness.interleave(calls, repetitions, budget_s)
    calls.clear()
    found = {key: harness.summary(seconds) for key, seconds in times.items()}
    source = harness.provenance("head.py")
    rows = []
    for (case, name), row in found.items():
        others = {"flow": (case, FLOW), "mm": (cases[0], FLOOR), "first_case": (cases[0], name)}
        ratios = {
            f"over_{label}": round(row["median_s"] / found[key]["median_s"], 3) if key in found else ""
            for label, key in others.items()
        }
        ratios |= harness.paired_ratio(times[case, name], times.get((cases[0], name)))
        rows.append(_about(head, case, name) | row | ratios | source)
        shown = ("case", "head", "implementation", "median_s", "q1_s", "q3_s", *ratios, "repetitions")
        print({k: rows[-1][k] for k in shown}, flush=True)
    record_times(csv, rows, [row | source for row in left_out])


def record_times(csv: str, rows: list[dict], left_out: list[dict]) -> None:
    """Write rows to <csv>.csv; those they replace go to <csv>_slower.csv where a baseline was faster than we were.

    A second run must not make the first one's bad news go.
    """
    fresh = {tuple(str(row[k]) for k in KEYS) for row in rows}
    replaced = [row for row in harness.read_csv(csv) if tuple(row[k] for k in KEYS) in fresh]
    baselines = [row for row in replaced if row["implementation"] not in (FLOW, FLOOR, REFERENCE) and row["over_flow"]]
    slower = [row for row in baselines if float(row["over_flow"]) < 1]
    harness.update_csv(f"{csv}_slower", slower, (*KEYS, "commit", "median_s"))
    harness.update_measured(csv, rows, left_out, KEYS)


def memory(cases: list[str], head: Head, names: list[str], csv: str) -> None:
    """Peak memory above inputs and results in MiB, a fresh process for each, to <csv>.csv; failures beside it."""
    for case in cases:
        rows, left_out = [], []
        for name in names:
            arguments = ["peak", "--case", case, "--head", head.name, "--rows", str(head.num_rows)]
            peak_mib = harness.in_fresh_process([__file__, *arguments, "--implementation", name])
            # A reason is no figure: the report would plot it.
            reason = peak_mib.removeprefix("failed: ")
            found, column, value = (rows, "peak_MiB", peak_mib) if reason == peak_mib else (left_out, "reason", reason)
            found.append(_about(head, case, name) | {column: value} | harness.provenance("head.py"))
            print({k: found[-1][k] for k in (*KEYS, column)}, flush=True)
        harness.update_measured(csv, rows, left_out, KEYS)


def peak(case: str, head: Head, name: str) -> None:
    """Print the peak memory in MiB above inputs and returned tensors."""
    small = dataclasses.replace(head, name="warm", num_rows=64, dim=64, num_classes=512)
    # What is compiled is compiled for one shape, and the compiler's own memory is not the loss's.
    warm = head if "compile" in name else small
    call_of(name, case, warm, tensors(warm, case))()
    inputs = tensors(head, case)

    def result_bytes(result):
        return sum(t.nbytes for t in result)

    print(round(harness.peak_above(call_of(name, case, head, inputs), result_bytes) / 2**20, 2))


def time_alone(case: str, heads: Sequence[Head], names: list[str], rounds: int, csv: str) -> None:
    """Time each of `names` on each of `heads` in `rounds` processes of its own, in turn, and write one row each to <csv>.csv.

    A call that takes gigabytes leaves the process's memory in another state than it found it in, in which the calls
    after it are slower: here none comes after another implementation's. A round has every size: a machine that is slower
    for a minute must not look like growth.
    """
    times = {}
    for head in heads:
        right, reasons = right_calls(case, head, names)
        times |= {(head, name): [] for name in right}
        right.clear()
        for name, reason in reasons.items():
            print(f"{case}, {head.name}, {name}: not timed: {reason}", flush=True)
    failed = []
    for _ in range(rounds):
        for head, name in list(times):
            shape = ["--head", head.name, "--rows", str(head.num_rows)]
            line = harness.in_fresh_process([__file__, "seconds", "--case", case, *shape, "--implementation", name])
            if line.startswith("failed: "):  # the others go on, and are written
                failed.append(f"{case}, {head.name}, {name}, in a process of its own {line}")
                del times[head, name]
            else:
                times[head, name] += json.loads(line)
    found = {key: harness.summary(seconds) for key, seconds in times.items()}
    rows = []
    for (head, name), row in found.items():
        ours = found.get((head, FLOW))
        over = {"over_flow": round(row["median_s"] / ours["median_s"], 3)} if ours else {}
        rows.append(_about(head, case, name) | row | {"processes": rounds} | over | harness.provenance("head.py"))
        print(
            {k: rows[-1][k] for k in ("case", "head", "implementation", "median_s", "q1_s", "q3_s", *over)}, flush=True
        )
    harness.update_csv(csv, rows, KEYS)
    if failed:
        raise SystemExit("\n".join(failed))


def seconds(case: str, head: Head, name: str) -> None:
    """Print wall and CPU seconds of a few calls after the first, as JSON."""
    call = call_of(name, case, head, tensors(head, case))
    call()
    print(json.dumps(harness.interleave({name: call}, CALLS_OF_A_PROCESS, math.inf)[name]))


def chunks(cases: list[str], head: Head, repetitions: int, budget_s: float) -> None:
    """Seconds of `F.linear_cross_entropy` with every chunk size from 64 rows to all of them, to head_chunks.csv."""
    name = "F.linear_cross_entropy, best chunk"
    sizes = [size for size in (64, 128, 256, 512, 1024, 2048) if size <= head.num_rows]
    for case in cases:
        calls = {
            size: right_calls(case, dataclasses.replace(head, chunks=(size, size)), [name])[0][name] for size in sizes
        }
        rows = [
            _about(head, case, name) | {"chunk_rows": size} | harness.summary(times) | harness.provenance("head.py")
            for size, times in harness.interleave(calls, repetitions, budget_s).items()
        ]
        for row in rows:
            print({k: row[k] for k in ("case", "head", "chunk_rows", "median_s", "repetitions")}, flush=True)
        harness.update_csv("head_chunks", rows, ("case", "head", "N", "chunk_rows"))


def accuracy(head: Head, names: list[str], kinds: list[str]) -> None:
    """Errors against fp64 of losses (largest, absolute) and gradients (relative, Frobenius), to accuracy.csv."""
    for kind in kinds:
        rows = []
        inputs = tensors(head, "train", CONFIDENCE[kind])
        wide = [t.detach().double() if t.is_floating_point() else t for t in inputs[:3]]
        scale = torch.full((head.num_rows,), 1 / head.num_rows, dtype=torch.float64)
        options = (None, None, -100, 0.0, head.softcap or 0.0, 0.0, 0)
        _, loss, *gradients = reference.linear_cross_entropy_fwd_bwd(*wide, scale, *options, True, True, False)
        del wide
        for name in names:
            try:
                with torch.no_grad():
                    losses = IMPLEMENTATIONS[name](*inputs, head.softcap, "none", head.chunks[0])
                actual = call_of(name, "train", head, inputs)()
            except (NotImplementedError, RuntimeError) as error:
                print(f"{name}: {str(error).splitlines()[0]}")
                continue
            errors = [relative_error(a, e) for a, e in zip(actual[1:], gradients, strict=False)]
            row = {"rows": kind, **_about(head, "train", name)}
            row["loss_error"] = f"{float((losses.double() - loss).abs().max()):.1e}"
            row |= {"dinput_error": f"{errors[0]:.1e}", "dweight_error": f"{errors[1]:.1e}"}
            rows.append(row | harness.provenance("head.py"))
            print({k: v for k, v in row.items() if k not in ("D", "V", "dtype", "case")}, flush=True)
            del actual
        harness.update_csv("accuracy", rows, ("rows", "head", "N", "implementation"))


def quick() -> None:
    """Three minutes: every baseline's time, memory and error at SmolLM2's head, scoring at Gemma 3's, a sweep."""
    harness.RESULTS = QUICK_RESULTS
    small, large = HEADS["smollm2-135m"], HEADS["gemma-3-270m"]
    few = [FLOW, "eager, fp32 logits", "compiled, fp32 logits", "TRL chunked_nll", FLOOR]
    time_cases(["score"], small, DEFAULT_NAMES, 5, 15, "head")
    time_cases(["train"], small, few, 5, 20, "head")
    time_cases(list(CASES[1:]), small, few[:1], 5, 10, "head_cases")
    time_cases(["score"], large, few, 3, 15, "head")
    memory(["train"], small, few[:2], "head_memory")
    for one in SWEEPS["N"]:
        time_cases(["train"], one, [FLOW], 3, 5, "sweep")
    accuracy(dataclasses.replace(small, num_rows=60), few[:4], list(CONFIDENCE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("time", "memory", "sweep", "chunks", "accuracy", "peak", "seconds", "alone", "report", "quick")
    )
    parser.add_argument("--case", action="append", choices=(*CASES, AUTOCAST))
    parser.add_argument("--head", default="gemma-3-270m", help=", ".join(HEADS))
    parser.add_argument("--over", choices=tuple(SWEEPS), default="N")
    parser.add_argument("--alone", action="store_true", help="sweep: ours, in processes of its own")
    parser.add_argument("--kind", action="append", choices=tuple(CONFIDENCE), help="accuracy: of which rows")
    parser.add_argument("--rows", type=int, help="another N for the head")
    parser.add_argument("--implementation", action="append", choices=tuple(IMPLEMENTATIONS))
    parser.add_argument("--without", action="append", choices=tuple(IMPLEMENTATIONS), default=[])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no repetition starts")
    parser.add_argument(
        "--results", type=Path, help="folder of the records, one for a CPU; benchmarks/results if not given"
    )
    options = parser.parse_args()
    harness.RESULTS = options.results or harness.RESULTS
    head = (HEADS | {head.name: head for heads in SWEEPS.values() for head in heads})[options.head]
    if options.rows:
        head = dataclasses.replace(head, num_rows=options.rows)
    names = [n for n in options.implementation or DEFAULT_NAMES if n not in options.without]
    cases = options.case or ["score"]
    repeated = (options.repetitions, options.budget)
    if options.what == "time":
        # The cases beside each other go to a file of their own: "train" is then of two runs, and each row of one.
        time_cases(cases, head, names, *repeated, "head" if len(cases) == 1 else "head_cases")
    elif options.what == "memory":
        memory(cases, head, [n for n in names if n != FLOOR], "head_memory")
    elif options.what == "alone":
        time_alone(cases[0], [head], names, options.repetitions, "head_alone")
    elif options.what == "sweep" and options.alone:
        time_alone(cases[0], SWEEPS[options.over], [FLOW], options.repetitions, "sweep_alone")
    elif options.what == "sweep":
        for one in SWEEPS[options.over]:
            time_cases(cases[:1], one, names, options.repetitions, options.budget / 4, "sweep")
    elif options.what == "chunks":
        chunks(cases, head, *repeated)
    elif options.what == "accuracy":
        accuracy(head, [name for name in names if name != FLOOR], options.kind or list(CONFIDENCE))
    elif options.what == "peak":
        peak(cases[0], head, names[0])
    elif options.what == "seconds":
        seconds(cases[0], head, names[0])
    elif options.what == "quick":
        quick()
    if options.what in ("report", "quick"):
        from report import write_report

        write_report()


if __name__ == "__main__":
    main()
