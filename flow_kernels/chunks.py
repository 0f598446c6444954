"""A linear head on a GPU: chunks of rows, the vendor's matmul, and a row kernel on the chunk's logits.

N rows, V vocabulary entries, D hidden, R rows a chunk. Only one [R, V] buffer of logits exists; it is ours, so a row kernel
may write the gradient over it (in 16 bits, where a bias trains, by way of up to 128 MiB of fp32). Matrix products of
2 N V D flops each:

    a forward pass                       1, nothing is stored
    a forward pass with gradients        3, the row weights being known: logits, dinput, dlinear_weight
    a backward pass from a saved lse     3, the logits made again and the upstream gradient folded in before the products

`dlinear_weight` is accumulated over chunks in fp32 and rounded once, so its error does not grow with their number.
An fp32 `linear_weight` beside a 16-bit input is rounded to its dtype first; its gradient is then not rounded.
Skipping ignored rows in the matmul would need their number on the host, a synchronisation; they cost their flops, and
the row kernel writes zeros for them. Where a dropped row could reach a sum over rows (0 * NaN), it is selected away.
`grad_filter_eps` saves nothing here: the products are the vendor's, of whole chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flow_kernels.products import add_product, rounded_product, wide_product
from flow_kernels.reference import head_to_multiply

# Rows that start and end at multiples of so many elements are accessed 16 bytes at a time; Triton looks for no other.
ROW_ALIGNMENT = 16
# Rows of logits held at a time. Each chunk reads `linear_weight` once more, and training also reads and writes the fp32
# sum of its gradient (R / 4 flops a byte for R rows, whatever D is, where an H100 makes 260 in the time of a byte).
# Measured there (8192 rows, bf16, milliseconds) when each chunk still added to the sum, the first to zeros:
#
#     rows                        256    512   1024   2048   4096   8192
#     train, V 262144, D 640     39.2   26.1   19.7   17.9   17.7   17.0
#     train, V 151936, D 1024    33.1   21.0   16.0   14.3   14.5   14.0
#     train, V 128256, D 4096    97.6   61.1   47.3   42.1   41.7   40.6
#     score, V 262144, D 640      7.5    6.5    5.9    6.2    6.0    5.9
SCORING_ROWS, TRAINING_ROWS = 1024, 2048
# A short vocabulary takes more rows: V 49152, D 576 train in 3.2 ms by 2048 of them, in 2.9 by 4096.
WANTED_BUFFER_BYTES = 512 * 2**20
# The most that the buffer takes, by the memory of the device: a 64th of it between these two.
LIMITS = (256 * 2**20, 2**30)
MEMORY_SHARE = 64
ROW_STEP = 256
# Where the gradient of a bias is wanted, this much of the logits' gradient is held in fp32.
WIDE_BUFFER_BYTES = 128 * 2**20


def padded(length: int) -> int:
    """The next multiple of `ROW_ALIGNMENT`."""
    return -(-length // ROW_ALIGNMENT) * ROW_ALIGNMENT


def buffer_limit(device: torch.device) -> int:
    """Bytes that the logits may take on `device`."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return min(max(memory // MEMORY_SHARE, LIMITS[0]), LIMITS[1])


def default_chunk_size(num_rows: int, num_classes: int, itemsize: int, wanted_rows: int, limit: int) -> int:
    """Rows of logits held at a time when `chunk_size` is 0: `wanted_rows` or more in `limit` bytes, in equal chunks."""
    row_bytes = itemsize * max(num_classes, 1)
    most = min(max(wanted_rows, WANTED_BUFFER_BYTES // row_bytes), limit // row_bytes)
    most = max(ROW_STEP, most // ROW_STEP * ROW_STEP)
    num_chunks = -(-num_rows // most)
    return min(most, -(-num_rows // max(num_chunks, 1) // ROW_STEP) * ROW_STEP or most)


class Chunks:
    """One buffer of logits, filled chunk by chunk; where it `pads`, with -inf between V and the next multiple of 16."""

    def __init__(
        self, input: Tensor, linear_weight: Tensor, chunk_size: int, wanted_rows: int, pads: bool = True
    ) -> None:
        num_rows, num_classes = input.shape[0], linear_weight.shape[0]
        self.input, self.linear_weight = input, head_to_multiply(input, linear_weight)
        if not chunk_size:
            chunk_size = default_chunk_size(
                num_rows, num_classes, input.element_size(), wanted_rows, buffer_limit(input.device)
            )
        self.size = min(chunk_size, max(num_rows, 1))
        # Rows that start at multiples of 16 elements: the fast path of cuBLAS, and 16-byte accesses in the row kernel, which
        # may read -inf between V and the end, if there is an end, and write there what it likes.
        self.end = padded(num_classes) if pads and num_classes % ROW_ALIGNMENT else None
        self.buffer, self.rest = input.new_empty(self.size, padded(num_classes)).tensor_split([num_classes], dim=1)

    def __iter__(self):
        """`(rows, logits)`, the rows as a slice and their logits in the buffer."""
        for start in range(0, self.input.shape[0], self.size):
            rows = slice(start, min(start + self.size, self.input.shape[0]))
            logits = self.buffer[: rows.stop - rows.start]
            torch.mm(self.input[rows], self.linear_weight.T, out=logits)
            if self.end:
                self.rest.fill_(-math.inf)
            yield rows, logits


class HeadGradients:
    """The gradients of the head that were asked for; an empty tensor stands for the others.

    `linear_weight` is the one that was given; `self.linear_weight`, of the input's dtype, is the one to multiply with.
    """

    def __init__(self, input, linear_weight, linear_bias, keep, needs) -> None:
        self.input, self.linear_weight, self.keep = input, head_to_multiply(input, linear_weight), keep
        self.linear_weight_dtype = linear_weight.dtype
        self.need_dinput, self.need_dlinear_weight, self.need_dlinear_bias = needs
        self.linear_bias_dtype = input.dtype if linear_bias is None else linear_bias.dtype
        self.dinput = input.new_empty(input.shape if self.need_dinput else (0,))
        self.dlinear_weight = None  # the first product makes it
        num_classes = linear_weight.shape[0] if self.need_dlinear_bias else 0
        self.dlinear_bias = linear_weight.new_zeros(num_classes, dtype=torch.float32)

    def parts(self, logits: Tensor):
        """`(rows, dlogits)` of a chunk: which of its rows, and where the caller is to write their gradient.

        That is over the logits, but where their sum over rows is wanted: 16-bit gradients that cancel do not when each
        has been rounded, so some rows at a time are made in fp32, summed and then rounded.
        """
        num_rows, num_classes = logits.shape
        if not self.need_dlinear_bias or logits.dtype == torch.float32:
            yield slice(None), logits
            if self.need_dlinear_bias:
                self.dlinear_bias += logits.sum(0)
            return
        num_wide = min(num_rows, max(WIDE_BUFFER_BYTES // (4 * max(num_classes, 1)), 1))
        wide = logits.new_empty(num_wide, padded(num_classes), dtype=torch.float32)[:, :num_classes]
        for start in range(0, num_rows, num_wide):
            rows = slice(start, min(start + num_wide, num_rows))
            dlogits = wide[: rows.stop - start]
            yield rows, dlogits
            self.dlinear_bias += dlogits.sum(0)
            logits[rows] = dlogits

    def add(self, rows: slice, dlogits: Tensor) -> None:
        if self.need_dinput:
            self.dinput[rows] = rounded_product(dlogits, self.linear_weight)
        if self.need_dlinear_weight:
            kept_input = torch.where(self.keep[rows, None], self.input[rows], 0)
            if self.dlinear_weight is None:
                self.dlinear_weight = wide_product(dlogits.T, kept_input, torch.float32)
            else:
                add_product(self.dlinear_weight, dlogits.T, kept_input)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        dlinear_weight = self.dlinear_weight
        if dlinear_weight is None:
            dlinear_weight = self.linear_weight.new_zeros(
                self.linear_weight.shape if self.need_dlinear_weight else (0,)
            )
        return self.dinput, dlinear_weight.to(self.linear_weight_dtype), self.dlinear_bias.to(self.linear_bias_dtype)


def fwd_bwd(
    write_loss_and_gradient, input, linear_weight, target, row_weight, linear_bias, ignore_index, chunk_size, needs,
    pads=True,
):  # fmt: skip
    """`reference.linear_cross_entropy_fwd_bwd`; each chunk's gradient takes the place of its logits.

    `write_loss_and_gradient(logits, target, row_weight, loss, dlogits, end)` is the row kernel of some rows: it writes
    `loss` and `dlogits`, which may be `logits` itself, and may access rows up to column `end`, if that is not None.
    """
    row_weight, target = row_weight.float().contiguous(), target.contiguous()
    keep = (target != ignore_index) & (row_weight != 0)
    grads = HeadGradients(input, linear_weight, linear_bias, keep, needs)
    chunks = Chunks(input, grads.linear_weight, chunk_size, TRAINING_ROWS, pads)
    loss = input.new_empty(input.shape[0], dtype=torch.float32)
    for rows, logits in chunks:
        for part, dlogits in grads.parts(logits):
            write_loss_and_gradient(
                logits[part], target[rows][part], row_weight[rows][part], loss[rows][part], dlogits, chunks.end
            )
        grads.add(rows, logits)
    return (row_weight * loss).sum(), loss, *grads.result()
