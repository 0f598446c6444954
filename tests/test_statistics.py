"""Standard errors and paired intervals against hand computations, brute force and coverage."""

import itertools
import math

import numpy as np
import pytest
from flow_finetune import statistics
from flow_finetune.errors import InputError
from flow_finetune.statistics import Items, paired_difference, paired_mean_difference, ratio_and_standard_error


def items(value, weight=None, ids=None) -> Items:
    value = np.asarray(value, np.float64)
    weight = np.ones(len(value)) if weight is None else np.asarray(weight, np.float64)
    return Items([str(i) for i in range(len(value))] if ids is None else ids, value, weight)


def test_ratio_by_hand():
    # R = 12 / 6 = 2; residuals 0, -1, 1; sqrt(3 / 2 * 2) / 6.
    ratio, error = ratio_and_standard_error([2.0, 3.0, 7.0], [1.0, 2.0, 3.0])
    assert ratio == 2.0
    assert error == pytest.approx(math.sqrt(3) / 6)


def test_equal_weights_give_the_standard_error_of_a_mean():
    value = np.random.default_rng(0).normal(size=50)
    ratio, error = ratio_and_standard_error(value, np.full(50, 3.0))
    assert ratio == pytest.approx(value.mean() / 3)
    assert error == pytest.approx(value.std(ddof=1) / math.sqrt(50) / 3)


def test_standard_error_is_the_spread_over_repeated_draws():
    rng = np.random.default_rng(1)
    weight = rng.integers(5, 60, size=(2000, 200))
    value = weight * rng.normal(2.0, 0.5, size=weight.shape) + 0.02 * weight**2
    results = np.array([ratio_and_standard_error(v, w) for v, w in zip(value, weight, strict=True)])
    # 2000 draws estimate a standard deviation within 1.6 % (one sigma).
    assert results[:, 1].mean() == pytest.approx(results[:, 0].std(), rel=0.06)


def test_one_item_has_no_standard_error():
    ratio, error = ratio_and_standard_error([3.0], [2.0])
    assert ratio == 1.5
    assert math.isnan(error)


@pytest.mark.parametrize(("value", "weight"), [([], []), ([1.0, 2.0], [1.0]), ([1.0], [0.0]), ([[1.0]], [[1.0]])])
def test_ratio_refuses(value, weight):
    with pytest.raises(ValueError, match="weight"):
        ratio_and_standard_error(value, weight)


def test_interval_of_three_items_is_that_of_all_27_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "_MIN_PAIRS", 3)
    a, b = np.array([4.0, 1.0, 9.0]), np.array([3.0, 2.0, 2.0])
    weight = np.array([1.0, 2.0, 3.0])
    draws = [list(d) for d in itertools.product(range(3), repeat=3)]
    every = [np.exp(a[d].sum() / weight[d].sum() / 3) - np.exp(b[d].sum() / weight[d].sum() / 3) for d in draws]
    found = paired_difference(
        items(a, weight), items(b, weight), transform=lambda r: np.exp(r / 3), num_resamples=200_000, level=0.8
    )
    assert found.difference == pytest.approx(math.exp(14 / 6 / 3) - math.exp(7 / 6 / 3))
    # Exact quantiles of the bootstrap distribution, as steps: inside the gap between neighbours.
    every = np.sort(every)
    for value, share in ((found.low, 0.1), (found.high, 0.9)):
        assert np.isclose(every, value, atol=1e-9).any()
        below = (every < value - 1e-9).mean()
        upto = (every < value + 1e-9).mean()
        assert below - 0.005 <= share <= upto + 0.005


def test_interval_agrees_with_a_plain_loop():
    rng = np.random.default_rng(2)
    weight_a, weight_b = rng.integers(1, 40, 80), rng.integers(1, 40, 80)
    a, b = weight_a * rng.gamma(2.0, 1.0, 80), weight_b * rng.gamma(2.0, 1.2, 80)
    found = paired_difference(items(a, weight_a), items(b, weight_b), num_resamples=20_000, seed=3)
    loop = []
    for _ in range(20_000):
        d = rng.integers(80, size=80)
        loop.append(a[d].sum() / weight_a[d].sum() - b[d].sum() / weight_b[d].sum())
    spread = np.std(loop)
    assert found.difference == pytest.approx(a.sum() / weight_a.sum() - b.sum() / weight_b.sum())
    # The error of a 2.5 % quantile of 20,000 draws is 0.02 standard deviations.
    assert found.low == pytest.approx(np.quantile(loop, 0.025), abs=0.1 * spread)
    assert found.high == pytest.approx(np.quantile(loop, 0.975), abs=0.1 * spread)


def test_pairing_matters_and_order_does_not():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 5, 100)
    a, b = items(hard + 0.2 + rng.normal(0, 0.1, 100)), items(hard)
    found = paired_difference(a, b, num_resamples=2000)
    assert found.excludes_zero
    assert 0.1 < found.low < found.difference < found.high < 0.3
    order = rng.permutation(100)
    shuffled = items(b.value[order], ids=[b.ids[i] for i in order])
    assert paired_difference(a, shuffled, num_resamples=2000) == found
    unpaired = items(b.value, ids=list(reversed(b.ids)))
    assert not paired_difference(a, unpaired, num_resamples=2000).excludes_zero


def test_five_pairs_tell_nothing_and_six_do():
    # All of n pairs differ in one direction by chance with probability 2^(1 - n): 1 in 16 of 5, 1 in 32 of 6.
    rng = np.random.default_rng(9)
    pairs = [(items(rng.uniform(1, 2, n)), items(np.zeros(n))) for n in (1, 5, 6)]
    for (a, b), known in zip(pairs, (False, False, True), strict=True):
        found = paired_difference(a, b, num_resamples=500)
        assert found.difference == pytest.approx(a.value.mean())
        assert found.excludes_zero == known
        assert math.isfinite(found.low) == math.isfinite(found.high) == known
    assert not paired_mean_difference(pairs, num_resamples=500).excludes_zero


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(5)
    a, b = items(rng.normal(size=30)), items(rng.normal(size=30))
    whole = paired_difference(a, b, num_resamples=1000)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 70)
    np.testing.assert_allclose(paired_difference(a, b, num_resamples=1000), whole, rtol=1e-12, atol=1e-12)


def test_mean_over_tasks():
    rng = np.random.default_rng(6)
    pairs = [(items(rng.normal(1, 1, 40)), items(rng.normal(0, 1, 40))),
             (items(rng.normal(3, 2, 160)), items(rng.normal(0, 2, 160)))]  # fmt: skip
    found = paired_mean_difference(pairs)
    differences = [a.value - b.value for a, b in pairs]
    assert found.difference == pytest.approx(np.mean([d.mean() for d in differences]))
    error = math.sqrt(sum(d.var() / len(d) for d in differences)) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_different_items_are_refused():
    with pytest.raises(InputError, match=r"1 only in the first \(such as '2'\).*same limits"):
        paired_difference(items([1.0, 2.0, 3.0]), items([1.0, 2.0]))
    with pytest.raises(InputError, match=r"1 only in the second \(such as 'x'\)"):
        paired_difference(items([1.0]), items([1.0, 2.0], ids=["0", "x"]))
    with pytest.raises(InputError, match="repeated items"):
        paired_difference(items([1.0, 2.0], ids=["0", "0"]), items([1.0]))
    with pytest.raises(InputError, match="neither has any"):
        paired_difference(items([]), items([]))
