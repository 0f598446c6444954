"""The head alone: time, memory and error of a linear cross-entropy, against the ways it is done without one.

python benchmarks/head.py time --case score --head gemma-3-270m      one case of one head
python benchmarks/head.py sweep --case train --over N                8 x range of N, V or D
python benchmarks/head.py accuracy                                   errors against fp64
python benchmarks/head.py report                                     results/head.md and plots from the CSV files
python benchmarks/head.py quick                                      three minutes of the above
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness
from implementations import IMPLEMENTATIONS
from shapes import HEADS, SWEEPS, Head

from flow_kernels import reference

CASES = ("score", "train", "train weighted", "train half ignored", "train frozen head")
COMMAND = "python benchmarks/" + " ".join(["head.py", *sys.argv[1:]])


def tensors(head: Head, case: str, confident: float | None = None):
    """Input, weight, target and sample weight; `confident` is the probability of the target in every row."""
    torch.manual_seed(0)
    dtype = getattr(torch, head.dtype)
    weight = (torch.randn(head.num_classes, head.dim) / head.dim**0.5).to(dtype)
    target = torch.randint(0, head.num_classes, (head.num_rows,))
    if confident is None:
        input = torch.randn(head.num_rows, head.dim).to(dtype)
    else:
        own = weight[target].float()
        margin = torch.logit(torch.tensor(confident)) + torch.log(torch.tensor(head.num_classes - 1.0))
        input = (margin * own / own.square().sum(1, keepdim=True)).to(dtype)
    if case == "train half ignored":
        target[torch.randperm(head.num_rows)[: head.num_rows // 2]] = -100
    sample_weight = torch.rand(head.num_rows) + 0.1 if case == "train weighted" else None
    input.requires_grad_(case != "score")
    weight.requires_grad_(case not in ("score", "train frozen head"))
    return input, weight, target, sample_weight


def call_of(name: str, case: str, head: Head, inputs):
    """A function without arguments that returns the losses, or the loss and its gradients."""
    function = IMPLEMENTATIONS[name]

    def call():
        input, weight, target, sample_weight = inputs
        if case == "score" or name == "torch.mm":
            with torch.no_grad():
                return (function(input, weight, target, None, head.softcap, "none"),)
        loss = function(input, weight, target, sample_weight, head.softcap, "mean")
        return (loss, *torch.autograd.grad(loss, [t for t in (input, weight) if t.requires_grad]))

    return call


def right_calls(case: str, head: Head, names: list[str], inputs, losses) -> dict:
    """The calls of the implementations whose loss is right on these inputs; the check is their warm-up."""
    expected = losses
    if case != "score":
        counts = inputs[2] != -100
        expected = ((1.0 if inputs[3] is None else inputs[3]) * losses)[counts].sum() / counts.sum()
    calls = {}
    for name in names:
        call = call_of(name, case, head, inputs)
        try:
            difference = 0.0 if name == "torch.mm" else float((call()[0].detach() - expected).abs().max())
        except (NotImplementedError, RuntimeError) as error:
            print(f"{name}: not timed: {str(error).splitlines()[0]}")
            continue
        if difference < harness.LOSS_GATE:
            calls[name] = call
        else:
            print(f"{name}: not timed: loss off by {difference:.2g}")
    return calls


def time_cases(
    cases: list[str], head: Head, names: list[str], repetitions: int, budget_s: float, memory: bool, csv: str
):
    """Time `names` in turn and write one row each to results/<csv>.csv; of further cases, the fused kernels only."""
    calls = {}
    losses = call_of("flow reference", "score", head, tensors(head, "score"))()[0]
    for case in cases:
        chosen = names if case == cases[0] else names[:1]
        right = right_calls(case, head, chosen, tensors(head, case), losses)
        calls |= {(case, name): call for name, call in right.items()}
    times = harness.interleave(calls, repetitions, budget_s)
    calls.clear()
    rows = []
    for (case, name), seconds in times.items():
        row = {
            "case": case, "head": head.name, "N": head.num_rows, "D": head.dim, "V": head.num_classes,
            "dtype": head.dtype, "implementation": name, **harness.summary(seconds),
        }  # fmt: skip
        if memory and name != "torch.mm":
            arguments = ["peak", "--case", case, "--head", head.name, "--rows", str(head.num_rows)]
            row["peak_MiB"] = harness.in_fresh_process([__file__, *arguments, "--implementation", name])
        row |= {"machine": harness.machine(), "command": COMMAND}
        rows.append(row)
        shown = ("case", "head", "implementation", "median_s", "min_s", "cpu_s", "peak_MiB", "repetitions")
        print({k: row[k] for k in shown if k in row}, flush=True)
        harness.update_csv(csv, rows, ("case", "head", "N", "dtype", "implementation"))


def peak(case: str, head: Head, name: str) -> None:
    """Print the peak memory in MiB above inputs and returned tensors."""
    call_of(name, case, warm := Head("warm", 64, 64, 512, head.softcap, head.dtype), tensors(warm, case))()
    inputs = tensors(head, case)

    def result_bytes(result):
        return sum(t.nbytes for t in result)

    print(round(harness.peak_above(call_of(name, case, head, inputs), result_bytes) / 2**20))


def accuracy(head: Head, names: list[str]) -> None:
    """Errors against fp64 of losses (largest, absolute) and gradients (relative, Frobenius), to results/accuracy.csv."""
    rows = []
    for kind, p in (("random", None), ("p=0.9", 0.9), ("p=0.99", 0.99), ("p=0.999", 0.999)):
        inputs = tensors(head, "train", p)
        wide = [t.detach().double() if t.is_floating_point() else t for t in inputs[:3]]
        scale = torch.full((head.num_rows,), 1 / head.num_rows, dtype=torch.float64)
        options = (None, None, -100, 0.0, head.softcap or 0.0, 0.0, 0)
        _, loss, *grads = reference.linear_cross_entropy_fwd_bwd(*wide, scale, *options, True, True, False)
        for name in names:
            try:
                with torch.no_grad():
                    losses = IMPLEMENTATIONS[name](*inputs, head.softcap, "none")
                actual = call_of(name, "train", head, inputs)()
            except (NotImplementedError, RuntimeError) as error:
                print(f"{name}: {str(error).splitlines()[0]}")
                continue
            errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual[1:], grads, strict=False)]
            row = {"rows": kind, "head": head.name, "N": head.num_rows, "implementation": name}
            row["loss_error"] = f"{float((losses.double() - loss).abs().max()):.1e}"
            row |= {"dinput_error": f"{errors[0]:.1e}", "dweight_error": f"{errors[1]:.1e}"}
            row |= {"machine": harness.machine(), "command": COMMAND}
            rows.append(row)
            print({k: v for k, v in row.items() if k not in ("machine", "command")}, flush=True)
        harness.update_csv("accuracy", rows, ("rows", "head", "implementation"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "sweep", "accuracy", "peak", "report", "quick"))
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--head", default="gemma-3-270m", help=", ".join(HEADS))
    parser.add_argument("--over", choices=tuple(SWEEPS), default="N")
    parser.add_argument("--rows", type=int, help="another N for the head")
    parser.add_argument("--implementation", action="append", choices=tuple(IMPLEMENTATIONS))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no repetition starts")
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    heads = HEADS | {head.name: head for heads in SWEEPS.values() for head in heads}
    head = heads[options.head]
    if options.rows:
        head = Head(head.name, options.rows, head.dim, head.num_classes, head.softcap, head.dtype)
    names = options.implementation or [n for n in IMPLEMENTATIONS if n != "flow reference"]
    cases = options.case or ["score"]
    if options.what == "time":
        time_cases(cases, head, names, options.repetitions, options.budget, not options.no_memory, "head")
    elif options.what == "sweep":
        for one in SWEEPS[options.over]:
            memory = options.over == "N" and not options.no_memory
            time_cases(cases, one, names, options.repetitions, options.budget / 4, memory, "sweep")
    elif options.what == "accuracy":
        accuracy(Head(head.name, options.rows or 64, head.dim, head.num_classes, head.softcap, head.dtype), names)
    elif options.what == "peak":
        peak(cases[0], head, names[0])
    elif options.what == "quick":
        few = ["flow cpu", "eager, fp32 logits", "compiled, fp32 logits", "torch.mm"]
        time_cases(["score"], HEADS["smollm2-135m"], few, 3, 20, True, "head")
        time_cases(["train", *CASES[2:]], HEADS["smollm2-135m"], few, 3, 30, True, "head")
        time_cases(["score"], HEADS["gemma-3-270m"], few, 3, 30, False, "head")
        accuracy(Head("smollm2-135m", 64, 576, 49152), few[:3])
    if options.what in ("report", "quick"):
        from report import write_report

        write_report()


if __name__ == "__main__":
    main()
