"""The one table of launch configurations, by kernel, element size and vocabulary class; nothing is tuned at a call.

BLOCK_V columns are worked on by `threads` threads at a time. Every thread handles whole 16-byte groups, so BLOCK_V is
a multiple of `threads * 16 / element size`. `benchmarks/gpu_static.py` compiles every entry for every target and shows
registers and spills; `benchmarks/results/gpu_static.md` is its last output.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A row of 128 KiB is half of a multiprocessor's register file: what one block can keep while it works on it.
ONE_PASS_ROW_BYTES = 128 * 2**10

# Columns are int32 in the kernels; the last block must not run over.
MAX_CLASSES = 2**31 - 2**17


@dataclass(frozen=True)
class Config:
    """`BLOCK_V` columns at a time by `threads` threads."""

    BLOCK_V: int
    threads: int

    def num_warps(self, warp_size: int) -> int:
        """Triton counts warps, whose size differs between vendors."""
        return self.threads // warp_size


# One pass over a row that stays in registers: {element size: {largest V: configuration}}. 32 to 64 logits a thread for
# long rows, because more threads than 1024 cannot share a row.
ONE_PASS = {
    2: {
        1024: Config(1024, 128),
        2048: Config(2048, 128),
        4096: Config(4096, 256),
        8192: Config(8192, 256),
        16384: Config(16384, 512),
        32768: Config(32768, 1024),
        65536: Config(65536, 1024),
    },
    4: {
        1024: Config(1024, 128),
        2048: Config(2048, 128),
        4096: Config(4096, 256),
        8192: Config(8192, 256),
        16384: Config(16384, 512),
        32768: Config(32768, 1024),
    },
}

# Rows walked block by block. Four 16-byte loads in flight a thread, 64 KiB a multiprocessor at four blocks of 256
# threads: bandwidth times latency of an H100 is 20 KiB. Short rows take a smaller block so that fewer lanes idle.
WALK = {
    2: {2048: Config(2048, 128), MAX_CLASSES: Config(8192, 256)},
    4: {1024: Config(1024, 128), MAX_CLASSES: Config(4096, 256)},
}

# One block of one row each: no reduction, so only enough work to pay for the row's four scalars.
ELEMENTWISE = {
    2: {2048: Config(2048, 128), MAX_CLASSES: Config(8192, 256)},
    4: {1024: Config(1024, 128), MAX_CLASSES: Config(4096, 256)},
}


def lookup(table: dict, dtype: torch.dtype, num_classes: int) -> Config | None:
    """The entry of `table` for the smallest class that holds `num_classes`; None where there is none."""
    return next((config for largest, config in table[dtype.itemsize].items() if num_classes <= largest), None)


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads a warp on `device`; 32 under the interpreter."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
