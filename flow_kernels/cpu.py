"""The compiled CPU backend: the operators of `flow_kernels.reference` by the C++ kernels of csrc/cpu.

fp32, bf16 and fp16 are compiled; fp64, which only tests of exactness use, runs the reference's eager code.
The kernels walk tiles of the vocabulary and hold no row of logits. What `chunk_size` bounds here is the memory of the
one-pass operator: the exponentials that it keeps for its gradients are those that fit in the memory of the weight's own
gradient, which is written after them, and beside it those of `chunk_size` rows (by default what fits in 204 MiB); the
others are made again by a fourth matrix product. bf16 keeps two bytes of each, or by default one where two do not fit
for all: the probabilities that are largest within a row's tile stay exact, the others within 2^-8 sqrt(largest / p).
Beside that, training holds N x D fp32 for the gradient of the input in each thread, which on many cores is the most of
it: 8192 rows of 4096 in 64 threads are 8 GiB. Forward-only calls take 1024 rows at a time, so their memory grows by
some 30 bytes a row only: in two threads Gemma 3's head takes 2.6 MiB for 1024 rows, 2.8 for 8192 and 3.4 for 32768.
With `grad_filter_eps` the products of the gradients are of those classes only that some row of the block (1024 rows)
needs; benchmarks/results/grad_filter.md has what is saved and lost on a real model.
Attention of packed rows goes by segments, and within them by blocks of 256 query rows.
"""

from __future__ import annotations

import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from flow_kernels import compiled, reference

HERE = Path(__file__).parent
REPORT = HERE / "build_report.txt"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "kernel_names", "cross_entropy_fwd", "cross_entropy_bwd", "cross_entropy_fwd_bwd", "cross_entropy_score",
    "linear_cross_entropy_fwd", "linear_cross_entropy_bwd", "linear_cross_entropy_fwd_bwd", "linear_cross_entropy_score",
    "packed_attention_fwd", "packed_attention_bwd",
)  # fmt: skip

_is_loaded = False


def library_path() -> Path | None:
    """The compiled file beside this one, or None in a pure-Python install."""
    found = [HERE / f"_cpu{suffix}" for suffix in (*EXTENSION_SUFFIXES, ".so", ".pyd")]
    return next((path for path in found if path.exists()), None)


def why_not() -> str | None:
    """The reason why the compiled kernels cannot serve, or None; loads them.

    Raises:
        ImportError: there is a compiled file and it does not load.
    """
    global _is_loaded
    if not _is_loaded:
        reason = compiled.load(
            library_path(),
            REPORT,
            namespace="flow_kernels_cpu",
            operators=OPERATORS,
            kernels="CPU kernels",
            how_to_build="in the sources, pip install --no-build-isolation -e . compiles them where a C++ compiler is",
            how_to_mend="they belong to the torch and the sources they were compiled with: "
            "build them again, in the sources, with pip install --no-build-isolation -e .",
        )
        if reason is not None:
            return reason
        _is_loaded = True
    return None if kernel_names(torch.float32) else "this CPU has no AVX2 (with FMA and F16C)"


def kernel_names(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels that can multiply `dtype` on this CPU, best first; the first is used. `why_not` has loaded them."""
    return _kernel_names(dtype, torch.backends.mkldnn.enabled)


@functools.cache
def _kernel_names(dtype: torch.dtype, has_mkldnn: bool) -> tuple[str, ...]:
    # A question about the machine, not a part of what a trace (torch.export) records.
    with _disable_current_modes():
        return tuple(torch.ops.flow_kernels_cpu.kernel_names(dtype))


def describe() -> str:
    """Which kernels serve which dtype here."""
    best = {str(dtype).removeprefix("torch."): kernel_names(dtype)[0] for dtype in DTYPES}
    return ", ".join(f"{dtype}: {name}" for dtype, name in best.items()) + ", float64: eager torch"


def _options(class_weight, *rest):
    return class_weight if class_weight is None else class_weight.contiguous(), *rest


def cross_entropy_fwd(logits, target, class_weight, ignore_index, label_smoothing, softcap, z_loss, kernels=""):
    """See `flow_kernels.reference`, also for the functions below."""
    options = _options(class_weight, ignore_index, label_smoothing, softcap, z_loss)
    if logits.dtype == torch.float64:
        return reference.cross_entropy_fwd(logits, target, *options)
    return torch.ops.flow_kernels_cpu.cross_entropy_fwd(logits, target, *options, kernels)


def cross_entropy_bwd(
    dloss, logits, target, lse, class_weight, ignore_index, label_smoothing, softcap, z_loss, kernels=""
):
    options = _options(class_weight, ignore_index, label_smoothing, softcap, z_loss)
    if logits.dtype == torch.float64:
        return reference.cross_entropy_bwd(dloss, logits, target, lse, *options)
    return torch.ops.flow_kernels_cpu.cross_entropy_bwd(dloss, logits, target, lse, *options, kernels)


def cross_entropy_fwd_bwd(
    logits, target, row_weight, class_weight, ignore_index, label_smoothing, softcap, z_loss, kernels=""
):
    options = _options(class_weight, ignore_index, label_smoothing, softcap, z_loss)
    if logits.dtype == torch.float64:
        return reference.cross_entropy_fwd_bwd(logits, target, row_weight, *options)
    loss, dlogits = torch.ops.flow_kernels_cpu.cross_entropy_fwd_bwd(logits, target, row_weight, *options, kernels)
    return (row_weight * loss).sum(), loss, dlogits


def cross_entropy_score(logits, target, ignore_index, softcap, kernels=""):
    if logits.dtype == torch.float64:
        return reference.cross_entropy_score(logits, target, ignore_index, softcap)
    return torch.ops.flow_kernels_cpu.cross_entropy_score(logits, target, ignore_index, softcap, kernels)


def linear_cross_entropy_fwd(
    input, linear_weight, target, linear_bias, class_weight, ignore_index, label_smoothing, softcap, z_loss, chunk_size,
    grad_filter_eps=0.0, kernels="",
):  # fmt: skip
    head = (input, linear_weight, target, linear_bias)
    options = _options(class_weight, ignore_index, label_smoothing, softcap, z_loss)
    if input.dtype == torch.float64:
        return reference.linear_cross_entropy_fwd(*head, *options, chunk_size)
    return torch.ops.flow_kernels_cpu.linear_cross_entropy_fwd(*head, *options, kernels)


def linear_cross_entropy_bwd(
    dloss, input, linear_weight, target, lse, linear_bias, class_weight, ignore_index, label_smoothing, softcap, z_loss,
    chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias, grad_filter_eps=0.0, kernels="",
):  # fmt: skip
    head = (dloss, input, linear_weight, target, lse, linear_bias)
    options = _options(class_weight, ignore_index, label_smoothing, softcap, z_loss)
    needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)
    if input.dtype == torch.float64:
        return reference.linear_cross_entropy_bwd(*head, *options, chunk_size, *needs)
    return torch.ops.flow_kernels_cpu.linear_cross_entropy_bwd(*head, *options, grad_filter_eps, *needs, kernels)


def linear_cross_entropy_fwd_bwd(
    input, linear_weight, target, row_weight, linear_bias, class_weight, ignore_index, label_smoothing, softcap, z_loss,
    chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias, grad_filter_eps=0.0, kernels="",
):  # fmt: skip
    head = (input, linear_weight, target, row_weight, linear_bias)
    options = _options(class_weight, ignore_index, label_smoothing, softcap, z_loss)
    needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)
    if input.dtype == torch.float64:
        return reference.linear_cross_entropy_fwd_bwd(*head, *options, chunk_size, *needs)
    loss, *grads = torch.ops.flow_kernels_cpu.linear_cross_entropy_fwd_bwd(
        *head, *options, chunk_size, grad_filter_eps, *needs, kernels
    )
    return (row_weight * loss).sum(), loss, *grads


def linear_cross_entropy_score(
    input, linear_weight, target, linear_bias, ignore_index, softcap, chunk_size, kernels=""
):  # fmt: skip
    head = (input, linear_weight, target, linear_bias)
    if input.dtype == torch.float64:
        return reference.linear_cross_entropy_score(*head, ignore_index, softcap, chunk_size)
    return torch.ops.flow_kernels_cpu.linear_cross_entropy_score(*head, ignore_index, softcap, kernels)


# A few thousand numbers a step: nothing to gain.
flow_weights = reference.flow_weights


def packed_attention_fwd(query, key, value, segments, scale, window, kernels=""):
    if query.dtype == torch.float64:
        return reference.packed_attention_fwd(query, key, value, segments, scale, window)
    return torch.ops.flow_kernels_cpu.packed_attention_fwd(query, key, value, segments, scale, window, kernels)


def packed_attention_bwd(dout, query, key, value, lse, segments, scale, window, kernels=""):
    if query.dtype == torch.float64:
        return reference.packed_attention_bwd(dout, query, key, value, lse, segments, scale, window)
    return torch.ops.flow_kernels_cpu.packed_attention_bwd(
        dout, query, key, value, lse, segments, scale, window, kernels
    )
