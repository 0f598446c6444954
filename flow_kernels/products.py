"""Products of 16-bit factors whose sums are not rounded on the way: added to an fp32 total, or rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def takes_out_dtype(tensor: Tensor) -> bool:
    """Whether `torch.addmm` adds a product of 16-bit factors to fp32 without rounding it: CUDA, and not ROCm.

    ROCm builds register the overload too and have been reported to refuse it when it is called.
    """
    return tensor.is_cuda and torch.version.hip is None and "dtype_out" in torch.ops.aten.addmm.overloads()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in the dtype of `total`, fp32 or wider than the factors'.

    Where torch cannot do it with 16-bit factors they are widened: slower, but a total of many products is no worse than
    one of few.
    """
    if a.dtype != total.dtype and takes_out_dtype(a):
        try:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
            return
        except RuntimeError:
            # Refused for this GPU or these dtypes. The reference takes this way by default, and no GPU has tried it.
            pass
    total.addmm_(a.to(total.dtype), b.to(total.dtype))


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the factors' dtype, rounded once.

    A product with few rows and columns of many terms each is split, and torch allows 16-bit partial sums of the parts by
    default; so where it can sum in fp32 the rounding is done here.
    """
    if a.dtype not in (torch.bfloat16, torch.float16) or not takes_out_dtype(a):
        return a @ b
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    add_product(total, a, b)
    return total.to(a.dtype)
