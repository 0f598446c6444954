"""From what a caller passes to flat rows: shapes checked, labels shifted, sample weights spread over their rows.

Every reduction is a row weight: mean is 1 / count, sum is 1, FLOW is w / count. This module makes that one vector;
the kernels know nothing of reductions, counts or samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from flow_kernels.reference import accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Rows:
    """N flat rows of a batch, and what is needed to give results the batch's shape back."""

    input: Tensor  # [N, V] or [N, D]
    target: Tensor  # [N] int64, contiguous; ignore_index where there is nothing to predict
    shape: torch.Size  # the target's shape before flattening
    ignore_index: int


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be looked at: only eagerly and on the CPU, so that no accelerator is synchronised.

    Subclasses, such as the fake tensors of a shape-only run, have no values or hold them elsewhere.
    """
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return is_plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_same_device(input: Tensor, of: str = "input", **others: Tensor | None) -> None:
    """Raise unless every tensor given is on the device of `input`, which the caller knows as `of`."""
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device} but {of} is on {input.device}; move one of them")


def check_no_tangent(instead: str, *tensors: Tensor | None) -> None:
    """Raise where a forward-mode tangent is carried, which would be lost in silence; `instead` is what carries it."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "flow_kernels' operators have no forward-mode derivative (torch.func.jvp, jacfwd); "
            f"use reverse mode, or torch.nn.functional.{instead}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> None:
    """Raise unless `cu_seqlens` is a 1-D integer tensor rising from 0 to `num_rows`."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in INDEX_DTYPES or cu_seqlens.numel() < 1:
        raise ValueError(
            "cu_seqlens must be a 1-D integer tensor of num_sequences + 1 offsets, got shape "
            f"{tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}"
        )
    if reads_values(cu_seqlens):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_rows:
            raise ValueError(
                f"cu_seqlens must run from 0 to the number of rows {num_rows}, "
                f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
            )
        falls = (cu_seqlens.to(torch.int64).diff() < 0).nonzero()
        if falls.numel():
            raise ValueError(f"cu_seqlens must not fall, but it does after entry {int(falls[0])}")


def flatten(input: Tensor, target: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool) -> Rows:
    """Check `input [..., V or D]` and `target [...]` against each other and make them N flat rows.

    With `shift`, row t is paired with the target of t + 1 of the same sequence, and the last row of a sequence has
    none; the input is not copied.
    """
    check_floating("input", input)
    if not isinstance(target, Tensor) or target.dtype not in INDEX_DTYPES:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        hint = ""
        if isinstance(target, Tensor) and target.dtype.is_floating_point:
            hint = "; class probabilities (mixup, soft labels) are served by torch.nn.functional.cross_entropy"
        raise TypeError(f"target must be an integer tensor of class indices, got {got}{hint}")
    if input.dim() == 0 or input.shape[:-1] != target.shape:
        hint = ""
        if input.dim() > 2 and target.shape == input.shape[:1] + input.shape[2:]:
            hint = "; classes are the last dimension here, use input.movedim(1, -1)"
        raise ValueError(
            f"input of shape {tuple(input.shape)} needs a target of shape {tuple(input.shape[:-1])}, "
            f"got {tuple(target.shape)}{hint}"
        )
    check_same_device(input, target=target, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, target.numel())
    shape = target.shape
    target = target.to(torch.int64)
    if shift:
        if target.dim() == 0:
            raise ValueError("shift=True needs a sequence dimension, but target is a scalar")
        target = _next_target(target, cu_seqlens, ignore_index)
    return Rows(input.reshape(target.numel(), input.shape[-1]), target.reshape(-1), shape, ignore_index)


def _next_target(target: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    if cu_seqlens is None:
        return torch.cat([target[..., 1:], torch.full_like(target[..., :1], ignore_index)], -1)
    flat = target.reshape(-1)
    shifted = torch.cat([flat[1:], torch.full_like(flat[:1], ignore_index)])
    row = torch.arange(flat.numel(), device=flat.device)
    is_last = segment_ids(cu_seqlens, flat.numel()) != segment_ids(cu_seqlens, flat.numel(), row + 1)
    return torch.where(is_last, ignore_index, shifted).reshape(target.shape)


def segment_ids(cu_seqlens: Tensor, num_rows: int, rows: Tensor | None = None) -> Tensor:
    """The sequence that each of `rows` (all of `num_rows` when not given) belongs to, without a synchronisation."""
    if rows is None:
        rows = torch.arange(num_rows, device=cu_seqlens.device)
    return torch.bucketize(rows, cu_seqlens[1:].to(torch.int64), right=True)


def spread_sample_weight(
    sample_weight: Tensor | None, rows: Rows, cu_seqlens: Tensor | None, shift: bool
) -> Tensor | None:
    """One weight per flat row, `[N]` in the accumulation dtype, from one per row, per leading index or per sequence.

    Weights per row stand beside the labels as passed, so with `shift` they move with them.
    """
    if sample_weight is None:
        return None
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a tensor, got {type(sample_weight).__name__}")
    check_same_device(rows.input, sample_weight=sample_weight)
    weight = sample_weight.to(accumulation_dtype(rows.input.dtype))
    spread = _spread(weight, rows, cu_seqlens, shift)
    if reads_values(weight) and not _is_finite_at_a_glance(weight):
        _check_finite(weight, spread, rows, cu_seqlens, shift)
    return spread


def _spread(weight: Tensor, rows: Rows, cu_seqlens: Tensor | None, shift: bool) -> Tensor:
    num_rows = rows.target.numel()
    if cu_seqlens is not None and weight.shape == (cu_seqlens.numel() - 1,):
        # Rows behind the last offset, which only eager code on the CPU refuses, have no weight: NaN, if they count.
        return F.pad(weight, (0, 1), value=math.nan)[segment_ids(cu_seqlens, num_rows)]
    if weight.shape == rows.shape:
        if not shift:
            return weight.reshape(-1)
        # The last row of a sequence has no target, so what rolls into it there is never read.
        return weight.reshape(-1).roll(-1)
    if cu_seqlens is None and len(rows.shape) >= 2 and weight.shape == rows.shape[:1]:
        return weight.reshape(-1, *[1] * (len(rows.shape) - 1)).expand(rows.shape).reshape(-1)
    allowed = [f"{tuple(rows.shape)} (one per row)"]
    if cu_seqlens is not None:
        allowed.append(f"({cu_seqlens.numel() - 1},) (one per sequence of cu_seqlens)")
    elif len(rows.shape) >= 2:
        allowed.append(f"({rows.shape[0]},) (one per leading index)")
    raise ValueError(f"sample_weight has shape {tuple(weight.shape)}; it must be {' or '.join(allowed)}")


def _check_finite(weight: Tensor, spread: Tensor, rows: Rows, cu_seqlens: Tensor | None, shift: bool) -> None:
    """Raise for the first weight of a row that counts which is not finite."""
    bad = ~torch.isfinite(spread) & (rows.target != rows.ignore_index)
    if not bad.nonzero().shape[0]:  # which a tracer (make_fx) allows, and not a look at a number
        return
    places = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
    flat = int(_spread(places, rows, cu_seqlens, shift)[bad].min())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), weight.shape)]
    raise ValueError(f"sample_weight{index} is {float(weight[tuple(index)])}; weights must be finite")


def _is_finite_at_a_glance(weight: Tensor) -> bool:
    """Whether the sum says that all are finite; where it does not, because it is too large as well, each is looked at.

    A tracer (make_fx) refuses the look at a number that the sum takes.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and math.isfinite(weight.detach().sum().item())


def drop_rows(rows: Rows, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Target and weight of the rows that count: a row of weight 0 becomes an ignored one, an ignored row's weight 0.

    Neither enters a computation then: the weight of a sample without targets may be 0 / 0.
    """
    if weight is None:
        return rows.target, None
    kept = rows.target.masked_fill(weight == 0, rows.ignore_index)
    return kept, weight.masked_fill(rows.target == rows.ignore_index, 0)


def row_weights(
    rows: Rows,
    weight: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    normalizer: str | float | Tensor,
) -> Tensor:
    """The vector `g [N]` for which the reduced loss is `sum(g * row_loss)`: `weight / count`, 0 where count is 0."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    dtype = accumulation_dtype(rows.input.dtype)
    if weight is None:
        weight = torch.ones(rows.target.numel(), dtype=dtype, device=rows.input.device)
    if reduction == "sum":
        if not (isinstance(normalizer, str) and normalizer == "targets"):
            raise ValueError("normalizer goes with reduction='mean'; reduction='sum' divides by nothing")
        return weight
    count = _count(rows, weight, class_weight, normalizer)
    return weight / count.masked_fill(count == 0, math.inf)


def scalar(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number or a 0-d tensor as a 0-d tensor on `device`, without a wait for it where the host knows the number."""
    if isinstance(value, Tensor) and (device.type == "cpu" or not reads_values(value)):
        return value.to(device, dtype)
    # Not as_tensor and not `to`: a copy from the host's memory would wait for the device.
    return torch.full((), float(value), dtype=dtype, device=device)


def _count(rows: Rows, weight: Tensor, class_weight: Tensor | None, normalizer: str | float | Tensor) -> Tensor:
    if isinstance(normalizer, str):
        if normalizer not in ("targets", "weights"):
            raise ValueError(f"normalizer must be 'targets', 'weights', a number or a 0-d tensor, got {normalizer!r}")
        share = (rows.target != rows.ignore_index).to(weight.dtype)
        if class_weight is not None and class_weight.numel():
            share = share * class_weight[rows.target.clamp(0, class_weight.numel() - 1)]
        if normalizer == "weights":
            share = torch.where(share == 0, 0.0, share * weight)
        return share.sum()
    if not isinstance(normalizer, (Real, Tensor)):
        got = type(normalizer).__name__
        raise TypeError(f"normalizer must be 'targets', 'weights', a number or a 0-d tensor, got {got}")
    if isinstance(normalizer, Tensor) and normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
    # A number is the host's to look at, wherever the rows are; a compiler's may be a symbol.
    is_known = reads_values(normalizer) if isinstance(normalizer, Tensor) else not torch.compiler.is_compiling()
    if is_known and not math.isfinite(normalizer):
        raise ValueError(f"normalizer must be finite, got {float(normalizer)}")
    return scalar(normalizer, weight.device, weight.dtype)
