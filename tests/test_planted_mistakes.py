"""The suite's own checkers refuse wrong implementations, each a mistake seen in a public library, and accept right ones.

Every mistake is one change to `correct`, a plain torch cross-entropy; a checker that lets it through proves nothing
about the operators.
"""

import oracle
import pytest
import torch
import torch.nn.functional as F

from flow_kernels import cross_entropy


class RowGradients(torch.autograd.Function):
    """Row losses with a hand-written backward, so that mistakes in it can be planted."""

    @staticmethod
    def forward(ctx, logits, target, mistake):
        z = logits.double()
        lse = z.logsumexp(1)
        ctx.save_for_backward(logits, target, lse)
        ctx.mistake = mistake
        return (lse - z.gather(1, target[:, None]).squeeze(1)).to(oracle.loss_dtype(logits.dtype))

    @staticmethod
    def backward(ctx, upstream):
        logits, target, lse = ctx.saved_tensors
        if ctx.mistake == "upstream gradient of row 0":
            upstream = upstream[:1].expand_as(upstream)
        p = torch.exp(logits.double() - lse[:, None])
        if ctx.mistake == "one-hot subtracted after rounding":
            p = p.to(logits.dtype)
        gradient = (p - F.one_hot(target, p.shape[1])) * upstream.double()[:, None]
        return gradient.to(logits.dtype), None, None


def row_losses(z, target, mistake):
    """Losses of rows that all have a target."""
    if mistake == "lse in bf16":
        lse = z.bfloat16().logsumexp(1).float()
        return lse - z.float().gather(1, target[:, None]).squeeze(1)
    if mistake == "-log p":
        return -torch.log(torch.softmax(z.float(), 1).gather(1, target[:, None]).squeeze(1))
    return RowGradients.apply(z, target, mistake)


def implementation(mistake=None):
    """A cross-entropy with the arguments that the checkers use, with one mistake or none."""

    def fn(input, target, *, sample_weight=None, cu_seqlens=None, reduction="mean", normalizer="targets", shift=False):
        offsets = None if mistake == "packed sequences shifted into each other" else cu_seqlens
        y = oracle.shifted_target(target, offsets, oracle.IGNORE, shift)
        w = oracle.spread_weights(sample_weight, target.shape, cu_seqlens).to(oracle.loss_dtype(input.dtype))
        if shift and mistake != "weights left behind by the shift":
            source = oracle.shifted_target(torch.arange(len(y)).view(target.shape), cu_seqlens, 0)
            w = w[source]
        z = input.reshape(len(y), -1)
        has_target, keep = y != oracle.IGNORE, (y != oracle.IGNORE) & (w != 0)
        if mistake == "no ignore mask":
            has_target, keep, y = torch.ones_like(has_target), w != 0, y.clamp(min=0)
        elif mistake == "zero weight by multiplication":
            keep = has_target
        elif mistake == "ignored by multiplication":
            keep, y = torch.ones_like(keep), y.clamp(min=0)
        kept = keep.nonzero().squeeze(1)
        loss = torch.zeros(len(y), dtype=w.dtype).index_put((kept,), row_losses(z[kept], y[kept], mistake))
        if mistake == "ignored by multiplication":
            loss = loss * has_target
        weighted = loss.sum() * w.mean() if mistake == "weight after the sum" else (w * loss).sum()
        if reduction == "none":
            return (w * loss).reshape(target.shape)
        if reduction == "sum":
            return weighted
        count = has_target.sum().to(w.dtype)
        if mistake == "count of unshifted targets":
            count = (target != oracle.IGNORE).sum().to(w.dtype)
        if normalizer == "weights" or mistake == "divided by the sum of weights":
            count = (w * has_target).sum()
        elif not isinstance(normalizer, str) and mistake != "own count instead of the step's":
            count = torch.as_tensor(normalizer, dtype=w.dtype)
        return weighted / count

    return fn


def changes_input(input, target, **options):
    """Right, but overwrites the caller's logits, as in-place fused losses do."""
    loss = implementation()(input, target, **options)
    with torch.no_grad():
        input.detach().nan_to_num_(0.0).sub_(1.0)
    return loss


# The mistake, and the checkers that must refuse it.
MISTAKES = {
    "upstream gradient of row 0": (oracle.check_row_gradients,),
    "one-hot subtracted after rounding": (oracle.check_confident_rows,),
    "lse in bf16": (oracle.check_losses,),
    "-log p": (oracle.check_far_targets,),
    "weights left behind by the shift": (oracle.check_shift,),
    "packed sequences shifted into each other": (oracle.check_shift,),
    "count of unshifted targets": (oracle.check_shift,),
    "no ignore mask": (oracle.check_ignored_rows,),
    "ignored by multiplication": (oracle.check_ignored_rows,),
    "zero weight by multiplication": (oracle.check_zero_weight_rows,),
    "weight after the sum": (oracle.check_sample_weights,),
    "divided by the sum of weights": (oracle.check_sample_weights, oracle.check_normalizers),
    "own count instead of the step's": (oracle.check_normalizers,),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake):
    for checker in MISTAKES[mistake]:
        with pytest.raises(AssertionError):
            checker(implementation(mistake))


@pytest.mark.parametrize("checker", oracle.CHECKERS, ids=lambda f: f.__name__)
def test_right_implementations_are_accepted(backend, checker):
    checker(implementation())
    checker(lambda *args, **options: cross_entropy(*args, backend=backend, **options))


@pytest.mark.parametrize("checker", oracle.CHECKERS, ids=lambda f: f.__name__)
def test_changed_input_is_refused(checker):
    with pytest.raises(AssertionError):
        checker(changes_input)
