"""What must hold for any batch, over examples that hypothesis draws; both operators, every backend."""

from functools import partial

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_heads import identity_head

from flow_kernels import cross_entropy, flow_weights, linear_cross_entropy


@pytest.fixture(
    params=[cross_entropy, identity_head(linear_cross_entropy)], ids=["cross_entropy", "identity_head"], scope="session"
)
def loss_fn(request, backend):
    return partial(request.param, backend=backend)


seeds = st.integers(0, 2**31)
options = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.7]),
        "softcap": st.sampled_from([2.0, 30.0]),
        "z_loss": st.sampled_from([1e-3, 0.1]),
    },
)
reductions = st.sampled_from(["mean", "sum", "none"])


def draw(seed, num_rows=None):
    """A batch of random size: logits, targets (some ignored), weights in (0, 2]."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 20, (), generator=g)) if num_rows is None else num_rows
    v = int(torch.randint(2, 40, (), generator=g))
    scale = float(torch.rand((), generator=g)) * 10
    logits = scale * torch.randn(n, v, generator=g)
    target = torch.randint(v, (n,), generator=g)
    target[torch.rand(n, generator=g) < 0.2] = oracle.IGNORE
    return logits, target, 2 - 2 * torch.rand(n, generator=g), g


def value_and_gradient(fn, logits, target, upstream=None, **kwargs):
    """The loss and the gradient of the logits, for an upstream gradient of ones when none is given."""
    logits = logits.detach().clone().requires_grad_()
    loss = fn(logits, target, **kwargs)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), logits.grad


@given(seed=seeds, reduction=reductions, options=options)
def test_equals_the_definition(loss_fn, seed, reduction, options):
    logits, target, weights, _ = draw(seed)
    oracle.check_cross_entropy(loss_fn, logits, target, sample_weight=weights, reduction=reduction, **options)


@given(seed=seeds, shift=st.floats(-50, 50), smoothing=st.sampled_from([0.0, 0.2]))
def test_shift_of_all_logits_changes_nothing(loss_fn, seed, shift, smoothing):
    logits, target, weights, _ = draw(seed)
    kwargs = {"sample_weight": weights, "reduction": "none", "label_smoothing": smoothing}
    loss, gradient = value_and_gradient(loss_fn, logits, target, **kwargs)
    moved, moved_gradient = value_and_gradient(loss_fn, logits + shift, target, **kwargs)
    # Adding the shift rounds the logits themselves, by half an eps of up to 100.
    torch.testing.assert_close(moved, loss, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-4, atol=5e-5)


@given(seed=seeds, smoothing=st.sampled_from([0.0, 0.2]), reduction=reductions)
def test_row_gradients_sum_to_zero(loss_fn, seed, smoothing, reduction):
    logits, target, weights, _ = draw(seed)
    _, gradient = value_and_gradient(
        loss_fn, logits, target, sample_weight=weights, label_smoothing=smoothing, reduction=reduction
    )
    # Neither a sum nor an lse of the size of the logits (about 50) is rounded on the way to the probabilities.
    torch.testing.assert_close(gradient.sum(1), torch.zeros(len(target)), rtol=0, atol=2e-6)


@given(seed=seeds, factor=st.sampled_from([-2.0, 0.25, 3.0]), reduction=reductions, options=options)
def test_linear_in_the_row_weight(loss_fn, seed, factor, reduction, options):
    logits, target, first, g = draw(seed)
    second = torch.rand(len(target), generator=g) + 0.1
    parts = [
        value_and_gradient(loss_fn, logits, target, sample_weight=w, reduction=reduction, **options)
        for w in (first, second, first + factor * second)
    ]
    for a, b, combined in zip(*parts, strict=True):
        terms = a.abs() + abs(factor) * b.abs()
        bound = 1e-5 * (terms if reduction == "none" and terms.dim() == 1 else terms.sum()) + 1e-6
        oracle.assert_bounded(combined, a + factor * b, bound)


@given(seed=seeds, garbage=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]), reduction=reductions,
       options=options, by=st.sampled_from(["ignored", "weight 0"]))  # fmt: skip
def test_left_out_rows_equal_dropped_rows(loss_fn, seed, garbage, reduction, options, by):
    logits, target, weights, g = draw(seed)
    out = torch.rand(len(target), generator=g) < 0.4
    # Rows of weight 0 count in "targets" (the paper), so both sides divide by the same number.
    kwargs = {"reduction": reduction, **({"normalizer": 5} if reduction == "mean" else {}), **options}
    expected, expected_gradient = value_and_gradient(
        loss_fn, logits[~out], target[~out], sample_weight=weights[~out], **kwargs
    )
    logits, target, weights = logits.clone(), target.clone(), weights.clone()
    logits[out] = garbage
    if by == "ignored":
        target[out] = oracle.IGNORE
    else:
        weights[out] = 0
    loss, gradient = value_and_gradient(loss_fn, logits, target, sample_weight=weights, **kwargs)
    kept_loss = loss[~out] if reduction == "none" else loss
    torch.testing.assert_close(kept_loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[~out], expected_gradient, rtol=1e-5, atol=1e-7)
    assert not gradient[out].any()
    if reduction == "none":
        assert not loss[out].any()


@given(seed=seeds, reduction=reductions)
def test_large_temperature_is_unweighted(loss_fn, seed, reduction):
    logits, target, losses, _ = draw(seed)
    weights = flow_weights(losses, 1e12)
    weighted = value_and_gradient(loss_fn, logits, target, sample_weight=weights, reduction=reduction)
    plain = value_and_gradient(loss_fn, logits, target, reduction=reduction)
    torch.testing.assert_close(weighted, plain, rtol=1e-6, atol=1e-7)


@given(seed=seeds, lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), packed=st.booleans(),
       as_tensor=st.booleans())  # fmt: skip
def test_micro_batches_equal_one_batch(loss_fn, seed, lengths, packed, as_tensor):
    # Unequal lengths and weights; every micro-batch divides by the target count of the whole step.
    logits, target, row_weights, g = draw(seed, sum(lengths))
    sequence_weights = torch.rand(len(lengths), generator=g)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    weights = sequence_weights if packed else row_weights
    kwargs = {"cu_seqlens": cu_seqlens} if packed else {}
    whole, whole_gradient = value_and_gradient(loss_fn, logits, target, sample_weight=weights, **kwargs)
    count = (target != oracle.IGNORE).sum()
    leaf, total = logits.clone().requires_grad_(), 0.0
    for i, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        part = {"sample_weight": weights[i : i + 1], "cu_seqlens": torch.tensor([0, length])} if packed else {}
        loss = loss_fn(
            leaf[rows], target[rows], normalizer=count if as_tensor else int(count),
            **(part or {"sample_weight": weights[rows]}),
        )  # fmt: skip
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(torch.as_tensor(total), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, whole_gradient, rtol=1e-5, atol=1e-7)


@given(seed=seeds, reduction=reductions, normalizer=st.sampled_from(["targets", "weights", 0, 0.0, 3]), options=options,
       case=st.sampled_from(["all ignored", "all weights 0", "no rows"]), garbage=st.booleans())  # fmt: skip
def test_nothing_counts(loss_fn, seed, reduction, normalizer, options, case, garbage):
    logits, target, weights, _ = draw(seed)
    if garbage:
        logits = torch.full_like(logits, torch.nan)
    if case == "all ignored":
        target = torch.full_like(target, oracle.IGNORE)
    elif case == "all weights 0":
        weights = torch.zeros_like(weights)
    else:
        logits, target, weights = logits[:0], target[:0], weights[:0]
    kwargs = {"normalizer": normalizer} if reduction == "mean" else {}
    weights.requires_grad_()
    logits.requires_grad_()
    loss = loss_fn(logits, target, sample_weight=weights, reduction=reduction, **kwargs, **options)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert not loss.any()
    # The graph is intact: other ranks wait for these gradients.
    loss.sum().backward()
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()
    assert torch.isfinite(weights.grad).all()


@given(seed=seeds, normalizer=st.sampled_from([0, 0.0, torch.tensor(0), torch.tensor(0.0)]))
def test_normalizer_zero_is_zero(loss_fn, seed, normalizer):
    logits, target, weights, _ = draw(seed)
    loss, gradient = value_and_gradient(loss_fn, logits, target, sample_weight=weights, normalizer=normalizer)
    assert loss == 0
    assert not gradient.any()


@given(seed=seeds, reduction=reductions, options=options)
def test_permuting_rows_permutes_results(loss_fn, seed, reduction, options):
    logits, target, weights, g = draw(seed)
    order = torch.randperm(len(target), generator=g)
    upstream = torch.randn(len(target), generator=g) if reduction == "none" else torch.tensor(1.7)
    kwargs = {"reduction": reduction, **options}
    loss, gradient = value_and_gradient(loss_fn, logits, target, upstream, sample_weight=weights, **kwargs)
    permuted, permuted_gradient = value_and_gradient(
        loss_fn, logits[order], target[order], upstream[order] if reduction == "none" else upstream,
        sample_weight=weights[order], **kwargs,
    )  # fmt: skip
    torch.testing.assert_close(permuted, loss[order] if reduction == "none" else loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=1e-5, atol=1e-7)


@given(seed=seeds, chunk_size=st.integers(1, 25), reduction=reductions)
def test_chunk_size_changes_nothing(backend, seed, chunk_size, reduction):
    input, target, weights, g = draw(seed)
    linear_weight = torch.randn(40, input.shape[1], generator=g) / 8

    def run(chunk_size):
        leaves = [input.clone().requires_grad_(), linear_weight.clone().requires_grad_()]
        loss = linear_cross_entropy(
            *leaves, target, sample_weight=weights, reduction=reduction, chunk_size=chunk_size, backend=backend
        )
        loss.backward(oracle.upstream_like(loss).to(loss.dtype))
        return loss.detach(), *(t.grad for t in leaves)

    torch.testing.assert_close(run(chunk_size), run(None), rtol=1e-5, atol=1e-5)
