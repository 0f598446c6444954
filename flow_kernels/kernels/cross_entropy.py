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
FLOW weights confident rows most, and bf16 gradients lose them first. The target's gradient is one scalar store after
the row's; a barrier orders the two.

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

from flow_kernels.kernels import configs
from flow_kernels.reference import check_target

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, so that (-inf) - LOWEST is not NaN, and LOWEST * LOG2E is still finite.
LOWEST = tl.constexpr(-1.7e38)


@triton.jit
def _columns(ptr, BLOCK_V: tl.constexpr):
    """Columns [BLOCK_V / G, G] in groups G of 16 bytes, so that a thread owns whole groups and reduces them alone."""
    GROUP: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return tl.arange(0, BLOCK_V // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        # tanh |u| = (1 - t) / (1 + t) with t = exp(-2 |u|): no overflow, and one exponential in base 2.
        t = tl.exp2(tl.abs(z) * (-2.0 * LOG2E / softcap))
        capped = softcap * (1.0 - t) / (1.0 + t)
        z = tl.where(cols < V, tl.where(z < 0, -capped, capped), -float("inf"))
    return z


@triton.jit
def _smoothing_sum(z, class_weight_ptr, cols, V):
    """Sum over each group of weight_j z_j."""
    if class_weight_ptr is not None:
        z *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
    return tl.sum(tl.where(cols < V, z, 0.0), 1)


@triton.jit
def _walk_row(row_ptr, target, bias_ptr, class_weight_ptr, V, softcap, HAS_SMOOTHING, HAS_SOFTCAP, BLOCK_V):
    """One read of a row: `(z_max, others, weighted, max_before)`, the target left out of the first two.

    Every thread keeps a (max, sum) pair for each of its groups: no communication inside the loop, one exponential a
    logit and one a group.
    """
    GROUP: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    lanes = _columns(row_ptr, BLOCK_V)
    group_max = tl.full([BLOCK_V // GROUP], LOWEST, tl.float32)
    group_sum = tl.zeros([BLOCK_V // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK_V // GROUP], tl.float32)
    max_before = tl.max(group_max, 0)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        z = _load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            weighted += _smoothing_sum(z, class_weight_ptr, cols, V)
        if (target >= start) & (target < start + BLOCK_V):
            before = tl.max(tl.where(cols < target, z, -float("inf")), 1)
            max_before = tl.max(tl.maximum(group_max, before), 0)
            z = tl.where(cols == target, -float("inf"), z)
        new_max = tl.maximum(group_max, tl.max(z, 1))
        group_sum = group_sum * tl.exp2((group_max - new_max) * LOG2E)
        group_sum += tl.sum(tl.exp2(z * LOG2E - (new_max * LOG2E)[:, None]), 1)
        group_max = new_max
    z_max = tl.max(group_max, 0)
    others = tl.sum(group_sum * tl.exp2((group_max - z_max) * LOG2E), 0)
    return z_max, others, tl.sum(weighted, 0), max_before


@triton.jit
def _merge_target(z_max, others, z_target):
    """Bring the target into (z_max, others): `(nll, lse, p_target - 1)`."""
    row_max = tl.maximum(z_max, z_target)
    others *= tl.exp2((z_max - row_max) * LOG2E)
    share = tl.exp2((z_target - row_max) * LOG2E)
    # log1p by its series where the target is the maximum and the rest is small; relative error below 2e-8.
    series = others * (1.0 - others * (0.5 - others * (1.0 / 3.0 - others * 0.25)))
    log_sum = tl.where((share == 1.0) & (others < 0.015625), series, tl.log2(others + share) * LN2)
    return (row_max - z_target) + log_sum, row_max + log_sum, -others / (others + share)


@triton.jit
def _row_terms(target, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING: tl.constexpr):
    """`(hit, spread, smooth)` of dz_j = spread p_j - hit [j = y] - smooth weight_j."""
    hit = 1.0 - label_smoothing
    smooth = label_smoothing / V
    total_weight = V * 1.0
    if class_weight_ptr is not None:
        hit *= tl.load(class_weight_ptr + target)
        total_weight = tl.load(class_weight_ptr + V)
    spread = hit + 2.0 * z_loss * lse
    if HAS_SMOOTHING:
        spread += smooth * total_weight
    return hit, spread, smooth


@triton.jit
def _row_loss(nll, lse, weighted, target, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING: tl.constexpr):
    hit, spread, smooth = _row_terms(target, lse, class_weight_ptr, V, label_smoothing, 0.0, HAS_SMOOTHING)
    loss = hit * nll + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss += (spread - hit) * lse - smooth * weighted
    return loss


@triton.jit
def _gradient(z, at, cols, class_weight_ptr, V, scale, smooth, softcap, HAS_SMOOTHING, HAS_SOFTCAP):
    """`scale` times the gradient through smoothing and soft-cap, `at` being the part without them."""
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            at -= smooth * tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
        else:
            at -= smooth
    if HAS_SOFTCAP:
        at *= 1.0 - (z / softcap) * (z / softcap)
    return at * scale


@triton.jit
def _store_target(
    dlogits_row_ptr, z, p_minus_1, target, terms, class_weight_ptr, V, scale, softcap, HAS_SMOOTHING, HAS_SOFTCAP
):
    """The target's own gradient, over what the row's store left there."""
    hit, spread, smooth = terms
    at = (spread - hit) * (p_minus_1 + 1.0) + hit * p_minus_1
    dz = _gradient(z, at, target, class_weight_ptr, V, scale, smooth, softcap, HAS_SMOOTHING, HAS_SOFTCAP)
    tl.debug_barrier()
    tl.store(dlogits_row_ptr + target, dz.to(dlogits_row_ptr.dtype.element_ty))


@triton.jit
def _store_zeros(dlogits_row_ptr, V, BLOCK_V):
    lanes = _columns(dlogits_row_ptr, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        tl.store(dlogits_row_ptr + cols, (cols * 0.0).to(dlogits_row_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, bias_ptr, class_weight_ptr, loss_ptr, lse_ptr, correct_ptr,
    logits_row_stride, V, options, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss, lse and correctness of one row a program."""
    ignore_index, label_smoothing, softcap, z_loss = options
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    loss, lse, correct = 0.0, 0.0, False
    if target != ignore_index:
        if (target >= 0) & (target < V):
            row_ptr = logits_ptr + row * logits_row_stride
            z_max, others, weighted, max_before = _walk_row(
                row_ptr, target, bias_ptr, class_weight_ptr, V, softcap, HAS_SMOOTHING, HAS_SOFTCAP, BLOCK_V
            )
            z_target = _load_logits(row_ptr, bias_ptr, target, V, softcap, HAS_SOFTCAP)
            nll, lse, _ = _merge_target(z_max, others, z_target)
            loss = _row_loss(nll, lse, weighted, target, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
            # argmax takes the first of equal logits.
            correct = (z_target >= z_max) & (z_target > max_before)
        else:
            loss, lse = float("nan"), float("nan")
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(correct_ptr + row, correct)


@triton.jit
def cross_entropy_fwd_bwd_kernel(
    logits_ptr, target_ptr, row_weight_ptr, bias_ptr, class_weight_ptr, loss_ptr, dlogits_ptr,
    logits_row_stride, dlogits_row_stride, V, options,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one row a program, V <= BLOCK_V: read once, kept in registers, written once."""
    ignore_index, label_smoothing, softcap, z_loss = options
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    dlogits_row_ptr = dlogits_ptr + row * dlogits_row_stride
    target = tl.load(target_ptr + row)
    scale = tl.load(row_weight_ptr + row)
    is_kept = (target != ignore_index) & (scale != 0)
    if is_kept & (target >= 0) & (target < V):
        cols = _columns(row_ptr, BLOCK_V)
        z = _load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP)
        z_target = _load_logits(row_ptr, bias_ptr, target, V, softcap, HAS_SOFTCAP)
        z_others = tl.where(cols == target, -float("inf"), z)
        z_max = tl.maximum(tl.max(tl.max(z_others, 1), 0), LOWEST)
        others = tl.sum(tl.sum(tl.exp2(z_others * LOG2E - z_max * LOG2E), 1), 0)
        weighted = 0.0
        if HAS_SMOOTHING:
            weighted = tl.sum(_smoothing_sum(z, class_weight_ptr, cols, V), 0)
        nll, lse, p_minus_1 = _merge_target(z_max, others, z_target)
        loss = _row_loss(nll, lse, weighted, target, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        tl.store(loss_ptr + row, loss)
        terms = _row_terms(target, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        at = terms[1] * tl.exp2(z * LOG2E - lse * LOG2E)
        dz = _gradient(z, at, cols, class_weight_ptr, V, scale, terms[2], softcap, HAS_SMOOTHING, HAS_SOFTCAP)
        tl.store(dlogits_row_ptr + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < V)
        _store_target(
            dlogits_row_ptr, z_target, p_minus_1, target, terms, class_weight_ptr, V, scale, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        tl.store(loss_ptr + row, tl.where(is_kept, float("nan"), 0.0))
        _store_zeros(dlogits_row_ptr, V, BLOCK_V)


@triton.jit
def cross_entropy_walk_kernel(
    logits_ptr, target_ptr, row_weight_ptr, bias_ptr, class_weight_ptr, loss_ptr, dlogits_ptr,
    logits_row_stride, dlogits_row_stride, V, options,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`cross_entropy_fwd_bwd_kernel` for a row of any length: read once for the loss, once more for the gradient."""
    ignore_index, label_smoothing, softcap, z_loss = options
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    dlogits_row_ptr = dlogits_ptr + row * dlogits_row_stride
    target = tl.load(target_ptr + row)
    scale = tl.load(row_weight_ptr + row)
    is_kept = (target != ignore_index) & (scale != 0)
    if is_kept & (target >= 0) & (target < V):
        z_max, others, weighted, _ = _walk_row(
            row_ptr, target, bias_ptr, class_weight_ptr, V, softcap, HAS_SMOOTHING, HAS_SOFTCAP, BLOCK_V
        )
        z_target = _load_logits(row_ptr, bias_ptr, target, V, softcap, HAS_SOFTCAP)
        nll, lse, p_minus_1 = _merge_target(z_max, others, z_target)
        loss = _row_loss(nll, lse, weighted, target, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        tl.store(loss_ptr + row, loss)
        terms = _row_terms(target, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        lanes = _columns(row_ptr, BLOCK_V)
        # In place, another thread must not overwrite a logit before every thread has read the target's.
        tl.debug_barrier()
        for start in range(0, V, BLOCK_V):
            cols = start + lanes
            z = _load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP)
            at = terms[1] * tl.exp2(z * LOG2E - lse * LOG2E)
            dz = _gradient(z, at, cols, class_weight_ptr, V, scale, terms[2], softcap, HAS_SMOOTHING, HAS_SOFTCAP)
            tl.store(dlogits_row_ptr + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < V)
        _store_target(
            dlogits_row_ptr, z_target, p_minus_1, target, terms, class_weight_ptr, V, scale, softcap,
            HAS_SMOOTHING, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        tl.store(loss_ptr + row, tl.where(is_kept, float("nan"), 0.0))
        _store_zeros(dlogits_row_ptr, V, BLOCK_V)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 with its relative precision near 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))
    return tl.where(x > -0.03125, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, target_ptr, lse_ptr, bias_ptr, class_weight_ptr, dlogits_ptr,
    logits_row_stride, dlogits_row_stride, V, options,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_V columns of one row a program, from the lse of the forward kernel; may run in place."""
    ignore_index, label_smoothing, softcap, z_loss = options
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    cols = start + _columns(logits_ptr, BLOCK_V)
    row_ptr = logits_ptr + row * logits_row_stride
    dlogits_row_ptr = dlogits_ptr + row * dlogits_row_stride
    target = tl.load(target_ptr + row)
    scale = tl.load(dloss_ptr + row)
    if (target != ignore_index) & (scale != 0) & (target >= 0) & (target < V):
        lse = tl.load(lse_ptr + row)
        terms = _row_terms(target, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING)
        z_target = _load_logits(row_ptr, bias_ptr, target, V, softcap, HAS_SOFTCAP)
        # In place, no thread may overwrite the target's logit before all have read it.
        tl.debug_barrier()
        z = _load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP)
        at = terms[1] * tl.exp2(z * LOG2E - lse * LOG2E)
        dz = _gradient(z, at, cols, class_weight_ptr, V, scale, terms[2], softcap, HAS_SMOOTHING, HAS_SOFTCAP)
        tl.store(dlogits_row_ptr + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < V)
        if (target >= start) & (target < start + BLOCK_V):
            _store_target(
                dlogits_row_ptr, z_target, _expm1(z_target - lse), target, terms, class_weight_ptr, V, scale, softcap,
                HAS_SMOOTHING, HAS_SOFTCAP,
            )  # fmt: skip
    else:
        tl.store(dlogits_row_ptr + cols, (cols * 0.0).to(dlogits_ptr.dtype.element_ty), mask=cols < V)


def check_rows(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`logits` with unit column stride, checked: a target out of range raises where looking costs no synchronisation."""
    num_classes = logits.shape[1]
    if num_classes > configs.MAX_CLASSES:
        raise ValueError(
            f"the Triton kernels take rows of at most {configs.MAX_CLASSES} logits, got {num_classes}; "
            "backend='reference' serves any length"
        )
    if logits.device.type == "cpu":
        check_target(target, num_classes, ignore_index)
    return logits if logits.stride(1) == 1 or num_classes == 1 else logits.contiguous()


def with_sum(class_weight: Tensor | None) -> Tensor | None:
    """The class weights followed by their sum, as the kernels take them."""
    return None if class_weight is None else torch.cat([class_weight.float(), class_weight.float().sum()[None]])


def _launch(kernel, config, grid, tensors, sizes, options):
    """Run `kernel` on the device of its first tensor; `options` is (ignore_index, label_smoothing, softcap, z_loss)."""
    device = tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *tensors, *sizes, options, HAS_SMOOTHING=options[1] > 0, HAS_SOFTCAP=options[2] > 0,
            BLOCK_V=config.BLOCK_V, num_warps=config.num_warps(configs.warp_size(device)),
        )  # fmt: skip


def launch_fwd(logits, target, bias, class_weight, loss, lse, correct, options) -> None:
    """Write loss, lse (fp32) and correct (bool) of every row of `logits [N, V]`."""
    num_rows, num_classes = logits.shape
    if num_rows:
        config = configs.lookup(configs.WALK, logits.dtype, num_classes)
        tensors = (logits, target, bias, class_weight, loss, lse, correct.view(torch.uint8))
        sizes = (logits.stride(0), num_classes)
        _launch(cross_entropy_fwd_kernel, config, (num_rows,), tensors, sizes, options)


def launch_fwd_bwd(logits, target, row_weight, bias, class_weight, loss, dlogits, options) -> None:
    """Write the row losses and `dlogits`, which may be `logits` itself."""
    num_rows, num_classes = logits.shape
    if num_rows:
        kernel, config = cross_entropy_fwd_bwd_kernel, configs.lookup(configs.ONE_PASS, logits.dtype, num_classes)
        if config is None:
            kernel, config = cross_entropy_walk_kernel, configs.lookup(configs.WALK, logits.dtype, num_classes)
        tensors = (logits, target, row_weight, bias, class_weight, loss, dlogits)
        sizes = (logits.stride(0), dlogits.stride(0), num_classes)
        _launch(kernel, config, (num_rows,), tensors, sizes, options)


def launch_bwd(dloss, logits, target, lse, bias, class_weight, dlogits, options) -> None:
    """Write `dlogits`, which may be `logits` itself."""
    num_rows, num_classes = logits.shape
    if num_rows:
        config = configs.lookup(configs.ELEMENTWISE, logits.dtype, num_classes)
        tensors = (dloss, logits, target, lse, bias, class_weight, dlogits)
        sizes = (logits.stride(0), dlogits.stride(0), num_classes)
        grid = (num_rows, triton.cdiv(num_classes, config.BLOCK_V))
        _launch(cross_entropy_bwd_kernel, config, grid, tensors, sizes, options)


def cross_entropy_fwd(logits, target, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """`reference.cross_entropy_fwd`: each logit is read once."""
    logits = check_rows(logits, target, ignore_index)
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    lse, correct = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
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
