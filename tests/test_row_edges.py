"""Rows at the edge of fp32, on every backend: targets that are nearly certain, and logits that are no numbers."""

import oracle
import pytest
import torch
from linear_heads import identity_head

from flow_kernels import cross_entropy, linear_cross_entropy, linear_score_tokens, score_tokens

# Input dtypes and reductions whose gradient is made in a backward pass of its own.
TWO_PASSES = [
    (torch.float16, "mean"),
    (torch.float16, "sum"),
    (torch.float16, "none"),
    (torch.float32, "none"),
    (torch.bfloat16, "none"),
]


@pytest.mark.parametrize("offset", [0.0, 20.0, 40.0])
@pytest.mark.parametrize("probability", [0.9, 0.97, 0.999, 0.9999, 0.999999])
@pytest.mark.parametrize(("dtype", "reduction"), TWO_PASSES)
@pytest.mark.parametrize(
    "loss_fn", [cross_entropy, identity_head(linear_cross_entropy)], ids=["cross_entropy", "identity_head"]
)
def test_confident_rows_far_from_zero(backend, loss_fn, dtype, reduction, probability, offset):
    """Every gradient within a few eps of fp32, relative to itself, and one rounding to its dtype.

    At an offset of 40 the rounding of an lse to fp32 is a fiftieth of 1 - p where p is 0.9999.
    """
    logits, target = oracle.confident_batch(torch.float64, probability)
    logits = (logits + offset).to(dtype).requires_grad_()
    # As a gradient scaler does, so that fp16 has normal numbers for what is left of 1 - p.
    scale = 2.0**12
    (scale * loss_fn(logits, target, reduction=reduction, backend=backend)).sum().backward()
    z = logits.detach().double()
    log_p = z.log_softmax(1)
    share = scale / len(target) if reduction == "mean" else scale
    others = torch.where(torch.nn.functional.one_hot(target, z.shape[1]).bool(), 0.0, log_p.exp())
    expected = share * others.scatter(1, target[:, None], -others.sum(1, keepdim=True))
    # The exponent of p_j is a rounded difference, and the target's p - 1 is the sum of the others: it errs as their mean.
    of_target = (others * log_p).sum(1) / others.sum(1)
    fp32_error = torch.finfo(torch.float32).eps * (8 - log_p.scatter(1, target[:, None], of_target[:, None]))
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    oracle.assert_bounded(logits.grad, expected, (fp32_error + rounding) * expected.abs() + smallest)


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_without_a_softmax_has_no_prediction(backend, value, return_entropy):
    """Neither the largest of the other logits nor the one that spoils the row counts as predicted."""
    logits = torch.tensor([value, 1.0, 0.0]).expand(3, 3)
    target = torch.tensor([1, 0, 2])
    options = {"return_entropy": return_entropy, "backend": backend}
    for scores in (
        score_tokens(logits, target, **options),
        linear_score_tokens(torch.zeros(3, 2), torch.ones(3, 2), target, linear_bias=logits[0], **options),
    ):
        assert scores.loss.isnan().all()
        assert not scores.correct.any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_infinite_target_spoils_its_whole_row(backend, reduction):
    """The gradient is NaN at every class, as in the reference, and no other row's is."""
    logits, target = oracle.batch(4, 37)
    target.clamp_(min=0)
    logits[2, target[2]] = torch.inf
    options = {"reduction": reduction, "backend": backend}
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, target, **options)
    loss.sum().backward()
    assert loss.isnan().tolist() == ([False, False, True, False] if reduction == "none" else True)
    assert torch.equal(leaf.grad.isnan(), (torch.arange(4) == 2)[:, None].expand(4, 37))

    bias = torch.zeros(37).index_fill(0, torch.tensor([5]), torch.inf).requires_grad_()
    loss = linear_cross_entropy(torch.ones(4, 2), torch.ones(37, 2), torch.full((4,), 5), linear_bias=bias, **options)
    loss.sum().backward()
    assert loss.isnan().all()
    assert bias.grad.isnan().all()
