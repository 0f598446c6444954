"""The upstream gradient times a gradient that was made in the forward pass, in place, in one launch.

The factor is nearly always 1 (`loss.backward()`), where nothing is to be done, but only the GPU knows it: the host would
have to wait. Each program looks at the factor and, where it is 1, reads and writes nothing else: as many programs as
there are multiprocessors to fill, and not 4 bytes a logit of memory traffic in 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 bytes a thread in 16 bits. Programs walk over the blocks, so that a factor of 1 costs few of them.
BLOCK = 2048
NUM_WARPS = 8
MAX_PROGRAMS = 2048


@triton.jit
def scale_kernel(values_ptr, factor_ptr, num_elements, BLOCK: tl.constexpr):
    """values *= factor, rounded once; nothing where the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        lanes = tl.arange(0, BLOCK)
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, num_elements, tl.num_programs(0).to(tl.int64) * BLOCK):
            mask = start + lanes < num_elements
            value = tl.load(values_ptr + start + lanes, mask=mask).to(tl.float32)
            tl.store(values_ptr + start + lanes, (value * factor).to(values_ptr.dtype.element_ty), mask=mask)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values.mul_(factor)` of contiguous `values` and a 0-d `factor` on their device, without a synchronisation."""
    if values.numel():
        grid = (min(triton.cdiv(values.numel(), BLOCK), MAX_PROGRAMS),)
        with torch.cuda.device_of(values):
            scale_kernel[grid](values, factor, values.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return values
