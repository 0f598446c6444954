"""What the operators must compute, in a few lines of plain torch and numpy, and the checkers that compare.

Nothing here imports flow_kernels: definitions go through `F.log_softmax`, `F.cross_entropy`, `F.linear`, autograd and
Python loops, in fp64 unless `dtype` says otherwise. A checker takes the function under test as an argument, so
`test_planted_mistakes.py` can hand it wrong ones and see them refused.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100

# (rtol, atol) by the dtype of the compared value, for a value rounded into it once. Losses are fp32 for every input
# dtype narrower than fp64, so bf16 logits get the fp32 line; its atol is 4 eps, the roundings of a sum of exponentials
# near 1, which is what the loss of a confident row is the logarithm of. bf16 and fp16: rtol is one eps.
TOLERANCES = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (1e-5, 2**-21),
    torch.bfloat16: (2**-7, 0.0),
    torch.float16: (2**-10, 0.0),
}
# Terms of a gradient that cancel, and what is small beside kept 16-bit exponentials, err by so many accumulation eps.
TERM_ROUNDINGS = 64


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_losses(z: Tensor, target: Tensor, *, weight=None, label_smoothing=0.0, softcap=None, z_loss=0.0) -> Tensor:
    """Losses of rows that all have a target, in the dtype of `z`."""
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    weight = None if weight is None else weight.to(z.dtype)
    loss = F.cross_entropy(z, target, weight, reduction="none", label_smoothing=label_smoothing)
    return loss + z_loss * torch.logsumexp(z, -1) ** 2


def sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> list[range]:
    """The flat rows of every sequence."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [range(a, b) for a, b in pairwise(ends)]
    length = shape[-1] if len(shape) else 1
    return [range(a, a + length) for a in range(0, shape.numel(), length)] if shape.numel() else []


def spread_weights(sample_weight: Tensor | None, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """One weight per flat row, differentiable in `sample_weight`."""
    if sample_weight is None:
        return torch.ones(shape.numel(), dtype=torch.float64)
    if sample_weight.shape == shape and (cu_seqlens is None or sample_weight.numel() != cu_seqlens.numel() - 1):
        return sample_weight.double().reshape(-1)
    if cu_seqlens is not None:
        owner = [s for s, rows in enumerate(sequences(shape, cu_seqlens)) for _ in rows]
    else:
        owner = [row * shape[0] // shape.numel() for row in range(shape.numel())]
    return sample_weight.double()[torch.tensor(owner, dtype=torch.long)]


class Problem(NamedTuple):
    """A flat weighted loss: `sum(row_weight * loss)`, with `row_weight = sample weight / count`."""

    loss: Tensor  # [N] unweighted, 0 where ignored or of weight 0
    row_weight: Tensor  # [N]
    sample_weight: Tensor  # [N]
    keep: Tensor  # [N] bool


def problem(
    input, target, *, weight=None, sample_weight=None, cu_seqlens=None, ignore_index=IGNORE, normalizer="targets",
    shift=False, dtype=torch.float64, **options,
) -> Problem:  # fmt: skip
    """The definition of everything before the reduction."""
    z = input.reshape(target.numel(), input.shape[-1]).to(dtype)
    y = target.reshape(-1).long()
    w = spread_weights(sample_weight, target.shape, cu_seqlens)
    if shift:
        source = list(range(len(y)))
        last = []
        for rows in sequences(target.shape, cu_seqlens):
            for row in rows:
                source[row] = min(row + 1, rows[-1])
            last += rows[-1:]
        y, w = y[source], w[source]
        y[last] = ignore_index
    has_target = y != ignore_index
    keep = has_target & (w != 0)
    loss = torch.zeros(len(y), dtype=dtype)
    kept = keep.nonzero().squeeze(1)
    loss = loss.index_put((kept,), row_losses(z[kept], y[kept], weight=weight, **options))
    if isinstance(normalizer, str):
        share = torch.ones(int(has_target.sum()), dtype=torch.float64)
        share = share if weight is None else weight.double()[y[has_target]]
        count = (share * w[has_target] if normalizer == "weights" else share).sum()
    else:
        count = torch.as_tensor(normalizer, dtype=torch.float64)
    return Problem(loss, (w / count if count != 0 else 0 * w), w, keep)


def cross_entropy(input: Tensor, target: Tensor, *, reduction: str = "mean", **options) -> Tensor:
    """Weighted cross-entropy by definition; differentiable in `input` and `sample_weight`."""
    p = problem(input, target, **options)
    if reduction == "none":
        return (p.sample_weight * p.loss).reshape(target.shape)
    return ((p.row_weight if reduction == "mean" else p.sample_weight) * p.loss).sum()


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias=None, dtype=torch.float64, **options
) -> Tensor:
    """The same of a linear head, the logits in `dtype`."""
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return cross_entropy(F.linear(input.to(dtype), linear_weight.to(dtype), bias), target, dtype=dtype, **options)


def samples(input, target, *, cu_seqlens=None, **options) -> tuple[list[float], list[int], list[int]]:
    """`(loss_sum, num_targets, num_correct)` of every sample by a loop; 1-D targets without offsets: a row a sample."""
    p = problem(input, target, cu_seqlens=cu_seqlens, **options)
    best = input.reshape(target.numel(), -1).double().argmax(-1)
    y = shifted_target(target, cu_seqlens, options.get("ignore_index", IGNORE), options.get("shift", False))
    if cu_seqlens is None:
        size = target[0].numel() if target.dim() > 1 else 1
        parts = [range(a, a + size) for a in range(0, target.numel(), size)]
    else:
        parts = sequences(target.shape, cu_seqlens)
    return (
        [sum(float(p.loss[r]) for r in rows) for rows in parts],
        [sum(int(p.keep[r]) for r in rows) for rows in parts],
        [sum(int(p.keep[r] and best[r] == y[r]) for r in rows) for rows in parts],
    )


def shifted_target(target: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool = True) -> Tensor:
    """Flat labels, each row's being the next one of its sequence when `shift`."""
    flat = target.reshape(-1).tolist()
    if shift:
        flat = [
            flat[row + 1] if row + 1 in rows else ignore_index
            for rows in sequences(target.shape, cu_seqlens)
            for row in rows
        ]
    return torch.tensor(flat, dtype=torch.long)


def temperature(losses, quantile=0.5) -> float:
    """numpy's linear quantile."""
    return float(np.quantile(np.asarray(losses, dtype=np.float64), quantile))


def flow_weights(losses, tau, clip=None, normalize="none") -> np.ndarray:
    """exp(-f / tau), clipped, then scaled to mean 1 or sum 1."""
    weights = np.exp(-np.asarray(losses, dtype=np.float64) / tau)
    if clip is not None:
        weights = np.clip(weights, *clip)
    return {"none": weights, "mean": weights / weights.mean(), "simplex": weights / weights.sum()}[normalize]


def effective_sample_size(weights) -> float:
    """Kish's formula."""
    weights = np.asarray(weights, dtype=np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """`actual` is the fp64 `expected` rounded once into its own dtype."""
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_bounded(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """`|actual - expected| <= bound` elementwise; NaN fails."""
    error = (actual.double() - expected.double()).abs()
    inside = error <= bound
    assert bool(inside.all()), (
        f"error {float(error[~inside].flatten()[0])}, worst {float(error.nan_to_num(1e300).max())}"
    )


def assert_row_gradients(actual: Tensor, expected: Tensor, terms: Tensor) -> None:
    """Gradients of logits, elementwise: one rounding into their dtype, and a few eps of the terms that cancel."""
    info = torch.finfo(actual.dtype)
    rtol, _ = TOLERANCES[actual.dtype]
    rounding = TERM_ROUNDINGS * torch.finfo(loss_dtype(actual.dtype)).eps * terms.abs().unsqueeze(-1)
    smallest = max(info.smallest_normal * info.eps, 2**-126)  # products may flush fp32's subnormals
    assert_bounded(actual, expected, rtol * expected.abs() + rounding + smallest)


def assert_like_torch(actual: Tensor, expected: Tensor, same_dtype: Tensor, dtype: torch.dtype, terms: int) -> None:
    """What goes through a matrix product: the largest error is at most that of torch in the same `dtype`, plus one eps
    of the largest entry in bf16 and fp16, and sqrt(terms) eps in fp32, for another order of summation."""
    if dtype == torch.float64:
        assert_close(actual, expected)
    elif expected.numel():
        scale, worst = expected.abs().max(), (same_dtype.double() - expected).abs().max()
        roundings = 1 if dtype in (torch.bfloat16, torch.float16) else terms**0.5
        assert_bounded(actual, expected, worst + roundings * torch.finfo(dtype).eps * scale)


def upstream_like(loss: Tensor) -> Tensor:
    """A random upstream gradient, every third row of it zero; a random scalar for a scalar."""
    generator = torch.Generator().manual_seed(loss.numel())
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    if loss.dim():
        upstream.view(-1)[::3] = 0
    return upstream


def leaf(tensor: Tensor | None) -> Tensor | None:
    """The same values and strides as a new leaf that requires a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_()


# Checkers: `fn(input, target, **options)` has the arguments of `flow_kernels.cross_entropy`


def check_cross_entropy(fn, input: Tensor, target: Tensor, *, upstream: Tensor | None = None, **options) -> None:
    """Loss, its dtype and shape, gradients of input and sample weights, and that no tensor of the caller changed."""
    before = {"input": input.detach().clone(), "target": target.clone()}
    weights = options.pop("sample_weight", None)
    x, w, x64, w64 = leaf(input), leaf(weights), leaf(input.double()), leaf(weights)
    given = {} if w is None else {"sample_weight": w}
    actual = fn(x, target, **given, **options)
    expected = cross_entropy(x64, target, sample_weight=w64, **options)
    assert actual.dtype == loss_dtype(input.dtype)
    assert actual.shape == expected.shape
    reduction = options.pop("reduction", "mean")
    with torch.no_grad():
        p = problem(input.double(), target, sample_weight=weights, **options)
        row_scale = p.row_weight if reduction == "mean" else p.sample_weight
        rtol, atol = TOLERANCES[actual.dtype]
        # Every row loss may err by rtol and atol; a reduced loss by their weighted sum.
        bound = row_scale.abs() * (rtol * p.loss + atol)
        assert_bounded(actual, expected, bound.reshape(target.shape) if reduction == "none" else bound.sum())

    upstream = upstream_like(expected) if upstream is None else upstream
    actual.backward(upstream.to(actual.dtype))
    expected.backward(upstream.to(actual.dtype).double())
    assert x.grad.dtype == input.dtype
    with torch.no_grad():
        row_scale = (row_scale.reshape(target.shape) * upstream).reshape(-1) * p.keep
        if options.get("weight") is not None:
            row_scale = row_scale * options["weight"].double().max().clamp(min=1)
        shape = (target.numel(), input.shape[-1])
        lse = torch.where(p.keep, torch.logsumexp(input.double().reshape(shape), -1), 0.0)  # left out: maybe NaN
        row_scale = row_scale * (1 + 2 * options.get("z_loss", 0.0) * lse.abs())
        is_exact = reduction == "none" and not any(map(options.get, ("label_smoothing", "z_loss", "softcap")))
    assert_row_gradients(x.grad.reshape(shape), x64.grad.nan_to_num(0.0).reshape(shape), row_scale * (not is_exact))
    if w is not None:
        assert_close(w.grad.double() if w.dtype != loss_dtype(input.dtype) else w.grad, w64.grad)
    torch.testing.assert_close(input.detach(), before["input"], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(target, before["target"], rtol=0, atol=0)


def batch(num_rows=24, num_classes=37, dtype=torch.float32, scale=3.0, seed=0) -> tuple[Tensor, Tensor]:
    """Random logits and targets, a few rows ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(num_rows, num_classes, generator=generator)).to(dtype)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    target[1::7] = IGNORE
    return logits, target


def sample_weights(num: int, seed=1) -> Tensor:
    """FLOW-like weights in (0, 1], one of them zero, one negative and one larger than 1."""
    weights = torch.rand(num, generator=torch.Generator().manual_seed(seed))
    for index, value in ((2, 0.0), (3, -0.7), (4, 2.5)):
        weights[index : index + 1] = value
    return weights


def confident_batch(dtype: torch.dtype, probability: float, num_rows=16, num_classes=64) -> tuple[Tensor, Tensor]:
    """Rows whose target has about `probability`: the ones that FLOW up-weights and bf16 loses first."""
    logits, target = batch(num_rows, num_classes, torch.float64, 1.0)
    target = target.clamp(min=0)
    others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    logits.scatter_(1, target[:, None], (others + np.log(probability / (1 - probability)))[:, None])
    return logits.to(dtype), target


def check_losses(fn, dtype=torch.bfloat16) -> None:
    """Row losses, at fp32 precision whatever the dtype of the logits, flat and peaked."""
    for scale in (1.0, 20.0):
        check_cross_entropy(fn, *batch(dtype=dtype, scale=scale), reduction="none")


def check_far_targets(fn, dtype=torch.float32) -> None:
    """Targets some hundred nats below the largest logit: finite losses and gradients."""
    logits, target = batch(dtype=dtype)
    logits[::2, 0] += 300
    target[::2] = 1
    check_cross_entropy(fn, logits, target, reduction="none")


def check_row_gradients(fn, dtype=torch.float32) -> None:
    """A different upstream gradient for every row, zero rows, and a stride-0 upstream."""
    logits, target = batch(dtype=dtype)
    check_cross_entropy(fn, logits, target, reduction="none")
    constant = torch.tensor(-1.5, dtype=torch.float64).expand(target.shape)
    check_cross_entropy(fn, logits, target, reduction="none", upstream=constant)


def check_confident_rows(fn, dtype=torch.bfloat16) -> None:
    """Gradients of rows with p of the target 0.9 to 0.9999."""
    for probability in (0.9, 0.99, 0.999, 0.9999):
        for reduction in ("sum", "none"):
            check_cross_entropy(fn, *confident_batch(dtype, probability), reduction=reduction)


def check_sample_weights(fn, dtype=torch.float32) -> None:
    """One weight per row, under every reduction; "mean" divides by the number of targets."""
    logits, target = batch(dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        check_cross_entropy(fn, logits, target, sample_weight=sample_weights(len(target)), reduction=reduction)


def check_normalizers(fn, dtype=torch.float32) -> None:
    """Every denominator of "mean"."""
    logits, target = batch(dtype=dtype)
    for normalizer in ("targets", "weights", 7, 2.5, np.int64(9), torch.tensor(11)):
        check_cross_entropy(fn, logits, target, sample_weight=sample_weights(len(target)), normalizer=normalizer)


def check_shift(fn, dtype=torch.float32) -> None:
    """Labels, their count and row weights shifted within each sequence."""
    logits, target = batch(dtype=dtype)
    weights = sample_weights(len(target))
    check_cross_entropy(fn, logits, target, shift=True, sample_weight=weights)
    check_cross_entropy(fn, logits.view(4, 6, -1), target.view(4, 6), shift=True, sample_weight=weights.view(4, 6))
    cu_seqlens = torch.tensor([0, 5, 5, 6, 20, 24])
    check_cross_entropy(fn, logits, target, shift=True, sample_weight=weights, cu_seqlens=cu_seqlens)
    check_cross_entropy(fn, logits, target, shift=True, sample_weight=weights[:5], cu_seqlens=cu_seqlens)


def check_ignored_rows(fn, dtype=torch.float32) -> None:
    """Ignored rows count nowhere, even when they hold NaN and inf."""
    logits, target = batch(dtype=dtype)
    check_cross_entropy(fn, logits, target)
    logits[1::14], logits[8::14] = torch.nan, torch.inf
    for reduction in ("mean", "sum", "none"):
        check_cross_entropy(fn, logits, target, reduction=reduction)


def check_zero_weight_rows(fn, dtype=torch.float32) -> None:
    """Rows of weight 0 are left out, even when they hold NaN and inf."""
    logits, target = batch(dtype=dtype)
    weights = torch.ones(len(target))
    weights[::5], logits[::10], logits[5::10] = 0.0, torch.nan, torch.inf
    for reduction in ("mean", "sum", "none"):
        check_cross_entropy(fn, logits, target, sample_weight=weights, reduction=reduction)


CHECKERS = (
    check_losses, check_far_targets, check_row_gradients, check_confident_rows, check_sample_weights,
    check_normalizers, check_shift, check_ignored_rows, check_zero_weight_rows,
)  # fmt: skip


def check_linear_cross_entropy(
    fn, input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias=None, sample_weight=None, **options
) -> None:
    """Loss and every gradient of a linear head; no worse than F.linear + F.cross_entropy in the same dtype."""
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}

    def run(function, **extra):
        leaves = {name: leaf(t) for name, t in tensors.items()}
        weights = None if sample_weight is None else sample_weight.clone()
        loss = function(
            leaves["input"], leaves["linear_weight"], target, linear_bias=leaves["linear_bias"],
            sample_weight=weights, **extra, **options,
        )  # fmt: skip
        loss.backward(upstream_like(loss).to(loss.dtype))
        return {"loss": loss.detach(), **{n: t.grad for n, t in leaves.items() if t is not None}}

    before = {name: t.detach().clone() for name, t in tensors.items() if t is not None}
    actual = run(fn)
    tensors = {name: None if t is None else t.double() for name, t in tensors.items()}
    expected = run(linear_cross_entropy)
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    same_dtype = run(lambda *args, **kwargs: linear_cross_entropy(*args, dtype=input.dtype, **kwargs))
    same_dtype["loss"] = same_dtype["loss"].to(input.dtype)
    assert actual["loss"].dtype == loss_dtype(input.dtype)
    # Losses may be of logits in 16 bits, and are not such numbers themselves.
    if input.dtype in (torch.bfloat16, torch.float16) and expected["loss"].any():
        assert not torch.equal(actual["loss"], actual["loss"].to(input.dtype).float())
    for name, value in actual.items():
        assert value.dtype == (loss_dtype(input.dtype) if name == "loss" else input.dtype)
        assert_like_torch(
            value, expected[name], same_dtype[name], input.dtype, max(*linear_weight.shape, target.numel())
        )
    for name, value in before.items():
        torch.testing.assert_close(tensors[name].detach(), value, rtol=0, atol=0)
