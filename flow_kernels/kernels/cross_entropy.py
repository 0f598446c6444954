"""Weighted cross-entropy of given logits: Triton kernels and their launchers.

N rows, V vocabulary entries. The formulas are those of `flow_kernels.reference`; for a row with logits z, target y and
row weight g, without options,

    loss = (max - z_y) + log_sum        lse = max + log_sum        dz_j = g (p_j - [j = y])

What each launch reads and writes per logit of b bytes:

    cross_entropy_fwd_kernel        reads b once                      running (max, sum) per thread, merged once a row
    cross_entropy_fwd_bwd_kernel    reads b once, writes b once       the row stays in registers (up to 128 KiB a row)
    cross_entropy_walk_kernel       reads b twice, writes b once      the same for longer rows
    cross_entropy_bwd_kernel        reads b once, writes b once       from the saved lse

The target's own exponential is kept out of the sum: `others = sum_{j != y} exp(z_j - max)` gives p_y - 1 as
-others / sum, and log_sum as log1p(others) where y is the maximum, both exact to fp32 however confident the row is.
FLOW weights confident rows most, and bf16 gradients lose them first. Only the block that covers the target, or in a row
kept in registers its 16 bytes, compares its columns with it.

p_j is exp(z_j - max) / sum wherever the row's maximum is at hand. The backward pass from a saved lse has no sum of the
others: its p_y - 1 is expm1(z_y - lse), the little that is left of z_y, so lse is saved in fp64 and taken in two parts of
fp32.

A row whose target is `ignore_index`, or whose weight is 0, writes zeros and reads no logits. A target outside [0, V)
raises on the CPU; on a GPU, where looking would synchronise, its row gets loss and lse NaN, gradient 0, and nothing is
read outside the row.

Performance model: see `flow_kernels.kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from flow_kernels.chunks import ROW_ALIGNMENT, padded
from flow_kernels.kernels import configs
from flow_kernels.kernels.softmax_row import (
    LOG2E,
    accumulate,
    columns,
    expm1,
    group_of,
    is_accessed,
    is_prediction,
    keep_raw,
    load_logits,
    load_raw,
    merge_target,
    merge_threads,
    others_gradient,
    place_target,
    row_loss,
    row_terms,
    smoothing_sum,
    start_threads,
    store_zeros,
    target_gradient,
    through_head,
    walk_row,
)
from flow_kernels.reference import check_target


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, bias_ptr, class_weight_ptr, loss_ptr, lse_ptr, correct_ptr,
    sizes, row_options, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Loss, lse and correctness of one row a program."""
    ignore_index, label_smoothing, softcap, z_loss = row_options
    V = sizes[0]
    width = (V, sizes[1])
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if (target != ignore_index) & (target >= 0) & (target < V):
        y = target.to(tl.int32)
        row_ptr = logits_ptr + row * sizes[2]
        z_target = load_logits(row_ptr, bias_ptr, y, width, softcap, HAS_SOFTCAP)
        z_max, others, weighted, max_before, _ = walk_row(
            row_ptr, y, z_target, bias_ptr, class_weight_ptr, width, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP, False, ALIGNED, BLOCK_V, DEPTH,
        )  # fmt: skip
        nll, lse, _, softmax = merge_target(z_max, others, z_target)
        terms = row_terms(y, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        tl.store(loss_ptr + row, row_loss(nll, lse, weighted, terms, z_loss, HAS_SMOOTHING))
        tl.store(lse_ptr + row, softmax[0].to(tl.float64) + softmax[2].to(tl.float64))
        tl.store(correct_ptr + row, is_prediction(z_target, z_max, max_before, nll))
    else:
        absent = tl.where(target == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, absent)
        tl.store(lse_ptr + row, absent)
        tl.store(correct_ptr + row, False)


@triton.jit
def cross_entropy_fwd_bwd_kernel(
    logits_ptr, target_ptr, row_weight_ptr, bias_ptr, class_weight_ptr, loss_ptr, dlogits_ptr,
    sizes, row_options, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one row a program, V <= BLOCK_V * NUM_BLOCKS: the row is read once and kept in registers."""
    ignore_index, label_smoothing, softcap, z_loss = row_options
    V = sizes[0]
    width = (V, sizes[1])
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * sizes[2]
    target = tl.load(target_ptr + row)
    scale = tl.load(row_weight_ptr + row)
    is_kept = (target != ignore_index) & (scale != 0)
    if is_kept & (target >= 0) & (target < V):
        y = target.to(tl.int32)
        lanes = columns(row_ptr, ALIGNED, BLOCK_V, 1)
        thread = tl.arange(0, lanes.shape[1])
        z_target = load_logits(row_ptr, bias_ptr, y, width, softcap, HAS_SOFTCAP)
        # The target's 16 bytes are taken out of the blocks and handled on their own: one comparison a group, not one a
        # logit.
        y_group, y_cols = group_of(row_ptr, y, ALIGNED, BLOCK_V)
        z_group = load_logits(row_ptr, bias_ptr, y_cols, width, softcap, HAS_SOFTCAP)
        running = start_threads(tl.where(y_cols == y, -float("inf"), z_group), thread)
        weighted = tl.zeros_like(running[0])
        blocks = ()
        for block in tl.static_range(NUM_BLOCKS):
            cols = lanes + block * BLOCK_V
            x = load_raw(row_ptr, cols, width)
            # Triton reads no starred expression.
            blocks = blocks + (x,)  # noqa: RUF005
            z = through_head(x, bias_ptr, cols, width, softcap, HAS_SOFTCAP)
            if HAS_SMOOTHING:
                weighted += smoothing_sum(z, class_weight_ptr, cols, width)
            is_counted = thread + block * lanes.shape[1] != y_group
            running = accumulate(z, running, is_counted)
        z_max, others = merge_threads(running, z_target)
        nll, lse, p_minus_1, softmax = merge_target(z_max, others, z_target)
        terms = row_terms(y, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        tl.store(loss_ptr + row, row_loss(nll, lse, tl.sum(weighted, 0), terms, z_loss, HAS_SMOOTHING))
        dz_target = target_gradient(
            z_target, p_minus_1, y, terms, scale, class_weight_ptr, width, softcap, HAS_SMOOTHING, HAS_SOFTCAP
        )
        dlogits_row_ptr = dlogits_ptr + row * sizes[3]
        for block in tl.static_range(NUM_BLOCKS):
            cols = lanes + block * BLOCK_V
            z = through_head(keep_raw(blocks[block], others), bias_ptr, cols, width, softcap, HAS_SOFTCAP)
            dz = others_gradient(
                z, cols, softmax, terms, scale, class_weight_ptr, width, softcap, HAS_SMOOTHING, HAS_SOFTCAP
            )
            is_stored = (thread + block * lanes.shape[1] != y_group)[None, :, None] & is_accessed(cols, width)
            tl.store(dlogits_row_ptr + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=is_stored)
        dz = others_gradient(
            z_group, y_cols, softmax, terms, scale, class_weight_ptr, width, softcap, HAS_SMOOTHING, HAS_SOFTCAP
        )
        dz = tl.where(y_cols == y, dz_target, dz).to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_row_ptr + y_cols, dz, mask=is_accessed(y_cols, width))
    else:
        tl.store(loss_ptr + row, tl.where(is_kept, float("nan"), 0.0))
        store_zeros(dlogits_ptr + row * sizes[3], width, ALIGNED, BLOCK_V)


@triton.jit
def cross_entropy_walk_kernel(
    logits_ptr, target_ptr, row_weight_ptr, bias_ptr, class_weight_ptr, loss_ptr, dlogits_ptr,
    sizes, row_options, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`cross_entropy_fwd_bwd_kernel` for a row of any length: read once for the loss, once more for the gradient."""
    ignore_index, label_smoothing, softcap, z_loss = row_options
    V = sizes[0]
    width = (V, sizes[1])
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * sizes[2]
    dlogits_row_ptr = dlogits_ptr + row * sizes[3]
    target = tl.load(target_ptr + row)
    scale = tl.load(row_weight_ptr + row)
    is_kept = (target != ignore_index) & (scale != 0)
    if is_kept & (target >= 0) & (target < V):
        y = target.to(tl.int32)
        z_target = load_logits(row_ptr, bias_ptr, y, width, softcap, HAS_SOFTCAP)
        z_max, others, weighted, _, _ = walk_row(
            row_ptr, y, z_target, bias_ptr, class_weight_ptr, width, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP, False, ALIGNED, BLOCK_V, DEPTH,
        )  # fmt: skip
        nll, lse, p_minus_1, softmax = merge_target(z_max, others, z_target)
        terms = row_terms(y, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        tl.store(loss_ptr + row, row_loss(nll, lse, weighted, terms, z_loss, HAS_SMOOTHING))
        dz_target = target_gradient(
            z_target, p_minus_1, y, terms, scale, class_weight_ptr, width, softcap, HAS_SMOOTHING, HAS_SOFTCAP
        )
        lanes = columns(row_ptr, ALIGNED, BLOCK_V, DEPTH)
        for start in range(0, V, BLOCK_V):
            cols = start + lanes
            z = load_logits(row_ptr, bias_ptr, cols, width, softcap, HAS_SOFTCAP)
            dz = others_gradient(
                z, cols, softmax, terms, scale, class_weight_ptr, width, softcap, HAS_SMOOTHING, HAS_SOFTCAP
            )
            dz = place_target(dz, cols, y, dz_target, start, BLOCK_V)
            tl.store(dlogits_row_ptr + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=is_accessed(cols, width))
    else:
        tl.store(loss_ptr + row, tl.where(is_kept, float("nan"), 0.0))
        store_zeros(dlogits_row_ptr, width, ALIGNED, BLOCK_V)


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, target_ptr, lse_ptr, bias_ptr, class_weight_ptr, dlogits_ptr,
    sizes, row_options, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_V columns of one row a program, from the lse of the forward kernel; may run in place."""
    ignore_index, label_smoothing, softcap, z_loss = row_options
    V = sizes[0]
    width = (V, sizes[1])
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    cols = start + columns(logits_ptr, ALIGNED, BLOCK_V, 1)
    row_ptr = logits_ptr + row * sizes[2]
    dlogits_row_ptr = dlogits_ptr + row * sizes[3]
    target = tl.load(target_ptr + row)
    scale = tl.load(dloss_ptr + row)
    if (target != ignore_index) & (scale != 0) & (target >= 0) & (target < V):
        y = target.to(tl.int32)
        exact_lse = tl.load(lse_ptr + row)
        lse = exact_lse.to(tl.float32)
        rest = (exact_lse - lse).to(tl.float32)
        terms = row_terms(y, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        z = load_logits(row_ptr, bias_ptr, cols, width, softcap, HAS_SOFTCAP)
        dz = others_gradient(
            z, cols, (lse, tl.exp2(rest * -LOG2E)), terms, scale, class_weight_ptr, width, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP,
        )  # fmt: skip
        if (y >= start) & (y < start + BLOCK_V):
            # Every column as if it were the target, rather than a second read of a logit that is being overwritten.
            dz_target = target_gradient(
                z, expm1((z - lse) - rest), cols, terms, scale, class_weight_ptr, width, softcap,
                HAS_SMOOTHING, HAS_SOFTCAP,
            )  # fmt: skip
            dz = tl.where(cols == y, dz_target, dz)
        tl.store(dlogits_row_ptr + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=is_accessed(cols, width))
    else:
        zeros = tl.zeros_like(cols).to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_row_ptr + cols, zeros, mask=is_accessed(cols, width))


def check_classes(num_classes: int, target: Tensor, ignore_index: int) -> None:
    """Raise for rows too long, and for a target out of range where looking costs no synchronisation."""
    if num_classes > configs.MAX_CLASSES:
        raise ValueError(
            f"the Triton kernels take rows of at most {configs.MAX_CLASSES} logits, got {num_classes}; "
            "backend='reference' serves any length"
        )
    if target.device.type == "cpu":
        check_target(target, num_classes, ignore_index)


def check_rows(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`logits` with unit column stride, checked."""
    num_classes = logits.shape[1]
    check_classes(num_classes, target, ignore_index)
    return logits if logits.stride(1) == 1 or num_classes == 1 else logits.contiguous()


def with_padding(values: Tensor | None) -> Tensor | None:
    """Values of V columns with zeros behind them, as far as a kernel may access them."""
    return None if values is None else F.pad(values, (0, padded(len(values)) - len(values))).contiguous()


def with_sum(class_weight: Tensor | None) -> Tensor | None:
    """The class weights followed by their sum, as the kernels take them."""
    if class_weight is None:
        return None
    class_weight = class_weight.float()
    return with_padding(torch.cat([class_weight, class_weight.sum()[None]]))


def is_aligned(end: int, *rows: Tensor) -> bool:
    """Whether rows can be accessed 16 bytes at a time, by the numbers from which Triton finds it out."""
    return end % ROW_ALIGNMENT == 0 and all(t.stride(0) % ROW_ALIGNMENT == 0 and t.data_ptr() % 16 == 0 for t in rows)


def launch(kernel, config, grid, tensors, sizes, options, aligned, **flags):
    """Run `kernel` on the device of its first tensor.

    `sizes` is (V, end, row strides of the logits and of their gradient), `options` (ignore_index, label_smoothing, softcap,
    z_loss), from which the flags follow unless they are given.

    No parameter of a kernel may be called `options`: Triton's launcher has one of that name.
    """
    flags = flags or {"HAS_SMOOTHING": options[1] > 0, "HAS_SOFTCAP": options[2] > 0}
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *tensors, sizes, options, **flags, ALIGNED=aligned, **config.constants,
            **config.compiler_options(configs.warp_size(tensors[0].device), torch.version.hip is None),
        )  # fmt: skip


def launch_fwd(logits, target, bias, class_weight, loss, lse, correct, options, end=None) -> None:
    """Write loss (fp32), lse (fp64) and correct (bool) of every row of `logits [N, V]`.

    `end`, here and below: the column up to which rows may be accessed, a multiple of 16, if that is not V.
    """
    num_rows, num_classes = logits.shape
    if num_rows:
        config = configs.walk(logits.dtype, num_classes, options[1] > 0 and options[2] > 0)
        tensors = (logits, target, bias, class_weight, loss, lse, correct.view(torch.uint8))
        sizes, aligned = (num_classes, end, logits.stride(0)), is_aligned(end or num_classes, logits)
        launch(cross_entropy_fwd_kernel, config, (num_rows,), tensors, sizes, options, aligned)


def launch_fwd_bwd(logits, target, row_weight, bias, class_weight, loss, dlogits, options, end=None) -> None:
    """Write the row losses and `dlogits`, which may be `logits` itself."""
    num_rows, num_classes = logits.shape
    if num_rows:
        has_options = bias is not None or class_weight is not None or options[1] > 0 or options[2] > 0
        aligned = is_aligned(end or num_classes, logits, dlogits)
        kernel = cross_entropy_fwd_bwd_kernel
        config = configs.one_pass(logits.dtype, num_classes, has_options, aligned)
        if config is None:
            kernel = cross_entropy_walk_kernel
            config = configs.walk(logits.dtype, num_classes, options[1] > 0 and options[2] > 0)
        tensors = (logits, target, row_weight, bias, class_weight, loss, dlogits)
        sizes = (num_classes, end, logits.stride(0), dlogits.stride(0))
        launch(kernel, config, (num_rows,), tensors, sizes, options, aligned)


def launch_bwd(dloss, logits, target, lse, bias, class_weight, dlogits, options, end=None) -> None:
    """Write `dlogits`, which may be `logits` itself."""
    num_rows, num_classes = logits.shape
    if num_rows:
        config = configs.lookup(configs.ELEMENTWISE, logits.dtype, num_classes)
        if num_classes > config.block_v * configs.MAX_GRID_Y:
            raise ValueError(
                f"the Triton backward pass takes rows of at most {config.block_v * configs.MAX_GRID_Y} {logits.dtype} "
                f"logits, got {num_classes}; backend='reference' serves any length"
            )
        tensors = (dloss, logits, target, lse, bias, class_weight, dlogits)
        sizes = (num_classes, end, logits.stride(0), dlogits.stride(0))
        grid = (num_rows, triton.cdiv(num_classes, config.block_v))
        aligned = is_aligned(end or num_classes, logits, dlogits)
        launch(cross_entropy_bwd_kernel, config, grid, tensors, sizes, options, aligned)


def cross_entropy_fwd(logits, target, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """`reference.cross_entropy_fwd`: each logit is read once."""
    logits = check_rows(logits, target, ignore_index)
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    lse, correct = torch.empty_like(loss, dtype=torch.float64), torch.empty_like(loss, dtype=torch.bool)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    launch_fwd(logits, target.contiguous(), None, with_sum(class_weight), loss, lse, correct, options)
    return loss, lse, correct


def cross_entropy_bwd(dloss, logits, target, lse, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """`reference.cross_entropy_bwd`: each logit is read once and its gradient written once."""
    logits = check_rows(logits, target, ignore_index)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    launch_bwd(
        dloss.contiguous(),
        logits,
        target.contiguous(),
        lse.contiguous(),
        None,
        with_sum(class_weight),
        dlogits,
        options,
    )
    return dlogits


def cross_entropy_fwd_bwd(logits, target, row_weight, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """`reference.cross_entropy_fwd_bwd`, loss and gradient in one launch."""
    logits = check_rows(logits, target, ignore_index)
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_weight = row_weight.float().contiguous()
    options = (ignore_index, label_smoothing, softcap, z_loss)
    launch_fwd_bwd(logits, target.contiguous(), row_weight, None, with_sum(class_weight), loss, dlogits, options)
    return (row_weight * loss).sum(), loss, dlogits
