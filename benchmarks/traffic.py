"""Bytes that each Triton kernel reads and writes per logit, counted in Triton's interpreter.

    python benchmarks/traffic.py        into benchmarks/results/traffic.{csv,md}

Every masked load and store counts the elements that its mask lets through, so padding to a block costs nothing and a
second read of a row costs what it would cost a GPU without a cache. Liger's cross-entropy kernel, where `liger-kernel`
is installed, runs in the same process at its own launch parameters. The kernels' results are compared with the
reference first: traffic of a wrong kernel would mean nothing.
"""

from __future__ import annotations

import os

# Before triton is imported: it decides there between its compiler and its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.runtime.interpreter import InterpreterBuilder

sys.path.insert(0, str(Path(__file__).parent))
import harness

from flow_kernels import kernels, reference

COLUMNS = ("kernel", "dtype", "V", "read_per_logit", "written_per_logit", "total_per_logit")
PLAIN = (-100, 0.0, 0.0, 0.0)
NUM_ROWS = 2


@dataclass
class Traffic:
    """Bytes read and written so far."""

    read: int = 0
    written: int = 0


@contextlib.contextmanager
def count_traffic():
    """Count what interpreted kernels load and store inside the block."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        traffic.read += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        traffic.written += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def liger(logits: torch.Tensor, target: torch.Tensor, *, has_gradients: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient by Liger's kernel, which overwrites the logits."""
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    num_rows, num_classes = logits.shape
    loss = torch.zeros(num_rows)
    liger_cross_entropy_kernel[(num_rows,)](
        logits, logits.stride(0), target, 1, None, loss, None, 1, None, 0, None, 0, num_classes, num_rows, num_rows, 0.0,
        -100, lse_square_scale=0.0, label_smoothing=0.0, reduction="sum", softcap=None, RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, triton.next_power_of_2(num_classes)),
        HAS_WEIGHT=False, HAS_SOFTCAPPING=False, HAS_GRADIENTS=has_gradients,
    )  # fmt: skip
    return loss, logits


def measure(dtype: torch.dtype, num_classes: int) -> list[dict]:
    """One row of the table for each kernel."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, num_classes, generator=generator).to(dtype)
    target = torch.randint(0, num_classes, (NUM_ROWS,), generator=generator)
    weight = torch.ones(NUM_ROWS)
    _, exact, exact_gradient = reference.cross_entropy_fwd_bwd(logits.double(), target, weight.double(), None, *PLAIN)
    lse = torch.logsumexp(logits.float(), 1).double()
    runs = {
        "scoring (forward only)": lambda: kernels.cross_entropy_fwd(logits, target, None, *PLAIN)[:1],
        "training (loss and gradient)": lambda: kernels.cross_entropy_fwd_bwd(logits, target, weight, None, *PLAIN)[1:],
        "backward from lse": lambda: (exact, kernels.cross_entropy_bwd(weight, logits, target, lse, None, *PLAIN)),
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        runs["Liger, loss only"] = lambda: liger(logits.clone(), target, has_gradients=False)[:1]
        runs["Liger, loss and gradient"] = lambda: liger(logits.clone(), target, has_gradients=True)
    rows = []
    for name, run in runs.items():
        with count_traffic() as traffic:
            results = run()
        for result, expected in zip(results, (exact, exact_gradient), strict=False):
            torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-4)
        per_logit = [value / logits.numel() for value in (traffic.read, traffic.written)]
        numbers = (f"{value:.4f}" for value in (*per_logit, sum(per_logit)))
        rows.append(dict(zip(COLUMNS, (name, str(dtype).split(".")[-1], num_classes, *numbers), strict=True)))
        print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def main() -> int:
    rows = []
    for dtype, sizes in ((torch.bfloat16, (4096, 50257, 65536, 151936, 262144)), (torch.float32, (32768, 65536))):
        for num_classes in sizes:
            rows += measure(dtype, num_classes)
    # The program measures everything, so nothing of an earlier run stays.
    harness.update_csv("traffic", rows, COLUMNS[:3], gone=harness.read_csv("traffic"))
    lines = [
        "# Bytes per logit",
        "",
        f"`python benchmarks/traffic.py`, counted in the interpreter of triton {triton.__version__}; {NUM_ROWS} rows a run,",
        "so the scalars of a row weigh most at small V. No GPU was involved, and no cache is modelled.",
        "",
        harness.markdown(rows, list(COLUMNS)),
    ]
    (harness.RESULTS / "traffic.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
