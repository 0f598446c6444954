"""What every kernel does to one row of logits: load, running (max, sum), loss, gradient. Device functions only.

Legend: `row_ptr` the row's first logit, `cols` int32 column numbers of any shape, V the number of columns, `scale` the
row's weight or upstream gradient, `softcap` c, `terms = (hit, spread, smooth)` of the gradient

    dz_j = scale (spread p_j - hit [j = y] - smooth weight_j) (1 - (z_j / c)^2)

with the formulas of `flow_kernels.reference`. An optional pointer that is None leaves its part out at compile time.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, so that (-inf) - LOWEST is not NaN, and LOWEST * LOG2E is still finite.
LOWEST = tl.constexpr(-1.7e38)


@triton.jit
def columns(ptr, BLOCK_V: tl.constexpr):
    """Columns [BLOCK_V / G, G] in groups G of 16 bytes, so that a thread owns whole groups and reduces them alone."""
    GROUP: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return tl.arange(0, BLOCK_V // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def through_head(x, bias_ptr, cols, V, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw logits to fp32 logits with bias and soft-cap; -inf from V on."""
    z = x.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        # tanh |u| = (1 - t) / (1 + t) with t = exp(-2 |u|): no overflow, and one exponential in base 2.
        t = tl.exp2(tl.abs(z) * (-2.0 * LOG2E / softcap))
        capped = softcap * (1.0 - t) / (1.0 + t)
        z = tl.where(cols < V, tl.where(z < 0, -capped, capped), -float("inf"))
    return z


@triton.jit
def load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP: tl.constexpr):
    x = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf"))
    return through_head(x, bias_ptr, cols, V, softcap, HAS_SOFTCAP)


@triton.jit
def keep_raw(x, total):
    """`x` itself, written so that the compiler keeps two raw 16-bit logits a register instead of two fp32 ones.

    `total`, a sum of exponentials, is never negative, but the compiler does not know, so it cannot reuse the conversion
    to fp32 of an earlier pass over `x`. A maximum, because it sees through or, xor and select: with those a row of 65536
    spilled 128 to 240 bytes a thread.
    """
    if x.dtype.primitive_bitwidth == 16:
        x = tl.maximum(x.to(tl.uint16, bitcast=True), (total < 0).to(tl.uint16)).to(x.dtype, bitcast=True)
    return x


@triton.jit
def smoothing_sum(z, class_weight_ptr, cols, V):
    """Sum over each group of weight_j z_j."""
    if class_weight_ptr is not None:
        z *= tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
    return tl.sum(tl.where(cols < V, z, 0.0), 1)


@triton.jit
def accumulate(z, group_max, group_sum):
    """Bring a block into every group's running (max, sum of exp): one exponential a logit and one a group."""
    new_max = tl.maximum(group_max, tl.max(z, 1))
    group_sum = group_sum * tl.exp2((group_max - new_max) * LOG2E)
    # new_max * LOG2E is rounded before z meets it: the error of one rounding of lse, the same for the whole group.
    return new_max, group_sum + tl.sum(tl.exp2(tl.fma(z, LOG2E, (new_max * -LOG2E)[:, None])), 1)


@triton.jit
def merge_groups(group_max, group_sum, z_target):
    """The groups' (max, sum) as one, in a fixed order: the row's only reduction between threads.

    `z_target` changes nothing, but every thread has then waited for its load of it before any can leave the reduction
    and overwrite it in place.
    """
    group_max = tl.maximum(group_max, tl.minimum(z_target, LOWEST))
    z_max = tl.max(group_max, 0)
    return z_max, tl.sum(group_sum * tl.exp2((group_max - z_max) * LOG2E), 0)


@triton.jit
def walk_row(
    row_ptr, target, z_target, bias_ptr, class_weight_ptr, V, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One read of a row: `(z_max, others, weighted, max_before)`.

    `z_max` and `others` leave the target out, `weighted` is sum_j weight_j z_j (with HAS_SMOOTHING), `max_before` the
    maximum of the columns before the target.
    """
    GROUP: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    lanes = columns(row_ptr, BLOCK_V)
    group_max = tl.full([BLOCK_V // GROUP], LOWEST, tl.float32)
    group_sum = tl.zeros([BLOCK_V // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK_V // GROUP], tl.float32)
    max_before = tl.max(group_max, 0)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        z = load_logits(row_ptr, bias_ptr, cols, V, softcap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            weighted += smoothing_sum(z, class_weight_ptr, cols, V)
        # One block of a row takes this branch, so no other block pays for comparing its columns with the target.
        if (target >= start) & (target < start + BLOCK_V):
            before = tl.max(tl.where(cols < target, z, -float("inf")), 1)
            max_before = tl.max(tl.maximum(group_max, before), 0)
            z = tl.where(cols == target, -float("inf"), z)
        group_max, group_sum = accumulate(z, group_max, group_sum)
    z_max, others = merge_groups(group_max, group_sum, z_target)
    return z_max, others, tl.sum(weighted, 0), max_before


@triton.jit
def merge_target(z_max, others, z_target):
    """Bring the target's logit into `(z_max, others)`: `(nll, lse, p_target - 1)`."""
    row_max = tl.maximum(z_max, z_target)
    others *= tl.exp2((z_max - row_max) * LOG2E)
    share = tl.exp2((z_target - row_max) * LOG2E)
    # log1p by its series where the target is the maximum and the rest is small; relative error below 2e-8.
    series = others * (1.0 - others * (0.5 - others * (1.0 / 3.0 - others * 0.25)))
    log_sum = tl.where((share == 1.0) & (others < 0.015625), series, tl.log2(others + share) * LN2)
    return (row_max - z_target) + log_sum, row_max + log_sum, -others / (others + share)


@triton.jit
def row_terms(target, lse, class_weight_ptr, V, label_smoothing, z_loss, HAS_SMOOTHING: tl.constexpr):
    """`(hit, spread, smooth)`; the sum of the class weights stands behind the last of them."""
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
def row_loss(nll, lse, weighted, terms, z_loss, HAS_SMOOTHING: tl.constexpr):
    hit, spread, smooth = terms
    loss = hit * nll + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss += (spread - hit - 2.0 * z_loss * lse) * lse - smooth * weighted
    return loss


@triton.jit
def through_options(
    dz, z, cols, class_weight_ptr, V, smooth, softcap, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """What smoothing subtracts (`smooth` already scaled), then the chain rule through the soft-cap."""
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            dz -= smooth * tl.load(class_weight_ptr + cols, mask=cols < V, other=0.0)
        else:
            dz -= smooth
    if HAS_SOFTCAP:
        u = z * (1.0 / softcap)
        dz *= 1.0 - u * u
    return dz


@triton.jit
def others_gradient(
    z, cols, lse, terms, scale, class_weight_ptr, V, softcap, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """The gradient of every column but the target's, whose place gets a value that `place_target` replaces."""
    # exp(z - lse) in one fused operation and one exponential a logit; what rounding took from lse * LOG2E goes into the
    # row's factor, so the only error is that of lse itself.
    shift = lse * -LOG2E
    factor = scale * terms[1] * tl.exp2(tl.fma(lse, -LOG2E, -shift))
    dz = factor * tl.exp2(tl.fma(z, LOG2E, shift))
    return through_options(dz, z, cols, class_weight_ptr, V, scale * terms[2], softcap, HAS_SMOOTHING, HAS_SOFTCAP)


@triton.jit
def target_gradient(
    z, p_minus_1, y, terms, scale, class_weight_ptr, V, softcap, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """The target's own gradient: spread p - hit as (spread - hit) p + hit (p - 1)."""
    hit, spread, smooth = terms
    dz = scale * ((spread - hit) * (p_minus_1 + 1.0) + hit * p_minus_1)
    return through_options(dz, z, y, class_weight_ptr, V, scale * smooth, softcap, HAS_SMOOTHING, HAS_SOFTCAP)


@triton.jit
def place_target(values, cols, y, value, start, BLOCK_V: tl.constexpr):
    """`values` with `value` in the target's column, if the block from `start` covers it.

    One block of a row takes this branch, so no other block pays for comparing its columns with the target. A scalar
    store after the row's would be as cheap, but AMD's barrier does not order the global stores of two waves.
    """
    if (y >= start) & (y < start + BLOCK_V):
        values = tl.where(cols == y, value, values)
    return values


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 with its relative precision near 0; series error below 1e-8 of it."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))
    return tl.where(x > -0.03125, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def store_zeros(dlogits_row_ptr, V, BLOCK_V: tl.constexpr):
    """A row of zeros."""
    lanes = columns(dlogits_row_ptr, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        cols = start + lanes
        tl.store(dlogits_row_ptr + cols, tl.zeros_like(cols).to(dlogits_row_ptr.dtype.element_ty), mask=cols < V)
