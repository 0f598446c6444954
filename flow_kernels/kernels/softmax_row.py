"""What every kernel does to one row of logits: load, running (max, sum), loss, gradient. Device functions only.

Legend: `row_ptr` the row's first logit, `cols` int32 column numbers of any shape, `width = (V, end)` the number of columns
and the one that accesses stop before, None where that is V, `scale` the row's weight or upstream gradient, `softcap` c,
`terms = (hit, spread, smooth)` of the gradient

    dz_j = scale (spread p_j - hit [j = y] - smooth weight_j) (1 - (z_j / c)^2)

with the formulas of `flow_kernels.reference`. An optional pointer that is None leaves its part out at compile time.

A mask that ends in the middle of a thread's 16 bytes makes every access one element wide. Rows of any V whose memory goes
on to a multiple of 16 elements, with -inf from V on, are therefore read and written up to there, the `end`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, so that (-inf) - LOWEST is not NaN, and not lower, because where a whole block holds
# one finite mask the exponent z LOG2E + shift is the rounding error of the shift, below 64 at this size. What lies below,
# a mask of -1e10 or -1e30, counts as 0.
LOWEST = tl.constexpr(-1.0e9)


@triton.jit
def columns(ptr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr, DEPTH: tl.constexpr):
    """Columns [DEPTH, threads, G] in groups of G = 16 bytes: a thread owns DEPTH whole groups and reduces them alone.

    The columns of a group are neighbours, for one access of 16 bytes, where rows are ALIGNED to them. Elsewhere accesses
    are one element wide: neighbours then belong to neighbouring threads, so that a warp still moves whole sectors.
    """
    GROUP: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    THREADS: tl.constexpr = BLOCK_V // GROUP // DEPTH
    depth, thread = tl.arange(0, DEPTH)[:, None, None], tl.arange(0, THREADS)[None, :, None]
    place = tl.arange(0, GROUP)[None, None, :]
    return (depth * THREADS + thread) * GROUP + place if ALIGNED else (depth * GROUP + place) * THREADS + thread


@triton.jit
def is_accessed(cols, width):
    """Whether a column is read and written: the mask of every access."""
    return cols < (width[0] if width[1] is None else width[1])


@triton.jit
def thread_max(z):
    """The maximum of each thread's columns, without a word to the others."""
    return tl.max(tl.max(z, 2), 0)


@triton.jit
def thread_sum(z):
    return tl.sum(tl.sum(z, 2), 0)


@triton.jit
def through_head(x, bias_ptr, cols, width, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw logits to fp32 logits with bias and soft-cap; -inf from V on."""
    z = x.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=is_accessed(cols, width), other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        # tanh |u| = (1 - t) / (1 + t) with t = exp(-2 |u|): no overflow, and one exponential in base 2.
        t = tl.exp2(tl.abs(z) * (-2.0 * LOG2E / softcap))
        capped = softcap * (1.0 - t) / (1.0 + t)
        z = tl.where(cols < width[0], tl.where(z < 0, -capped, capped), -float("inf"))
    return z


@triton.jit
def load_raw(row_ptr, cols, width):
    return tl.load(row_ptr + cols, mask=is_accessed(cols, width), other=-float("inf"))


@triton.jit
def load_logits(row_ptr, bias_ptr, cols, width, softcap, HAS_SOFTCAP: tl.constexpr):
    return through_head(load_raw(row_ptr, cols, width), bias_ptr, cols, width, softcap, HAS_SOFTCAP)


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
def smoothing_sum(z, class_weight_ptr, cols, width):
    """Sum of weight_j z_j over the columns of each thread."""
    if class_weight_ptr is not None:
        z *= tl.load(class_weight_ptr + cols, mask=is_accessed(cols, width), other=0.0)
    return thread_sum(tl.where(cols < width[0], z, 0.0))


@triton.jit
def group_of(ptr, y, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Number and columns [G] of the group that column y is in, in blocks of `columns` with DEPTH 1."""
    GROUP: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    THREADS: tl.constexpr = BLOCK_V // GROUP
    if ALIGNED:
        number = y // GROUP
        cols = number * GROUP + tl.arange(0, GROUP)
    else:
        block = y // BLOCK_V
        number = block * THREADS + y % THREADS
        cols = block * BLOCK_V + y % THREADS + tl.arange(0, GROUP) * THREADS
    return number, cols


@triton.jit
def start_threads(z, thread):
    """Every thread's running (max, shift, sum of exp) before its first block, the first thread's with logits z [G]."""
    z_max = tl.maximum(tl.max(z, 0), LOWEST)
    shift = z_max * -LOG2E
    z_sum = tl.sum(tl.exp2(tl.fma(z, LOG2E, shift)), 0)
    is_first = thread == 0
    return tl.where(is_first, z_max, LOWEST), tl.where(is_first, shift, LOWEST * -LOG2E), tl.where(is_first, z_sum, 0.0)


@triton.jit
def accumulate(z, running, is_counted):
    """Bring a block into every thread's running (max, shift, sum): one exponential a logit and one a block.

    The sum is of 2^(z LOG2E + shift), with the shift -max LOG2E as it was rounded, so that its rounding is no error. A
    minimum makes it, because a product could be fused into the difference below, unrounded. Where `is_counted`
    [threads] is given and false, the block raises the maximum but adds nothing to the sum.
    """
    new_max = tl.maximum(running[0], thread_max(z))
    shift = tl.minimum(running[1], new_max * -LOG2E)
    block_sum = thread_sum(tl.exp2(tl.fma(z, LOG2E, shift[None, :, None])))
    if is_counted is not None:
        block_sum = tl.where(is_counted, block_sum, 0.0)
    return new_max, shift, running[2] * tl.exp2(shift - running[1]) + block_sum


@triton.jit
def merge_threads(running, z_target):
    """The threads' (max, shift, sum) as (max, sum of exp(z - max)), in a fixed order: the row's only reduction.

    `z_target` changes nothing, but every thread has then waited for its load of it before any can leave the reduction
    and overwrite it in place.
    """
    z_max = tl.max(tl.maximum(running[0], tl.minimum(z_target, LOWEST)), 0)
    shift = tl.min(running[1], 0)
    total = tl.sum(running[2] * tl.exp2(shift - running[1]), 0)
    # What rounding took from the shift; the bounds are for maxima so large that an fp32 sum means nothing.
    rest = tl.fma(z_max, -LOG2E, -shift)
    return z_max, total * tl.exp2(tl.minimum(tl.maximum(rest, -1.0), 1.0))


@triton.jit
def accumulate_products(z, running, products):
    """`accumulate` with every thread's sum of e u, e = 2^u and u = z LOG2E + shift, beside its sum of e."""
    new_max = tl.maximum(running[0], thread_max(z))
    shift = tl.minimum(running[1], new_max * -LOG2E)
    u = tl.fma(z, LOG2E, shift[None, :, None])
    e = tl.exp2(u)
    lowered = shift - running[1]
    factor = tl.exp2(lowered)
    products = (products + running[2] * lowered) * factor + thread_sum(times_exponent(e, u))
    return (new_max, shift, running[2] * factor + thread_sum(e)), products


@triton.jit
def times_exponent(e, u):
    """e u with e = 2^u, and 0 where u is -inf."""
    return e * tl.maximum(u, -200.0)


@triton.jit
def merge_products(running, products, z_max):
    """The threads' sums of e u as one of e = exp(z - z_max) and u = (z - z_max) LOG2E; `z_max` from `merge_threads`."""
    shift = tl.min(running[1], 0)
    lowered = shift - running[1]
    total = tl.sum(running[2] * tl.exp2(lowered), 0)
    product = tl.sum((products + running[2] * lowered) * tl.exp2(lowered), 0)
    rest = tl.minimum(tl.maximum(tl.fma(z_max, -LOG2E, -shift), -1.0), 1.0)
    return (product + total * rest) * tl.exp2(rest)


@triton.jit
def row_entropy(z_max, others, product, z_target):
    """Entropy of the row in nats, from the sums over all columns but the target's, which joins them here."""
    row_max = tl.maximum(z_max, z_target)
    lowered = (z_max - row_max) * LOG2E
    u = (z_target - row_max) * LOG2E
    share = tl.exp2(u)
    product = (product + others * lowered) * tl.exp2(lowered) + times_exponent(share, u)
    others *= tl.exp2(lowered)
    entropy = log_of_sum(others, share) - LN2 * product / (others + share)
    # Rounding must not make it negative; NaN stays.
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def walk_row(
    row_ptr, target, z_target, bias_ptr, class_weight_ptr, width, softcap, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """One read of a row: `(z_max, others, weighted, max_before, product)`.

    `z_max` and `others` leave the target out, `weighted` is sum_j weight_j z_j (with HAS_SMOOTHING), `max_before` the
    maximum of the columns before the target, `product` what `row_entropy` needs (with HAS_ENTROPY).
    """
    lanes = columns(row_ptr, ALIGNED, BLOCK_V, DEPTH)
    lowest = tl.full([lanes.shape[1]], LOWEST, tl.float32)
    running = (lowest, lowest * -LOG2E, tl.zeros_like(lowest))
    weighted = tl.zeros_like(lowest)
    products = tl.zeros_like(lowest)
    max_before = tl.max(lowest, 0)
    for start in range(0, width[0], BLOCK_V):
        cols = start + lanes
        z = load_logits(row_ptr, bias_ptr, cols, width, softcap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            weighted += smoothing_sum(z, class_weight_ptr, cols, width)
        # One block of a row takes this branch, so no other block pays for comparing its columns with the target.
        if (target >= start) & (target < start + BLOCK_V):
            before = thread_max(tl.where(cols < target, z, -float("inf")))
            max_before = tl.max(tl.maximum(running[0], before), 0)
            z = tl.where(cols == target, -float("inf"), z)
        if HAS_ENTROPY:
            running, products = accumulate_products(z, running, products)
        else:
            running = accumulate(z, running, None)
    z_max, others = merge_threads(running, z_target)
    product = 0.0
    if HAS_ENTROPY:
        product = merge_products(running, products, z_max)
    return z_max, others, tl.sum(weighted, 0), max_before, product


@triton.jit
def log_of_sum(others, share):
    """log(others + share), where `share` is 1 if the target is the maximum."""
    # log1p by its series where the target is the maximum and the rest is small; relative error below 2e-8. Beyond it the
    # sum's rounding is up to 5 eps of the logarithm.
    tail = 0.2 - others * (1.0 / 6.0 - others * (1.0 / 7.0 - others * 0.125))
    series = others * (1.0 - others * (0.5 - others * (1.0 / 3.0 - others * (0.25 - others * tail))))
    return tl.where((share == 1.0) & (others < 0.125), series, tl.log2(others + share) * LN2)


@triton.jit
def merge_target(z_max, others, z_target):
    """Bring the target's logit into `(z_max, others)`: `(nll, lse, p_target - 1, softmax)`.

    `softmax = (shift, 1 / sum, log sum)` gives p_j = exp(z_j - shift) / sum with shift the row's maximum.
    exp(z_j - lse) would carry the rounding of lse, some 1e-6 of every p at lse = 16, where this one carries that of
    z_j - shift.
    """
    row_max = tl.maximum(z_max, z_target)
    others *= tl.exp2((z_max - row_max) * LOG2E)
    share = tl.exp2((z_target - row_max) * LOG2E)
    log_sum = log_of_sum(others, share)
    total = others + share
    return (row_max - z_target) + log_sum, row_max + log_sum, -others / total, (row_max, 1.0 / total, log_sum)


@triton.jit
def is_prediction(z_target, z_max, max_before, nll):
    """Whether the target is what argmax finds, the first of equal logits; in a row that holds a NaN nothing is.

    The nll of a prediction is not negative, and NaN is neither.
    """
    return (z_target >= z_max) & (z_target > max_before) & (nll >= 0)


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
    dz, z, cols, class_weight_ptr, width, smooth, softcap, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """What smoothing subtracts (`smooth` already scaled), then the chain rule through the soft-cap."""
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            dz -= smooth * tl.load(class_weight_ptr + cols, mask=is_accessed(cols, width), other=0.0)
        else:
            dz -= smooth
    if HAS_SOFTCAP:
        u = z * (1.0 / softcap)
        dz *= 1.0 - u * u
    return dz


@triton.jit
def others_gradient(
    z, cols, softmax, terms, scale, class_weight_ptr, width, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of every column but the target's, whose place gets a value that somebody else must replace.

    `softmax` as from `merge_target`.
    """
    # exp(z - shift) in one fused operation and one exponential a logit; what rounding took from shift * LOG2E goes into
    # the row's factor.
    shift = softmax[0] * -LOG2E
    factor = scale * terms[1] * softmax[1] * tl.exp2(tl.fma(softmax[0], -LOG2E, -shift))
    dz = factor * tl.exp2(tl.fma(z, LOG2E, shift))
    return through_options(dz, z, cols, class_weight_ptr, width, scale * terms[2], softcap, HAS_SMOOTHING, HAS_SOFTCAP)


@triton.jit
def target_gradient(
    z, p_minus_1, y, terms, scale, class_weight_ptr, width, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The target's own gradient: spread p - hit as (spread - hit) p + hit (p - 1)."""
    hit, spread, smooth = terms
    dz = scale * ((spread - hit) * (p_minus_1 + 1.0) + hit * p_minus_1)
    return through_options(dz, z, y, class_weight_ptr, width, scale * smooth, softcap, HAS_SMOOTHING, HAS_SOFTCAP)


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
    """exp(x) - 1 for x <= 0 with its relative precision near 0; series error below 2e-8 of it.

    Where the series ends the difference has lost 2 eps; ending it at -1/32, as four terms allow, would lose 17.
    """
    tail = 1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0)))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * tail)))
    return tl.where(x > -0.34375, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def store_zeros(dlogits_row_ptr, width, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """A row of zeros."""
    lanes = columns(dlogits_row_ptr, ALIGNED, BLOCK_V, 1)
    for start in range(0, width[0], BLOCK_V):
        cols = start + lanes
        zeros = tl.zeros_like(cols).to(dlogits_row_ptr.dtype.element_ty)
        tl.store(dlogits_row_ptr + cols, zeros, mask=is_accessed(cols, width))
