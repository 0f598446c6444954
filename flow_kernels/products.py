"""Products of 16-bit factors whose sums are not rounded on the way: added to an fp32 total, or rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def takes_out_dtype(tensor: Tensor) -> bool:
    """Whether `torch.mm` and `torch.addmm` give an fp32 product of 16-bit factors: CUDA from torch 2.8, and not ROCm.

    ROCm builds register the overloads too and have been reported to refuse them when they are called.
    """
    return tensor.is_cuda and torch.version.hip is None and "dtype_out" in torch.ops.aten.addmm.overloads()


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`, fp32 or wider than the factors'.

    Where torch cannot do it with 16-bit factors they are widened: slower, but a total of many products is no worse than
    one of few.
    """
    if a.dtype != dtype and takes_out_dtype(a):
        try:
            return torch.mm(a, b, out_dtype=dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # refused for this GPU or these dtypes
    return a.to(dtype) @ b.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += wide_product(a, b, total.dtype)`, in place and without another matrix of its size where torch can."""
    if a.dtype != total.dtype and takes_out_dtype(a):
        try:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
            return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # refused for this GPU or these dtypes
    total.addmm_(a.to(total.dtype), b.to(total.dtype))


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the factors' dtype, rounded once.

    A product with few rows and columns of many terms each is split, and torch allows 16-bit partial sums of the parts by
    default; so where it can sum in fp32 the rounding is done here.
    """
    if a.dtype not in (torch.bfloat16, torch.float16) or not takes_out_dtype(a):
        return a @ b
    return wide_product(a, b, torch.float32).to(a.dtype)
