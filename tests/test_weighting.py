"""Temperature, weights and effective sample size against numpy; the distributed temperature across two processes."""

import math
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import spawn_two

from flow_kernels import cross_entropy, effective_sample_size, flow_weights, score_samples, temperature

positive = st.floats(2**-10, 1000, width=32)
loss_lists = st.lists(positive, min_size=2, max_size=40)
tied_lists = st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=20)


def heavy_tailed(num=1000, seed=0):
    """Losses over ten orders of magnitude, unsorted."""
    return np.random.default_rng(seed).lognormal(0.0, 2.5, num)


@given(losses=st.one_of(loss_lists, tied_lists), quantile=st.floats(0, 1))
def test_temperature_is_the_quantile(losses, quantile):
    for dtype in (torch.float32, torch.float64):
        tau = temperature(torch.tensor(losses, dtype=dtype), quantile=quantile)
        assert tau.shape == ()
        assert tau.dtype == torch.float64
        assert float(tau) == pytest.approx(oracle.temperature(losses, quantile), rel=1e-12)


@pytest.mark.parametrize("num", [2, 3, 10, 11, 1000, 1001])
def test_median_of_even_and_odd_counts(num):
    losses = heavy_tailed(num)
    assert float(temperature(torch.tensor(losses))) == pytest.approx(float(np.median(losses)), rel=1e-15)


def test_temperature_of_half_precision_losses():
    losses = torch.tensor([1.0, 2.0, 3.5, 100.0]).bfloat16()
    assert float(temperature(losses)) == 2.75


def test_temperature_of_many_losses():
    # torch.quantile refuses more than 16 million values; token losses of a data set exceed that.
    losses = torch.rand(2**24 + 3) + 0.5
    assert float(temperature(losses, quantile=0.25)) == pytest.approx(
        float(np.quantile(losses.numpy().astype(np.float64), 0.25)), rel=1e-12
    )


@given(losses=loss_lists, seed=st.integers(0, 2**31), quantile=st.floats(0, 1))
def test_mask_selects(losses, seed, quantile):
    rng = np.random.default_rng(seed)
    mask = rng.random(len(losses)) < 0.7
    mask[:2] = True
    holed = np.where(mask, losses, rng.choice([np.nan, np.inf, 0.0], len(losses)))
    tau = temperature(torch.tensor(holed), quantile=quantile, mask=torch.tensor(mask))
    expected = oracle.temperature(np.array(losses)[mask], quantile)
    assert float(tau) == pytest.approx(expected, rel=1e-12)
    weights = flow_weights(torch.tensor(holed), quantile=quantile, mask=torch.tensor(mask), normalize="mean")
    np.testing.assert_allclose(
        weights[torch.tensor(mask)], oracle.flow_weights(np.array(losses)[mask], expected, normalize="mean"), rtol=1e-9
    )
    assert not weights[torch.tensor(~mask)].any()


@pytest.mark.parametrize("normalize", ["none", "mean", "simplex"])
@pytest.mark.parametrize("clip", [None, (0.1, None), (None, 0.6), (0.2, 0.5), (None, None)])
@pytest.mark.parametrize("given_temperature", [None, 0.7, torch.tensor(2.5)])
def test_weights_of_1000_heavy_tailed_losses(normalize, clip, given_temperature):
    losses = heavy_tailed()
    tau = oracle.temperature(losses) if given_temperature is None else float(given_temperature)
    numpy_clip = None if clip == (None, None) else clip
    expected = oracle.flow_weights(losses, tau, numpy_clip, normalize)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        # exp(-f / tau) of an fp32 loss of 1000 tau errs by 1000 eps.
        weights = flow_weights(torch.tensor(losses, dtype=dtype), given_temperature, clip=clip, normalize=normalize)
        assert weights.dtype == dtype
        np.testing.assert_allclose(weights, expected, rtol=rtol, atol=1e-37)


def test_weights_from_token_losses():
    # From logits to weights: per-sample means of scored tokens, then numpy from the token losses themselves.
    logits, target = oracle.batch(1200, 11)
    lengths = [1, 2, 3, 6] * 100
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    target[cu_seqlens[:-1]] = 5
    scores = score_samples(logits, target, cu_seqlens=cu_seqlens)
    tokens = oracle.cross_entropy(logits.double(), target, reduction="none").numpy()
    valid = (target != oracle.IGNORE).numpy()
    means = np.array([tokens[a:b][valid[a:b]].mean() for a, b in pairwise(cu_seqlens)])
    weights = flow_weights(scores.loss_sum / scores.num_targets)
    np.testing.assert_allclose(weights, oracle.flow_weights(means, np.median(means)), rtol=2e-6)
    # And the weighted loss of the paper from those weights.
    loss = cross_entropy(logits, target, sample_weight=weights, cu_seqlens=cu_seqlens)
    parts = zip(oracle.flow_weights(means, np.median(means)), pairwise(cu_seqlens), strict=True)
    expected = sum(w * tokens[a:b].sum() for w, (a, b) in parts)
    assert float(loss) == pytest.approx(expected / valid.sum(), rel=1e-5)


@given(losses=loss_lists, tau=st.floats(0.05, 100))
def test_simplex_is_softmax_and_sums_to_one(losses, tau):
    losses = torch.tensor(losses, dtype=torch.float64)
    weights = flow_weights(losses, tau, normalize="simplex")
    torch.testing.assert_close(weights, torch.softmax(-losses / tau, 0), rtol=1e-9, atol=1e-300)
    mean = flow_weights(losses, tau, normalize="mean")
    torch.testing.assert_close(mean, weights * len(losses), rtol=1e-9, atol=1e-300)


@given(losses=st.lists(st.floats(0.1, 5), min_size=2, max_size=12), seed=st.integers(0, 2**31))
def test_weights_minimise_the_regularised_objective(losses, seed):
    # Theorem 3.1: sum_i pi_i f_i + tau sum_i pi_i log pi_i over the simplex; strictly, so any other point is worse.
    f = np.array(losses)
    tau = np.median(f)
    best = flow_weights(torch.tensor(f), normalize="simplex").numpy()
    rng = np.random.default_rng(seed)
    far = rng.dirichlet(np.ones(len(f)), 50)
    near = best * np.exp(0.1 * rng.standard_normal((50, len(f))))
    points = np.concatenate([far, near / near.sum(1, keepdims=True), np.full((1, len(f)), 1 / len(f))])

    def objective(pi):
        return (pi * f + tau * pi * np.log(np.maximum(pi, 1e-300))).sum(-1)

    assert (objective(best) <= objective(points) + 1e-12).all()
    # In closed form the minimum is -tau log sum exp(-f / tau).
    assert objective(best) == pytest.approx(-tau * np.log(np.exp(-f / tau).sum()), rel=1e-9, abs=1e-12)


def test_weights_do_not_underflow_when_normalised():
    losses = torch.tensor([2000.0, 2001.0, 2003.0])
    weights = flow_weights(losses, 1.0, normalize="simplex")
    torch.testing.assert_close(weights, torch.softmax(-losses, 0))
    assert not flow_weights(losses, 1.0).any()


@given(losses=loss_lists)
def test_weights_rank_easy_samples_first(losses):
    losses = torch.tensor(losses, dtype=torch.float64)
    weights = flow_weights(losses)
    assert ((weights > 0) | (losses > 500 * temperature(losses))).all()
    assert (weights <= 1).all()
    order = losses.argsort()
    assert (weights[order].diff() <= 0).all()
    # The sample of median loss has weight exp(-1).
    middle = temperature(losses)
    torch.testing.assert_close(flow_weights(middle[None], middle), torch.tensor([math.exp(-1)], dtype=torch.float64))


def test_weights_keep_shape_and_no_gradient():
    losses = torch.rand(3, 4, 2, requires_grad=True)
    weights = flow_weights(losses)
    assert weights.shape == losses.shape
    assert not weights.requires_grad
    assert not temperature(losses).requires_grad
    assert not flow_weights(losses, torch.ones((), requires_grad=True)).requires_grad
    assert flow_weights(torch.rand(4).bfloat16()).dtype == torch.float32


some_weights = st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(lambda w: max(w) > 1e-3)


@given(weights=some_weights)
def test_effective_sample_size_is_kishs(weights):
    size = float(effective_sample_size(torch.tensor(weights, dtype=torch.float64)))
    assert size == pytest.approx(oracle.effective_sample_size(weights), rel=1e-12)


def check_bounds(function, weights):
    """Between one sample and all of them, to rounding, whatever the formula."""
    size = float(function(torch.tensor(weights, dtype=torch.float64)))
    assert 1 - 1e-12 <= size <= len(weights) * (1 + 1e-12)


@given(weights=some_weights)
def test_effective_sample_size_bounds(weights):
    check_bounds(effective_sample_size, weights)


@pytest.mark.parametrize(
    ("mistake", "weights"),
    [
        (lambda w: w.sum(), [3.0, 4.0]),
        (lambda w: w.sum() ** 2 / w.square().sum() / len(w), [1.0, 9.0]),
        (lambda w: w.square().sum() / w.sum() ** 2, [1.0, 1.0]),
    ],
    ids=["not normalised", "a share", "upside down"],
)
def test_bounds_refuse_wrong_sizes(mistake, weights):
    with pytest.raises(AssertionError):
        check_bounds(mistake, weights)


def test_effective_sample_size_extremes():
    assert float(effective_sample_size(torch.full((7,), 0.3))) == pytest.approx(7)
    assert float(effective_sample_size(torch.tensor([0.0, 4.0, 0.0]))) == 1
    assert float(effective_sample_size(torch.zeros(5))) == 0
    assert float(effective_sample_size(torch.zeros(0))) == 0
    # Weights of hard samples reach e^-500; their squares are no fp64 numbers.
    assert float(effective_sample_size(torch.full((3,), 1e-200, dtype=torch.float64))) == pytest.approx(3)


_WEIGHT_OPTIONS = (
    {},
    {"normalize": "mean"},
    {"normalize": "simplex", "temperature": 0.7},
    {"normalize": "mean", "clip": (0.1, 0.6), "quantile": 0.3},
)


def _worker(rank, init, path, parts):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=len(parts))
    taus = [float(temperature(parts[rank], quantile=q, group=dist.group.WORLD)) for q in (0.5, 0.1, 0.83)]
    # A NaN on one rank raises on all: none is left waiting in a collective.
    bad = parts[rank].clone()
    bad[0] = float("nan") if rank == 0 else bad[0]
    with pytest.raises(ValueError, match="1 losses are not finite"):
        temperature(bad, group=dist.group.WORLD)
    world = dist.group.WORLD
    with pytest.raises(ValueError, match="1 losses are not finite"):
        flow_weights(bad, 1.0, group=world)
    weights = [flow_weights(parts[rank], group=world, **options) for options in _WEIGHT_OPTIONS]
    torch.save((taus, weights), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_temperature_and_weights_across_processes(tmp_path):
    losses = torch.tensor(heavy_tailed(101))
    parts = [losses[:1], losses[1:]]
    spawn_two(_worker, (f"file://{tmp_path}/init", str(tmp_path), parts))
    expected = [float(temperature(losses, quantile=q)) for q in (0.5, 0.1, 0.83)]
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [taus for taus, _ in saved] == [expected] * 2
    for number, options in enumerate(_WEIGHT_OPTIONS):
        together = torch.cat([weights[number] for _, weights in saved])
        torch.testing.assert_close(together, flow_weights(losses, **options), rtol=1e-6, atol=0)
    np.testing.assert_allclose(expected, [oracle.temperature(losses, q) for q in (0.5, 0.1, 0.83)], rtol=1e-12)


NAN_LOSSES = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])
BAD = [
    (lambda: temperature(torch.tensor([1.0])), "at least 2 losses, got 1"),
    (lambda: temperature(torch.ones(3), mask=torch.tensor([True, False, False])), "at least 2 losses, got 1"),
    (lambda: temperature(torch.tensor([])), "at least 2 losses, got 0"),
    (lambda: temperature(NAN_LOSSES), r"losses\[1, 0\], is nan"),
    (lambda: temperature(torch.tensor([1.0, 2.0, float("inf")])), r"losses\[2\], is inf"),
    (lambda: temperature(NAN_LOSSES, mask=torch.tensor([[False, False], [True, True]])), r"losses\[1, 0\], is nan"),
    (lambda: flow_weights(NAN_LOSSES, 1.0), r"losses\[1, 0\], is nan"),
    (lambda: flow_weights(torch.tensor(float("nan")), 1.0), "is nan"),
    (lambda: temperature(torch.zeros(4)), "positive and finite, got 0.0"),
    (lambda: flow_weights(torch.zeros(4)), "positive and finite, got 0.0"),
    (lambda: flow_weights(torch.ones(4), 0.0), "positive and finite, got 0.0$"),
    (lambda: flow_weights(torch.ones(4), clip=(float("nan"), None)), r"clip must be \(lowest, highest\), got \(nan"),
    (lambda: flow_weights(torch.ones(4), -1.0), "positive and finite, got -1.0"),
    (lambda: flow_weights(torch.ones(4), float("nan")), "positive and finite, got nan"),
    (lambda: flow_weights(torch.ones(4), float("inf")), "positive and finite, got inf"),
    (lambda: flow_weights(torch.ones(4), torch.ones(4)), r"0-d.*\(4,\)"),
    (
        lambda: temperature(torch.ones(4), mask=torch.ones(4)),
        r"mask must be boolean of shape \(4,\), got torch.float32",
    ),
    (lambda: temperature(torch.ones(4), mask=torch.ones(3, dtype=torch.bool)), r"shape \(4,\), got torch.bool \(3,\)"),
    (lambda: flow_weights(torch.ones(4), mask=torch.ones(2, 2, dtype=torch.bool)), r"shape \(4,\).*\(2, 2\)"),
    (lambda: temperature(torch.ones(4), quantile=1.5), r"quantile must be in \[0, 1\], got 1.5"),
    (lambda: temperature(torch.ones(4), quantile=float("nan")), r"quantile must be in \[0, 1\], got nan"),
    (lambda: flow_weights(torch.ones(4), quantile=-0.1), r"quantile must be in \[0, 1\], got -0.1"),
    (lambda: flow_weights(torch.ones(4), 1.0, quantile=0.9), "temperature is given, so quantile=0.9"),
    (lambda: flow_weights(torch.ones(4), clip=(0.5, 0.1)), r"clip must be \(lowest, highest\), got \(0.5, 0.1\)"),
    (lambda: flow_weights(torch.ones(4), normalize="sum"), "normalize must be one of .*'sum'"),
    (lambda: flow_weights(torch.full((4,), 9e3), 1.0, clip=(None, 0.5), normalize="mean"), "all weights are 0"),
    (lambda: flow_weights(torch.ones(3), clip=(None, 0.0), normalize="simplex"), "all weights are 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("losses", [torch.tensor([1, 2, 3]), [1.0, 2.0], np.ones(3)], ids=["int", "list", "numpy"])
def test_losses_of_a_wrong_type(losses):
    for function in (temperature, flow_weights):
        with pytest.raises(TypeError, match="losses must be a floating-point tensor"):
            function(losses)
