"""Cross-entropy of a linear head: chunks of rows, the vendor's matmul, and the row kernels on the chunk's logits.

N rows, V vocabulary entries, D hidden, R rows a chunk. Only one [R, V] buffer of logits exists; it is ours, so the row
kernel writes the gradient over it. Matrix products of 2 N V D flops each:

    linear_cross_entropy_fwd        1, nothing is stored
    linear_cross_entropy_fwd_bwd    3, the row weights being known: logits, dinput, dlinear_weight
    linear_cross_entropy_bwd        3, the logits made again and the upstream gradient folded in before the products

`dlinear_weight` is accumulated over chunks in fp32 and rounded once, so its error does not grow with their number.
Skipping ignored rows in the matmul would need their number on the host, a synchronisation; they cost their flops, and
the row kernel writes zeros for them. Where a dropped row could reach a sum over rows (0 * NaN), it is selected away.
`grad_filter_eps` saves nothing here: the products are the vendor's, of whole chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flow_kernels.kernels.cross_entropy import (
    ROW_ALIGNMENT,
    check_rows,
    launch_bwd,
    launch_fwd,
    launch_fwd_bwd,
    padded,
    with_padding,
    with_sum,
)
from flow_kernels.products import add_product, rounded_product

# The buffer of logits. 256 MiB are 512 rows of 262144 in bf16. By the roofline of an H100 (about 240 flops in the time of
# a byte) the products that read `linear_weight` are bound by arithmetic then (R flops a byte), and that of its gradient by
# memory (its fp32 sum is read and written once a chunk, R / 4 flops a byte, whatever D is): a larger `chunk_size` trades
# memory for speed there. Not measured on a GPU.
LOGITS_BUFFER_BYTES = 256 * 2**20
# Fewer rows than this leave a matmul waiting for `linear_weight`, which each chunk reads again: R flops per byte of it,
# where an H100 does about 300 flops in the time of one byte.
MIN_CHUNK_ROWS = 256


def default_chunk_size(num_classes: int, itemsize: int) -> int:
    """Rows of logits held at a time when `chunk_size` is 0."""
    rows = LOGITS_BUFFER_BYTES // (itemsize * max(num_classes, 1))
    return max(MIN_CHUNK_ROWS, rows // MIN_CHUNK_ROWS * MIN_CHUNK_ROWS)


class Chunks:
    """One buffer of logits, filled chunk by chunk."""

    def __init__(self, input: Tensor, linear_weight: Tensor, chunk_size: int) -> None:
        num_rows, num_classes = input.shape[0], linear_weight.shape[0]
        self.input, self.linear_weight = input, linear_weight
        self.size = min(chunk_size or default_chunk_size(num_classes, input.element_size()), max(num_rows, 1))
        # Rows that start at multiples of 16 elements: the fast path of cuBLAS, and 16-byte accesses in the row kernel, which
        # reads -inf between V and the end and writes what it likes.
        self.end = padded(num_classes) if num_classes % ROW_ALIGNMENT else None
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


class _HeadGradients:
    """The gradients of the head that were asked for; an empty tensor stands for the others."""

    def __init__(self, input, linear_weight, linear_bias, keep, needs) -> None:
        self.input, self.linear_weight, self.keep = input, linear_weight, keep
        self.need_dinput, self.need_dlinear_weight, self.need_dlinear_bias = needs
        self.linear_bias_dtype = input.dtype if linear_bias is None else linear_bias.dtype
        self.dinput = input.new_empty(input.shape if self.need_dinput else (0,))
        shape = linear_weight.shape if self.need_dlinear_weight else (0,)
        self.dlinear_weight = linear_weight.new_zeros(shape, dtype=torch.float32)
        num_classes = linear_weight.shape[0] if self.need_dlinear_bias else 0
        self.dlinear_bias = linear_weight.new_zeros(num_classes, dtype=torch.float32)

    def add(self, rows: slice, dlogits: Tensor) -> None:
        if self.need_dinput:
            self.dinput[rows] = rounded_product(dlogits, self.linear_weight)
        if self.need_dlinear_weight:
            kept_input = torch.where(self.keep[rows, None], self.input[rows], 0)
            add_product(self.dlinear_weight, dlogits.T, kept_input)
        if self.need_dlinear_bias:
            self.dlinear_bias += dlogits.sum(0, dtype=torch.float32)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.dinput,
            self.dlinear_weight.to(self.linear_weight.dtype),
            self.dlinear_bias.to(self.linear_bias_dtype),
        )


def linear_cross_entropy_fwd(
    input, linear_weight, target, linear_bias, class_weight, ignore_index, label_smoothing, softcap, z_loss, chunk_size,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`reference.linear_cross_entropy_fwd`; holds one chunk of logits and stores none."""
    options = (ignore_index, label_smoothing, softcap, z_loss)
    chunks = Chunks(input, linear_weight, chunk_size)
    check_rows(chunks.buffer, target, ignore_index)
    target, linear_bias, class_weight = target.contiguous(), with_padding(linear_bias), with_sum(class_weight)
    loss = input.new_empty(input.shape[0], dtype=torch.float32)
    lse, correct = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
    for rows, logits in chunks:
        launch_fwd(
            logits, target[rows], linear_bias, class_weight, loss[rows], lse[rows], correct[rows], options, chunks.end
        )  # fmt: skip
    return loss, lse, correct


def linear_cross_entropy_bwd(
    dloss, input, linear_weight, target, lse, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`reference.linear_cross_entropy_bwd`; the logits are made again, a chunk at a time."""
    options = (ignore_index, label_smoothing, softcap, z_loss)
    needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)
    dloss, lse, target = dloss.float().contiguous(), lse.contiguous(), target.contiguous()
    keep = (target != ignore_index) & (dloss != 0)
    grads = _HeadGradients(input, linear_weight, linear_bias, keep, needs)
    linear_bias, class_weight = with_padding(linear_bias), with_sum(class_weight)
    chunks = Chunks(input, linear_weight, chunk_size)
    for rows, logits in chunks:
        launch_bwd(dloss[rows], logits, target[rows], lse[rows], linear_bias, class_weight, logits, options, chunks.end)
        grads.add(rows, logits)
    return grads.result()


def linear_cross_entropy_fwd_bwd(
    input, linear_weight, target, row_weight, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`reference.linear_cross_entropy_fwd_bwd`; each chunk's gradient is made in place on its logits."""
    options = (ignore_index, label_smoothing, softcap, z_loss)
    needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)
    chunks = Chunks(input, linear_weight, chunk_size)
    check_rows(chunks.buffer, target, ignore_index)
    row_weight, target = row_weight.float().contiguous(), target.contiguous()
    keep = (target != ignore_index) & (row_weight != 0)
    grads = _HeadGradients(input, linear_weight, linear_bias, keep, needs)
    linear_bias, class_weight = with_padding(linear_bias), with_sum(class_weight)
    loss = input.new_empty(input.shape[0], dtype=torch.float32)
    for rows, logits in chunks:
        launch_fwd_bwd(
            logits, target[rows], row_weight[rows], linear_bias, class_weight, loss[rows], logits, options, chunks.end
        )  # fmt: skip
        grads.add(rows, logits)
    return (row_weight * loss).sum(), loss, *grads.result()
