"""Classes that somebody masked with a large finite number: they count as nothing, whole blocks of them too."""

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
from test_entropy import entropies
from test_triton_kernels import DEVICE, PLAIN

from flow_kernels import kernels


@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e20, -1e30, -1e38, torch.finfo(torch.float32).min, -float("inf")])
@pytest.mark.parametrize("num_classes", [700, 12000, 70000])
def test_a_mask_leaves_the_others_their_loss(num_classes, mask):
    """70000 classes are walked, 12000 stay in registers; all but the last 100 are masked."""
    torch.manual_seed(1)
    logits = torch.full((2, num_classes), mask)
    logits[:, -100:] = 3 * torch.randn(2, 100)
    target = torch.tensor([num_classes - 100, num_classes - 1])
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    kept = logits[:, -100:].double().cpu().requires_grad_()
    expected = torch.nn.functional.cross_entropy(kept, target.cpu() - num_classes + 100, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), kept)
    loss, _, correct = kernels.cross_entropy_fwd(logits, target, None, *PLAIN)
    torch.testing.assert_close(loss.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert correct.cpu().tolist() == (kept.argmax(1) == target.cpu() - num_classes + 100).tolist()
    _, loss, dlogits = kernels.cross_entropy_fwd_bwd(logits, target, torch.ones(2, device=DEVICE), None, *PLAIN)
    torch.testing.assert_close(loss.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dlogits[:, -100:].double().cpu(), gradient, rtol=1e-5, atol=1e-6)
    assert not dlogits[:, :-100].any()
    score, _, entropy = kernels.cross_entropy_score(logits, target, PLAIN[0], 0.0)
    torch.testing.assert_close(score.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double().cpu(), entropies(kept.detach(), torch.zeros(2)), rtol=1e-5, atol=1e-6)
