"""Products of 16-bit factors that are added to an fp32 total without being rounded first."""

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
