"""The compiled CUDA backend: `cross_entropy` by the kernels of csrc/cuda, each logit read and written once.

It holds, for fp32, bf16 and fp16, the forward pass of given logits, the forward pass with gradient and, around the latter,
that of a linear head without a bias. The backward pass from a saved lse (`reduction="none"`, a head in fp16), scoring by a
linear head and fp64 are not among its operators. `auto` chooses it for training from compute capability 9.0 on, where it
has run (an H100), unless there is a soft-cap or the head has a bias: see `backends.CUDA_FIRST`.

Unlike the reference it does not look at the targets on the host, which would synchronise: a target outside
[0, V) that is not `ignore_index` gives NaN for the loss of its row, and for its gradient NaN or, under a linear head,
where the gradients of rows are summed, 0.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from flow_kernels import chunks, compiled

HERE = Path(__file__).parent
REPORT = HERE / "cuda_build_report.txt"
LIBRARY = HERE / "_cuda.so"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("cross_entropy_fwd", "cross_entropy_fwd_bwd", "linear_cross_entropy_fwd_bwd")
# cp.async, which every kernel uses, came with compute capability 8.0.
MIN_CAPABILITY = (8, 0)
# Column arithmetic is int32 and looks one unit and one block of 512 threads past the row (csrc/cuda/cross_entropy.cu).
MAX_CLASSES = 2**31 - 66 - 512

_is_loaded = False


def load() -> str | None:
    """Load the compiled kernels once; the reason why not, or None. They load into a torch without CUDA, too.

    Raises:
        ImportError: there is a compiled file and it does not load.
    """
    global _is_loaded
    if _is_loaded:
        return None
    reason = compiled.load(
        LIBRARY,
        REPORT,
        namespace="flow_kernels_cuda",
        operators=("cross_entropy_fwd", "cross_entropy_fwd_bwd", "cross_entropy_fwd_bwd_in_place", "load_error"),
        kernels="CUDA kernels",
        how_to_build="FLOW_KERNELS_BUILD=cuda pip install --no-build-isolation -e . compiles them where nvcc is",
        how_to_mend="they need torch 2.10 or newer: build them again",
    )
    if reason is not None:
        return reason
    _is_loaded = True
    return None


def why_not() -> str | None:
    """The reason why the CUDA kernels cannot serve this machine, or None; loads them."""
    reason = load()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA driver or GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name()} has compute capability {found}, the kernels need {needed}"
    return _why_no_code()


@functools.cache
def _why_no_code() -> str | None:
    """The reason why the compiled file has nothing that this machine's GPU can run, asked once; or None."""
    error = torch.ops.flow_kernels_cuda.load_error()
    if error == 0:
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return (
        f"the CUDA kernels were compiled for other GPUs than {torch.cuda.get_device_name()} or a newer driver (CUDA error "
        f"{error}): build them again with TORCH_CUDA_ARCH_LIST={capability} or without it"
    )


def _check(dtype: torch.dtype, num_classes: int) -> None:
    if dtype not in DTYPES:
        raise NotImplementedError(f"the cuda backend takes float32, bfloat16 and float16 logits, got {dtype}")
    if num_classes > MAX_CLASSES:
        raise ValueError(
            f"the CUDA kernels take rows of at most {MAX_CLASSES} logits, got {num_classes}; "
            "backend='reference' serves any length"
        )


def _unit_stride(tensor):
    return None if tensor is None else tensor.contiguous()


def _absent(operator: str):
    # Reached only by a call of the operator itself: `backends.resolve` refuses the losses' calls before anything is run.
    def absent(*_):
        raise NotImplementedError(f"the cuda backend has no {operator}; backend='auto' serves it by another one")

    return absent


def cross_entropy_fwd(logits, target, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """See `flow_kernels.reference`, also for the functions below."""
    _check(logits.dtype, logits.shape[1])
    return torch.ops.flow_kernels_cuda.cross_entropy_fwd(
        logits, target.contiguous(), _unit_stride(class_weight), ignore_index, label_smoothing, softcap, z_loss
    )


def cross_entropy_fwd_bwd(logits, target, row_weight, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    _check(logits.dtype, logits.shape[1])
    loss, dlogits = torch.ops.flow_kernels_cuda.cross_entropy_fwd_bwd(
        logits,
        target.contiguous(),
        row_weight.contiguous(),
        _unit_stride(class_weight),
        ignore_index,
        label_smoothing,
        softcap,
        z_loss,
    )
    return (row_weight * loss).sum(), loss, dlogits


def linear_cross_entropy_fwd_bwd(
    input, linear_weight, target, row_weight, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    _check(input.dtype, linear_weight.shape[0])
    if linear_bias is not None or need_dlinear_bias:
        raise NotImplementedError(
            "the cuda backend's linear head has no linear_bias; backend='auto' serves it by another"
        )
    options = (_unit_stride(class_weight), ignore_index, label_smoothing, softcap, z_loss)

    def write(logits, target, row_weight, loss, dlogits, end):
        torch.ops.flow_kernels_cuda.cross_entropy_fwd_bwd_in_place(logits, target, row_weight, loss, *options)

    needs = (need_dinput, need_dlinear_weight, False)
    return chunks.fwd_bwd(
        write, input, linear_weight, target, row_weight, None, ignore_index, chunk_size, needs, pads=False
    )


cross_entropy_bwd = _absent("backward pass from a saved lse")
linear_cross_entropy_fwd = _absent("scoring by a linear head")
linear_cross_entropy_bwd = _absent("backward pass of a linear head from a saved lse")
cross_entropy_score = linear_cross_entropy_score = _absent("entropy")
flow_weights = _absent("sample weights")
