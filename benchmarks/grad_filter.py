"""What `grad_filter_eps` saves and what it costs, on the hidden states of a real model and text.

    python benchmarks/grad_filter.py --model MODEL --rows 1024

One pass of training (loss, dinput, dweight) at every bound in turn in one process, with scoring alone beside them as
what the backward pass could save at most. Errors are relative Frobenius norms against fp64 arithmetic on the same bf16
hidden states and head. "classes kept" is the share of the vocabulary with a gradient. To results/grad_filter.csv and .md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import torch
from cases import relative_error
from end_to_end import load
from flow_finetune.data import collate
from flow_finetune.models import autocast
from torch import Tensor

from flow_kernels import linear_cross_entropy, reference

# Where bf16's own rounding is above, near and below what is left out.
BOUNDS = (0.0, 2.0**-20, 2.0**-16, 2.0**-12)
KEYS = ("model", "rows", "grad_filter_eps")


@torch.no_grad()
def real_head(model: str, data: str, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[num_rows, D]`, the head `[V, D]`, both bf16, and targets of answers to GSM8K's questions."""
    lm, samples = load(model, data, limit=64)
    if lm.softcap or lm.head.bias is not None:
        raise SystemExit(f"{model} has a soft-cap or a bias behind its head, which this program does not measure")
    hidden, targets = [], []
    for sample in samples:
        batch = collate([sample], 0)
        with autocast(torch.device("cpu"), "bf16"):
            hidden.append(lm.target_hidden(batch).bfloat16())
        targets.append(batch.target)
        if sum(map(len, targets)) >= num_rows:
            return torch.cat(hidden)[:num_rows], lm.head.weight.bfloat16(), torch.cat(targets)[:num_rows]
    raise SystemExit(f"{data} has fewer than {num_rows} target tokens in its first 64 samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--data", default="examples/data/gsm8k_train.jsonl.gz")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    hidden, weight, target = real_head(arguments.model, arguments.data, arguments.rows)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def train(bound):
        return torch.autograd.grad(linear_cross_entropy(*leaves, target, grad_filter_eps=bound), leaves)

    def score():
        with torch.no_grad():
            return linear_cross_entropy(*leaves, target)

    wide = [t.detach().double() for t in leaves]
    scale = torch.full((len(target),), 1 / len(target), dtype=torch.float64)
    exact = reference.linear_cross_entropy_fwd_bwd(
        *wide, target, scale, None, None, -100, 0.0, 0.0, 0.0, 0, True, True, False
    )
    del wide
    source = harness.provenance_of_model("grad_filter.py", arguments.model)
    about = {"model": Path(arguments.model).name, "rows": len(target), "D": weight.shape[1], "V": len(weight)}
    about["mean_loss"] = round(float(exact[0]), 3)
    rows = []
    for bound in BOUNDS:
        dinput, dweight = train(bound)
        rows.append(about | {
            "grad_filter_eps": f"{bound:.1e}",
            "classes_kept": f"{float((dweight != 0).any(1).double().mean()):.3f}",
            "dinput_error": f"{relative_error(dinput, exact[2]):.1e}",
            "dweight_error": f"{relative_error(dweight, exact[3]):.1e}",
        })  # fmt: skip
    del exact, dinput, dweight
    calls = {"score": score} | {bound: lambda bound=bound: train(bound) for bound in BOUNDS}
    score()
    seconds = harness.interleave(calls, arguments.repetitions, budget_s=400)
    summaries = {name: harness.summary(times) for name, times in seconds.items()}
    for row, bound in zip(rows, BOUNDS, strict=True):
        row |= summaries[bound] | {
            "speedup": round(summaries[0.0]["median_s"] / summaries[bound]["median_s"], 2),
            "score_s": summaries["score"]["median_s"],
        }  # fmt: skip
        print(row, flush=True)
    harness.update_csv("grad_filter", [row | source for row in rows], KEYS)
    write_report()


def write_report() -> None:
    """results/grad_filter.md from the CSV."""
    rows = harness.read_csv("grad_filter")
    columns = ["model", "mean_loss", "rows", "D", "V", "grad_filter_eps", "classes_kept", "dinput_error", "dweight_error",
               "median_s", "q1_s", "q3_s", "speedup", "score_s", "repetitions"]  # fmt: skip
    commands = sorted({f"Commit {r['commit']}: `{r['command']}` on {r['machine']}" for r in rows})
    text = [
        "# Leaving out classes with small gradients",
        "`grad_filter_eps` of `flow_kernels.linear_cross_entropy`, bf16, on the hidden states of real models for answers "
        "to GSM8K's questions: seconds of loss, dinput and dweight, medians in turn in one process; errors against fp64.",
        harness.markdown(rows, columns),
        *commands,
    ]
    (harness.RESULTS / "grad_filter.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
