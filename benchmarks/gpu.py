"""Speed of the losses on this machine's GPU, of given logits and of a linear head, beside what a copy and a matmul do.

    python benchmarks/gpu.py                                   every case, into benchmarks/results/gpu.csv
    python benchmarks/gpu.py --case train --shape 4096x65536   one case of one shape
    python benchmarks/gpu.py --require                         exit code 2 and the reason where there is no GPU to measure

Every implementation's losses and gradients are compared with the reference in fp32 first; one that is wrong is not
timed, and the errors stand beside the speed. Then it runs between CUDA events, with the L2 cache overwritten before
every run, and the median counts. GB/s is of the bytes that must move (a logit read, and its gradient written when
training), TFLOP/s of the products that must be made (2 N V D to score, 6 N V D to train, 4 N V D with a frozen head;
half of the rows ignored count as all), both also in per cent of what a copy and a bf16 product reach on the same device
in the same run. Peak memory is of a warm call, above the inputs, gradients that are returned included. Baselines that
are not installed are named and left out.

No result of this program is committed: no GPU has been at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import harness
from cases import AUTOCAST, CASES, relative_error

import flow_kernels

DEVICE = "cuda"
# Given logits are the same numbers for everyone; a head's are rounded to 16 bits by most.
GIVEN_LOSS_GATE = 1e-3
KEYS = ("device", "case", "N", "D", "V", "softcap", "dtype", "implementation")


@dataclass(frozen=True)
class Shape:
    """N rows, V vocabulary, D hidden (0: the logits are given)."""

    num_rows: int
    num_classes: int
    dim: int = 0
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """N x V, or N x V x D."""
        cap = f"softcap{self.softcap:g}" if self.softcap and not self.dim else ""
        return "x".join(str(n) for n in (self.num_rows, self.num_classes, self.dim, cap) if n)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def work(self, case: str) -> tuple[float, float]:
        """`(bytes, flops)` that must move and be made, whoever does it."""
        logits = self.num_rows * self.num_classes
        passes = 1 if case == "score" else 2
        products = {"score": 1, "train frozen head": 2}.get(case, 3)
        if not self.dim:
            return logits * self.dtype.itemsize * passes, 0.0
        operands = (self.num_rows + self.num_classes) * self.dim
        return operands * self.dtype.itemsize * passes, 2.0 * logits * self.dim * products


# One pass while a row fits in registers, the longest such row, and real vocabularies above it; then heads.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(8192, 32768), Shape(4096, 65536), Shape(4096, 128256), Shape(4096, 151936), Shape(2048, 262144),
        Shape(2048, 256000, softcap=30.0),
        Shape(8192, 49152, 576), Shape(8192, 262144, 640), Shape(8192, 256000, 2304, 30.0), Shape(8192, 151936, 1024),
        Shape(8192, 128256, 4096),
    )
}  # fmt: skip


def rates(shape: Shape, case: str, seconds: float, copy_gb_s: float, matmul_tflop_s: float) -> dict[str, float]:
    """GB/s, TFLOP/s and their per cent of the device's copy and matmul."""
    moved, made = shape.work(case)
    gb_s, tflop_s = moved / seconds / 1e9, made / seconds / 1e12
    return {
        "GB_s": round(gb_s, 1), "percent_of_copy": round(100 * gb_s / copy_gb_s, 1),
        "TFLOP_s": round(tflop_s, 2), "percent_of_matmul": round(100 * tflop_s / matmul_tflop_s, 1),
    }  # fmt: skip


def _weighted(loss, sample_weight):
    return loss if sample_weight is None else (sample_weight * loss).sum() / loss.numel()


def _flow(backend):
    def loss(shape, tensors, target, sample_weight, reduction):
        function = flow_kernels.linear_cross_entropy if shape.dim else flow_kernels.cross_entropy
        return function(
            *tensors, target, sample_weight=sample_weight, softcap=shape.softcap, reduction=reduction, backend=backend
        )

    return loss


def _eager(shape, tensors, target, sample_weight, reduction):
    """What transformers does: 16-bit logits, widened as a whole."""
    logits = (F.linear(*tensors) if shape.dim else tensors[0]).float()
    logits = logits if shape.softcap is None else shape.softcap * torch.tanh(logits / shape.softcap)
    loss = F.cross_entropy(logits, target, reduction="none" if sample_weight is not None else reduction)
    return _weighted(loss, sample_weight)


def _liger(shape, tensors, target, sample_weight, reduction):
    """Its kernel overwrites the logits it is given when training: `call_of` restores them before the clock starts."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

    reduction = "none" if sample_weight is not None else reduction
    if shape.dim:
        module = LigerFusedLinearCrossEntropyLoss(reduction=reduction, softcap=shape.softcap)
        loss = module(tensors[1], tensors[0], target)
    else:
        loss = LigerCrossEntropyLoss(reduction=reduction, softcap=shape.softcap)(tensors[0], target)
    return _weighted(loss, sample_weight)


def _cut_cross_entropy(shape, tensors, target, sample_weight, reduction):
    from cut_cross_entropy import linear_cross_entropy

    reduction = "none" if sample_weight is not None else reduction
    return _weighted(linear_cross_entropy(*tensors, target, reduction=reduction, softcap=shape.softcap), sample_weight)


def _quack(shape, tensors, target, sample_weight, reduction):
    from quack.cross_entropy import cross_entropy

    reduction = "none" if sample_weight is not None else reduction
    return _weighted(cross_entropy(tensors[0], target, reduction=reduction), sample_weight)


# Name: function, the package it needs, and whether it takes given logits and a head.
IMPLEMENTATIONS = {
    "flow triton": (_flow("triton"), "triton", (True, True)),
    "flow cuda": (_flow("cuda"), "torch", (True, True)),
    "torch, fp32 logits": (_eager, "torch", (True, True)),
    # implementations.py, which cases.py imports, lets it compile for as many shapes as there are.
    "torch.compile, fp32 logits": (torch.compile(_eager, dynamic=False), "torch", (True, True)),
    "liger": (_liger, "liger_kernel", (True, True)),
    "cut-cross-entropy": (_cut_cross_entropy, "cut_cross_entropy", (False, True)),
    "quack": (_quack, "quack", (True, False)),
}


def why_not() -> str | None:
    """What is missing for a measurement on this machine, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA and ROCm; name another, local version "
            "included, with its index in PIP_EXTRA_INDEX_URL: make setup TORCH=torch==2.13.0+cu130"
        )
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, or no usable driver"
    return None


def names_for(shape: Shape) -> list[str]:
    """The implementations that serve a shape, whether they are installed or not."""
    return [name for name, (_, _, takes) in IMPLEMENTATIONS.items() if takes[bool(shape.dim)]]


def problem(shape: Shape, case: str):
    """`(tensors, target, sample_weight)` on the GPU; the tensors train unless the case only scores."""
    torch.manual_seed(0)
    sizes = (
        [(shape.num_rows, shape.dim), (shape.num_classes, shape.dim)]
        if shape.dim
        else [(shape.num_rows, shape.num_classes)]
    )
    tensors = [torch.randn(size, device=DEVICE, dtype=shape.dtype) for size in sizes]
    if shape.dim:
        tensors[1] /= shape.dim**0.5
    if case == AUTOCAST:
        tensors[1] = tensors[1].float()
    target = torch.randint(shape.num_classes, (shape.num_rows,), device=DEVICE)
    if case == "train half ignored":
        target[torch.randperm(shape.num_rows, device=DEVICE)[: shape.num_rows // 2]] = -100
    weight = torch.rand(shape.num_rows, device=DEVICE) + 0.1 if case == "train weighted" else None
    trained = tensors[:1] if case == "train frozen head" else tensors if case != "score" else []
    for tensor in trained:
        tensor.requires_grad_()
    return tensors, target, weight


def call_of(name: str, shape: Shape, case: str, inputs):
    """A function without arguments: the losses, or the loss and its gradients."""
    function, (tensors, target, weight) = IMPLEMENTATIONS[name][0], inputs

    def call():
        if case == "score":
            with torch.no_grad():
                return (function(shape, tensors, target, None, "none"),)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case == AUTOCAST):
            loss = function(shape, tensors, target, weight, "mean")
        return (loss, *torch.autograd.grad(loss, [t for t in tensors if t.requires_grad]))

    if name == "liger" and not shape.dim and case != "score":
        original = tensors[0].detach().clone()

        @torch.no_grad()
        def restore():
            tensors[0].copy_(original)

        call.prepare = restore
    return call


def expected(shape: Shape, case: str, inputs) -> tuple[torch.Tensor, ...]:
    """The reference's losses in fp32, or their weighted mean and its gradients."""
    tensors, target, weight = inputs
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in tensors]
    loss = _flow("reference")(shape, wide, target, weight, "none" if case == "score" else "mean")
    trained = [t for t in wide if t.requires_grad]
    return (loss.detach(), *(torch.autograd.grad(loss, trained) if trained else ()))


def errors(shape: Shape, result, wanted) -> tuple[str | None, dict[str, float]]:
    """Why a result is not to be timed, or None; and its largest loss error and relative gradient error."""
    loss_error = float((result[0].detach().float() - wanted[0]).abs().max())
    gradient_errors = [relative_error(a.float(), e) for a, e in zip(result[1:], wanted[1:], strict=True)]
    found = {
        "loss_error": float(f"{loss_error:.2g}"),
        "gradient_error": float(f"{max(gradient_errors, default=0):.2g}"),
    }
    # Liger gives losses in the dtype of the logits: rounded to bf16 one of 11 is off by 0.03.
    is_exact = not shape.dim and result[0].dtype == torch.float32
    if not loss_error < (GIVEN_LOSS_GATE if is_exact else harness.LOSS_GATES[shape.dtype_name]):
        return f"loss off by {loss_error:.2g}", found
    worst = [error for error in gradient_errors if not error < harness.GRADIENT_GATES[shape.dtype_name]]
    return (f"a gradient off by {worst[0]:.2g} of its norm" if worst else None), found


# About two milliseconds of any GPU's clock; the host of an H100 took 0.6 to 1.2 for a call with its gradient. (It was one
# in the runs of benchmarks/results/gpu.csv.)
_HOST_AHEAD_CYCLES = 4_000_000


class Timer:
    """Median seconds between CUDA events, with the L2 cache overwritten before every run."""

    def __init__(self, repetitions: int) -> None:
        self.repetitions = repetitions
        size = 2 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 128 * 2**20)
        self.flush = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def __call__(self, call) -> float:
        prepare = getattr(call, "prepare", lambda: None)
        for _ in range(3):
            prepare()
            call()
        pairs = []
        for _ in range(self.repetitions):
            prepare()
            self.flush.zero_()
            # While the device is busy here the host makes its launches ready, or short calls would be timed at its pace.
            torch.cuda._sleep(_HOST_AHEAD_CYCLES)
            pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            pairs[-1][0].record()
            call()
            pairs[-1][1].record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def device_rates(timer: Timer) -> tuple[float, float]:
    """`(GB/s of a copy, TFLOP/s of a bf16 matmul)` of this device."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / timer(lambda: target.copy_(source)) / 1e9
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return copy, 2 * 8192**3 / timer(lambda: a @ b) / 1e12


def first_result(call) -> tuple[tuple[torch.Tensor, ...], int]:
    """What a call returns, and its peak memory in bytes above what is there before it.

    It is the second call: the first one compiles, and what the compiler allocates is not the loss's.
    """
    prepare = getattr(call, "prepare", lambda: None)
    prepare()
    call()
    prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return result, torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, case: str, names: list[str], timer: Timer, copy: float, matmul: float) -> list[dict]:
    """One row for each implementation that is installed and right."""
    rows = []
    wanted = None
    for name in names:
        if importlib.util.find_spec(IMPLEMENTATIONS[name][1]) is None:
            print(f"{name}: not timed: {IMPLEMENTATIONS[name][1]} is not installed")
            continue
        try:
            if wanted is None:
                wanted = expected(shape, case, problem(shape, case))
            call = call_of(name, shape, case, problem(shape, case))
            result, peak = first_result(call)
            wrong, found = errors(shape, result, wanted)
            del result
            if wrong:
                print(f"{name}: not timed: {wrong}")
                continue
            seconds = timer(call)
        except Exception as error:  # a compiler's, a library's of another version: the others are timed all the same
            print(f"{name}: not timed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        row = {"device": torch.cuda.get_device_name(), "case": case, "N": shape.num_rows, "D": shape.dim}
        row |= {
            "V": shape.num_classes,
            "softcap": shape.softcap or "",
            "dtype": shape.dtype_name,
            "implementation": name,
        }
        row |= {"ms": round(1e3 * seconds, 4), **rates(shape, case, seconds, copy, matmul), **found}
        row["peak_MiB"] = round(peak / 2**20, 1)
        row |= {"copy_GB_s": round(copy, 1), "matmul_TFLOP_s": round(matmul, 1), "torch": torch.__version__}
        print(row, flush=True)
        rows.append(row | harness.provenance("gpu.py") | {"commit": harness.commit((*harness.MEASURING, "gpu"))})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=(*CASES, AUTOCAST))
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES))
    parser.add_argument("--implementation", action="append", choices=tuple(IMPLEMENTATIONS))
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--require", action="store_true", help="measure nothing; only say whether it could be done")
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"DEVICE=cuda needs a GPU: {reason}", file=sys.stderr)
        return 2
    if options.require:
        return 0
    timer = Timer(options.repetitions)
    copy, matmul = device_rates(timer)
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s", flush=True)
    for shape in [SHAPES[name] for name in options.shape or SHAPES]:
        for case in [c for c in options.case or CASES if shape.dim or c not in ("train frozen head", AUTOCAST)]:
            names = [n for n in names_for(shape) if n in (options.implementation or IMPLEMENTATIONS)]
            if rows := measure(shape, case, names, timer, copy, matmul):
                harness.update_csv("gpu", rows, KEYS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
