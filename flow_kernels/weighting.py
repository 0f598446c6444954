"""From pre-trained losses to FLOW weights: the temperature, the weights, and how many samples they amount to.

`w_i = exp(-f_i / tau)` with `tau = median_i f_i`. Up to their sum the weights are the minimiser over the simplex of
`sum_i pi_i f_i + tau sum_i pi_i log pi_i`, so `normalize="simplex"` gives `softmax(-f / tau)`; a large temperature
gives equal weights, that is plain fine-tuning. Source: section 3 and theorem 3.1 of arXiv 2502.02797.

These functions run once per data set, not once per step; they look at values, which synchronises an accelerator.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

NORMALIZATIONS = ("none", "mean", "simplex")
_MEDIAN = 0.5


def _selected(losses: Tensor, mask: Tensor | None) -> Tensor:
    """The losses that count, flat; their values are not looked at."""
    if not isinstance(losses, Tensor) or not losses.dtype.is_floating_point:
        raise TypeError("losses must be a floating-point tensor")
    if mask is None:
        values = losses.reshape(-1)
    else:
        if mask.shape != losses.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be boolean of shape {tuple(losses.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        values = losses[mask]
    return values.detach()


def _check_finite(losses: Tensor, mask: Tensor | None = None) -> None:
    bad = (~torch.isfinite(losses) if mask is None else ~torch.isfinite(losses) & mask).nonzero()
    if bad.shape[0]:
        index = bad[0].tolist()
        raise ValueError(
            f"{bad.shape[0]} losses are not finite, the first, losses{index}, is {float(losses[tuple(index)])}; "
            "drop these samples before weighting"
        )


def _gather(values: Tensor, group) -> Tensor:
    """All ranks' values, in rank order, whatever their numbers: no padding enters the result."""
    count = torch.tensor([values.numel()], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    longest = max(int(c) for c in counts)
    padded = torch.cat([values, values.new_zeros(longest - values.numel())])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])


def temperature(losses: Tensor, *, quantile: float = 0.5, mask: Tensor | None = None, group=None) -> Tensor:
    """The quantile of the pre-trained losses that serves as temperature; the median by default.

        tau = np.quantile(losses[mask], quantile)          # linear interpolation, exact at any size

    Args:
        losses: per-sample mean losses (or per-token losses), any shape, floating, nats.
        quantile: in [0, 1].
        mask: boolean of the same shape, True where there is a loss.
        group: a `torch.distributed` process group, each rank holding its own part of the losses; the quantile is that
            of all parts together. Parts may differ in size, and none is padded. `dist.group.WORLD` for all ranks.

    Returns:
        0-d fp64 tensor on the device of `losses`, nats.

    Raises:
        TypeError: losses that are not floating.
        ValueError: a quantile outside [0, 1], a mask that does not fit, fewer than 2 losses, a loss that is not finite, or
            a temperature that is not positive.
    """
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    values = _selected(losses, mask).double()
    if group is None:
        _check_finite(losses, mask)
    else:
        # Checked together, so that every rank raises and none waits for one that did.
        values = _gather(values, group)
        _check_finite(values)
    if values.numel() < 2:
        raise ValueError(
            f"a temperature needs at least 2 losses, got {values.numel()}; score more samples or pass a number"
        )
    values = values.sort().values
    position = quantile * (values.numel() - 1)
    below = int(position)
    above = min(below + 1, values.numel() - 1)
    tau = torch.lerp(values[below], values[above], position - below)
    if not bool(tau > 0):  # finite, as the losses are
        raise ValueError(
            f"the temperature must be positive and finite, got {float(tau)}: a pre-trained model with loss 0 on these "
            "samples leaves nothing to weight; use a higher quantile or plain fine-tuning"
        )
    return tau


def flow_weights(
    losses: Tensor,
    temperature: float | Tensor | None = None,
    *,
    quantile: float = _MEDIAN,
    mask: Tensor | None = None,
    clip: tuple[float | None, float | None] | None = None,
    normalize: str = "none",
    group=None,
) -> Tensor:
    """FLOW's weight of every sample (or token): easy ones up.

        weights = torch.exp(-losses / temperature)

    Args:
        losses: the pre-trained model's losses, any shape, floating, nats.
        temperature: in nats; the `quantile` of these losses, their median, when not given.
        mask: boolean of the same shape, True where there is a loss; the weight is 0 elsewhere.
        clip: `(lowest, highest)` weight, either may be None; applied before `normalize`.
        normalize: "none"; "mean": the weights average 1, so the step keeps the size of plain fine-tuning;
            "simplex": they sum to 1, `softmax(-losses / temperature)`.
        group: a `torch.distributed` process group as in `temperature`, each rank holding its own part of the losses: the
            temperature that is not given, and `normalize`, are then those of all parts together.

    Returns:
        fp32 weights of the shape of `losses` (fp64 for fp64 losses). No gradient flows through them.

    Raises:
        TypeError: losses that are not floating.
        ValueError: as `temperature` where none is given; losses that are not finite; a temperature that is not positive
            and finite, or given beside a quantile; a mask or an option that does not fit; weights that are all 0 and to
            be normalised.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
    values = everyone = _selected(losses, mask).double()
    if group is None:
        _check_finite(losses, mask)
    else:
        everyone = _gather(values, group)
        _check_finite(everyone)
    if temperature is None:
        tau = _quantile_of(everyone, quantile)
    elif quantile != _MEDIAN:
        raise ValueError(f"temperature is given, so quantile={quantile}, which would find one, has no effect; give one")
    else:
        tau = torch.as_tensor(temperature, dtype=torch.float64, device=losses.device).detach()
        if tau.dim() != 0:
            raise ValueError(f"temperature must be a number or a 0-d tensor, got shape {tuple(tau.shape)}")
        if not bool(tau > 0) or not bool(torch.isfinite(tau)):
            raise ValueError(f"the temperature must be positive and finite, got {float(tau)}")
    lowest, highest = (None, None) if clip is None else clip
    bounds = [bound for bound in (lowest, highest) if bound is not None]
    if any(math.isnan(bound) for bound in bounds) or bounds != sorted(bounds):
        raise ValueError(f"clip must be (lowest, highest), got {clip}")
    is_clipped = bool(bounds)
    # exp(-(f - min f) / tau) has the same ratios and cannot underflow everywhere.
    start = everyone.min() if normalize != "none" and not is_clipped and everyone.numel() else 0.0

    def weigh(losses: Tensor) -> Tensor:
        weights = torch.exp(-(losses - start) / tau)
        return weights.clamp(lowest, highest) if is_clipped else weights

    weights = weigh(values)
    if normalize != "none" and everyone.numel():
        total = weigh(everyone).sum()
        if not bool(total > 0):
            raise ValueError("all weights are 0, so they cannot be normalised; raise the temperature or the clip")
        weights = weights / total * (everyone.numel() if normalize == "mean" else 1)
    dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
    if mask is None:
        return weights.reshape(losses.shape).to(dtype)
    out = torch.zeros(losses.shape, dtype=dtype, device=losses.device)
    out[mask] = weights.to(dtype)
    return out


def _quantile_of(losses: Tensor, quantile: float) -> Tensor:
    # `flow_weights` has an argument named temperature; this reaches the function behind it.
    return temperature(losses, quantile=quantile)


def effective_sample_size(weights: Tensor) -> Tensor:
    """How many equally weighted samples carry as much as these: `(sum w)^2 / sum w^2`, 0 when all weights are 0.

    Returns a 0-d fp64 tensor between 0 and the number of weights. Source: Kish, Survey Sampling (1965).
    """
    weights = weights.detach().double()
    if weights.numel():
        # Relative to the largest: the squares of weights near 1e-200 are no fp64 numbers.
        largest = weights.abs().max()
        weights = weights / torch.where(largest == 0, 1.0, largest)
    square_sum = weights.square().sum()
    return torch.where(square_sum == 0, 0.0, weights.sum().square() / torch.where(square_sum == 0, 1.0, square_sum))
