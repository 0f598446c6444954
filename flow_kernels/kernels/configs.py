"""The one table of launch configurations, by kernel, element size and vocabulary class; nothing is tuned at a call.

`threads` threads work on `block_v` columns at a time, every thread on whole 16-byte groups, so `block_v` is a multiple
of `threads * 16 / element size`. `benchmarks/gpu_static.py` compiles every entry for every target and shows registers
and spills; `benchmarks/results/gpu_static.md` is its last output.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Columns are int32 in the kernels; the last block must not run over.
MAX_CLASSES = 2**31 - 2**17
# CUDA's limit of a grid's second dimension, along which the backward pass has its column blocks.
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Config:
    """`block_v` columns at a time by `threads` threads.

    `num_blocks` of them make a row that is kept in registers. In a row that is walked a thread reduces its `depth` groups
    of 16 bytes of a block together. `max_registers` a thread let that many more rows share a multiprocessor (CUDA only).
    """

    block_v: int
    threads: int
    num_blocks: int = 0
    depth: int = 0
    max_registers: int = 0

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time sizes."""
        sizes = {"BLOCK_V": self.block_v, "NUM_BLOCKS": self.num_blocks, "DEPTH": self.depth}
        return {name: size for name, size in sizes.items() if size}

    def num_warps(self, warp_size: int) -> int:
        """Triton counts warps, whose size differs between vendors."""
        return self.threads // warp_size

    def compiler_options(self, warp_size: int, is_cuda: bool) -> dict[str, int | bool]:
        """What Triton's compiler is told beside the constants. AMD's has no limit of registers."""
        limit = {"maxnreg": self.max_registers} if self.max_registers and is_cuda else {}
        return {"num_warps": self.num_warps(warp_size), "enable_fp_fusion": True, **limit}


# Rows that stay in registers: {element size: {largest V: configuration}}. A row of 128 KiB is half of a
# multiprocessor's register file, the most that one block can keep while it works on it. One group a thread and block:
# the compiler then widens one block at a time to fp32. 512 threads with up to 128 registers spend fewer of them on
# addresses and scalars than 1024 with 64. Shorter rows must share a multiprocessor, so that one is read while another is
# written: left to itself the compiler took 146 registers at V = 32768, one row a multiprocessor, and reached 73 % of a
# copy's bandwidth on an H100, and 99 % with the limit; at 16384 94 and 99 %; at 8192 91 % with 256 threads, 99 % with 128.
ONE_PASS = {
    2: {
        1024: Config(1024, 128, 1),
        2048: Config(1024, 128, 2),
        4096: Config(1024, 128, 4),
        8192: Config(1024, 128, 8),
        16384: Config(1024, 128, 16, max_registers=128),
        32768: Config(2048, 256, 16, max_registers=128),
        65536: Config(4096, 512, 16),
    },
    4: {
        1024: Config(512, 128, 2),
        2048: Config(512, 128, 4),
        4096: Config(512, 128, 8),
        8192: Config(1024, 256, 8, max_registers=64),
        16384: Config(1024, 256, 16, max_registers=128),
        32768: Config(2048, 512, 16),
    },
}

# Rows that are not aligned to 16 bytes are loaded an element at a time, and a 16-bit element then takes a register as a
# 32-bit one does: longer rows would spill.
ONE_PASS_UNALIGNED = {
    2: {
        1024: Config(1024, 128, 1),
        2048: Config(1024, 128, 2),
        4096: Config(2048, 256, 2),
        8192: Config(2048, 256, 4),
        16384: Config(4096, 512, 4),
    },
    4: ONE_PASS[4],
}

# Soft-cap, smoothing, class weights and a bias take registers of their own; longer rows would spill.
ONE_PASS_ROW_BYTES_WITH_OPTIONS = 32 * 2**10

# Rows walked block by block; shorter rows take a smaller block so that fewer lanes idle. Per cent of a copy's bandwidth
# when scoring bf16 on an H100, by columns a block, threads and depth:
#
#     V                 4096   8192   32768   131072
#     2048, 128, 2        81     94               93
#     4096, 256, 2        51     76      98       97
#     8192, 256, 4        28     52      88       93
WALK = {
    2: {2048: Config(1024, 128, depth=1), 16384: Config(2048, 128, depth=2), MAX_CLASSES: Config(4096, 256, depth=2)},
    4: {1024: Config(512, 128, depth=1), 8192: Config(1024, 128, depth=2), MAX_CLASSES: Config(4096, 256, depth=4)},
}

# One block of one row each: no reduction, only enough work to pay for reading the row's scalars.
ELEMENTWISE = {
    2: {2048: Config(2048, 128), MAX_CLASSES: Config(8192, 256)},
    4: {1024: Config(1024, 128), MAX_CLASSES: Config(4096, 256)},
}


def lookup(table: dict, dtype: torch.dtype, num_classes: int) -> Config | None:
    """The entry of `table` for the smallest class that holds `num_classes`; None where there is none."""
    return next((config for largest, config in table[dtype.itemsize].items() if num_classes <= largest), None)


def one_pass(dtype: torch.dtype, num_classes: int, has_options: bool, is_aligned: bool) -> Config | None:
    """The configuration that keeps a row in registers, None where it does not fit."""
    if has_options and num_classes * dtype.itemsize > ONE_PASS_ROW_BYTES_WITH_OPTIONS:
        return None
    config = lookup(ONE_PASS if is_aligned else ONE_PASS_UNALIGNED, dtype, num_classes)
    # Options and single elements need more registers than the limit leaves.
    return replace(config, max_registers=0) if config and (has_options or not is_aligned) else config


def walk(dtype: torch.dtype, num_classes: int, has_all_options: bool) -> Config:
    """The configuration that walks a row. In 16 bits with smoothing and soft-cap two groups at a time would spill."""
    config = lookup(WALK, dtype, num_classes)
    return replace(config, depth=1) if has_all_options and dtype.itemsize == 2 else config


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads a warp on `device`; 32 under the interpreter."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
