"""Metrics as ratios of sums over items, their standard errors, and paired differences between two models.

A metric is `R = Σ value / Σ weight` over independent items: nats per token has loss sums over token counts, an accuracy
has 0 or 1 over 1. To first order `R - E[R]` is the mean of `(value - R weight) / mean(weight)`, which gives its standard
error (the linearised variance of a ratio estimator, Cochran, Sampling Techniques, 1977, section 6.4). Two models that
saw the same items differ by far less than their own errors suggest, so differences are resampled over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flow_finetune.errors import InputError

# Entries of the resample-by-item count matrix that is held at one time: 64 MiB of fp64.
_BLOCK_ENTRIES = 2**23
# Of 5 pairs all differ in one direction by chance in one case of 16, so no interval of theirs can be one of 95 %.
_MIN_PAIRS = 6


@dataclass(frozen=True)
class Items:
    """One metric of one model, item by item."""

    ids: Sequence[str]
    value: np.ndarray  # [n] fp64
    weight: np.ndarray  # [n] fp64, positive
    higher_is_better: bool | None = None  # where the metric's name does not say it


class Difference(NamedTuple):
    """A difference of two metrics and the interval it lies in."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def ratio_and_standard_error(value: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """`Σ value / Σ weight` and its standard error, which is NaN for a single item.

        ratio = value.sum() / weight.sum()
        standard_error = sqrt(n / (n - 1) * ((value - ratio * weight) ** 2).sum()) / weight.sum()

    Args:
        value: `[n]`, one entry per item.
        weight: `[n]`, positive.
    """
    value, weight = np.asarray(value, np.float64), np.asarray(weight, np.float64)
    if value.ndim != 1 or value.shape != weight.shape or len(value) == 0:
        raise ValueError(f"value and weight must be two equally long vectors, got {value.shape} and {weight.shape}")
    if not (weight > 0).all():
        raise ValueError("weights must be positive")
    ratio = value.sum() / weight.sum()
    n = len(value)
    if n == 1:
        return float(ratio), float("nan")
    residual = value - ratio * weight
    return float(ratio), float(np.sqrt(n / (n - 1) * (residual @ residual)) / weight.sum())


def paired_difference(
    a: Items,
    b: Items,
    *,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """The metric of `a` minus that of `b`, with the percentile interval of a bootstrap over pairs of items.

    Fewer than 6 pairs say nothing of an interval: it is infinite. Over few items (20, say) it is somewhat too narrow.

    Args:
        a: items of one model.
        b: the same items of the other, in any order.
        transform: applied to both ratios before they are subtracted, for example `np.exp` for perplexity.
        num_resamples: how many times the items are drawn with replacement.
        seed: of the draws; the same items and seed give the same interval.
        level: share of the resamples inside the interval.

    Raises:
        InputError: the two do not have the same items.
    """
    difference, resampled = _bootstrap(a, b, transform, num_resamples, seed)
    return Difference(difference, *_interval(resampled, level))


def paired_mean_difference(
    pairs: Sequence[tuple[Items, Items]],
    *,
    shares: Sequence[float] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """`paired_difference` of a mean over tasks; items are drawn within each task, which stay as they are.

    `shares` are what each task counts in the mean, all the same by default.
    """
    parts = [_bootstrap(a, b, None, num_resamples, seed + index) for index, (a, b) in enumerate(pairs)]
    shares = np.full(len(parts), 1 / len(parts)) if shares is None else np.asarray(shares, np.float64)
    resampled = shares @ np.stack([resampled for _, resampled in parts])
    return Difference(float(shares @ [difference for difference, _ in parts]), *_interval(resampled, level))


def _bootstrap(a: Items, b: Items, transform, num_resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """The difference, and `[num_resamples]` differences of resampled items; NaN where there are too few of them."""
    columns = _join(a, b)
    apply = transform or (lambda ratio: ratio)

    def difference(sums: np.ndarray) -> np.ndarray:
        return apply(sums[:, 0] / sums[:, 1]) - apply(sums[:, 2] / sums[:, 3])

    n = len(columns)
    whole = float(difference(columns.sum(0, keepdims=True))[0])
    if n < _MIN_PAIRS:
        return whole, np.full(num_resamples, np.nan)
    rng = np.random.default_rng(seed)
    block = max(_BLOCK_ENTRIES // n, 1)
    resampled = []
    for first in range(0, num_resamples, block):
        rows = min(block, num_resamples - first)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        # How often each item was drawn; sums over a resample are then one matrix product.
        counts = np.bincount(drawn.reshape(-1), minlength=rows * n).reshape(rows, n)
        resampled.append(difference(counts.astype(np.float64) @ columns))
    return whole, np.concatenate(resampled)


def _interval(resampled: np.ndarray, level: float) -> tuple[float, float]:
    if np.isnan(resampled).any():
        return -np.inf, np.inf
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _join(a: Items, b: Items) -> np.ndarray:
    """`[n, 4]`: value and weight of `a`, then of `b`, item by item in the order of `a`."""
    rows = {}
    for name, items in (("first", a), ("second", b)):
        rows[name] = {item: index for index, item in enumerate(items.ids)}
        if len(rows[name]) != len(items.ids):
            raise InputError(f"the {name} of two compared models has repeated items; evaluate it again")
    missing = {
        "first": [i for i in a.ids if i not in rows["second"]],
        "second": [i for i in b.ids if i not in rows["first"]],
    }
    if missing["first"] or missing["second"] or not len(a.ids):
        only = [f"{len(m)} only in the {name} (such as {m[0]!r})" for name, m in missing.items() if m]
        raise InputError(
            f"two models were not evaluated on the same items: {', '.join(only) or 'neither has any'}; evaluate both "
            "on the same file with the same limits"
        )
    order = [rows["second"][item] for item in a.ids]
    columns = (a.value, a.weight, np.asarray(b.value)[order], np.asarray(b.weight)[order])
    return np.stack([np.asarray(c, np.float64) for c in columns], axis=1)
