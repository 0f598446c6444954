"""Several upstream gradients at once, as jacobians are made, against F.cross_entropy."""

import oracle
import pytest
import torch
import torch.nn.functional as F

from flow_kernels import cross_entropy, linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_reduced_loss(backend, reduction, dtype):
    logits, target = oracle.batch(dtype=dtype)
    head = torch.randn(9, logits.shape[1], dtype=dtype)
    upstream = torch.tensor([1.0, 0.0, -2.5])

    def gradients(loss, leaves):
        # Of a graph that is kept and of one that is used up: only there may a gradient be scaled in place.
        by_vmap = torch.vmap(lambda g: torch.autograd.grad(loss, leaves, g, retain_graph=True))(upstream)
        kept = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
        last = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
        assert all(map(torch.equal, kept, last))
        assert all(map(torch.equal, kept, by_vmap))
        return last

    given = logits.clone().requires_grad_()
    found = gradients(cross_entropy(given, target, reduction=reduction, backend=backend), [given])
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, target, reduction=reduction)
    expected = torch.autograd.grad(loss, exact, upstream.double(), is_grads_batched=True)
    assert (found[0].shape, found[0].dtype) == ((3, *logits.shape), dtype)
    # Exponents are rounded differences of some units: found up to 2.1 eps (Triton; reference 1.7, CPU 1.2).
    oracle.assert_bounded(found[0], expected[0], 4 * torch.finfo(dtype).eps * expected[0].abs().max())

    leaves = [logits.clone().requires_grad_(), head.clone().requires_grad_()]
    labels = target.clamp(max=8)
    found = gradients(linear_cross_entropy(*leaves, labels, reduction=reduction, backend=backend), leaves)
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = F.cross_entropy(F.linear(*leaves), labels, reduction=reduction)
    expected = torch.autograd.grad(loss, leaves, upstream.double(), is_grads_batched=True)
    for got, wanted in zip(found, expected, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, dtype)
        # The products' operands are rounded to the dtype.
        oracle.assert_bounded(got, wanted, 16 * torch.finfo(dtype).eps * wanted.abs().max())
