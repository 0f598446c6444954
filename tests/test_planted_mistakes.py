"""The suite's own checkers refuse wrong implementations, each a mistake seen in a public library, and accept right ones.

Every mistake is one change to `implementation` or `linear_implementation`, plain torch; a checker that lets it through
proves nothing about the operators.
"""

import oracle
import pytest
import torch
import torch.nn.functional as F

from flow_kernels import cross_entropy, linear_cross_entropy


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


class LinearHead(torch.autograd.Function):
    """Weighted row losses of a linear head in fp64, each gradient by hand and rounded once."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, row_weight, count, mistake):
        x, w = input.double(), linear_weight.double()
        z = F.linear(x, w, linear_bias.double())
        if mistake == "logits in bf16":
            z = z.bfloat16().double()
        lse = z.logsumexp(1)
        ctx.save_for_backward(x, w, z, lse, target, row_weight)
        ctx.count, ctx.mistake = count, mistake
        loss = row_weight * (lse - z.gather(1, target[:, None]).squeeze(1)) / count
        return (loss.bfloat16() if mistake == "loss in bf16" else loss).to(oracle.loss_dtype(input.dtype))

    @staticmethod
    def backward(ctx, upstream):
        x, w, z, lse, target, row_weight = ctx.saved_tensors
        if ctx.mistake == "upstream gradient of row 0":
            upstream = upstream[:1].expand_as(upstream)
        unweighted = upstream.double()[:, None] * (torch.exp(z - lse[:, None]) - F.one_hot(target, w.shape[0]))
        unweighted = unweighted / ctx.count
        dz = {name: row_weight[:, None] * unweighted for name in ("input", "linear_weight", "linear_bias")}
        name, _, mistake = ctx.mistake.partition(": ") if ctx.mistake else ("", "", "")
        if mistake == "gradient without weights":
            dz[name] = unweighted
        elif mistake == "gradient of the last chunk alone":
            dz[name][:-5] = 0
        dw, db = dz["linear_weight"].T @ x, dz["linear_bias"].sum(0)
        if ctx.mistake == "linear_weight: gradient summed in bf16":
            dw = torch.zeros_like(dw).bfloat16()
            for row, value in zip(dz["linear_weight"], x, strict=True):
                dw += torch.outer(row, value)
        return dz["input"] @ w, dw, db, None, None, None, None


def linear_implementation(mistake=None):
    """A linear head's cross-entropy with the arguments that its checker uses, with one mistake or none."""

    def fn(input, linear_weight, target, *, linear_bias, sample_weight, reduction):
        has_target = target != oracle.IGNORE
        kept = (has_target & (sample_weight != 0)).nonzero().squeeze(1)
        count = int(has_target.sum()) if reduction == "mean" else 1
        loss = LinearHead.apply(
            input[kept], linear_weight, linear_bias, target[kept], sample_weight[kept].double(), count, mistake
        )
        if mistake == "input overwritten":
            input.detach().neg_()
        return loss.new_zeros(len(target)).index_put((kept,), loss) if reduction == "none" else loss.sum()

    return fn


def check_linear(fn, dtype):
    """The checker of a linear head on enough rows for a sum in 16 bits to show."""
    input, linear_weight, linear_bias = (torch.randn(shape).to(dtype) for shape in ((160, 16), (37, 16), (37,)))
    target = torch.randint(37, (160,))
    target[1::7] = oracle.IGNORE
    for reduction in ("mean", "sum", "none"):
        oracle.check_linear_cross_entropy(
            fn, input, linear_weight, target, linear_bias=linear_bias, sample_weight=oracle.sample_weights(160),
            reduction=reduction,
        )  # fmt: skip


# Gradients and losses in 16 bits may err by a rounding of theirs; these mistakes are larger in every dtype.
LINEAR_MISTAKES = (
    *(f"{name}: gradient without weights" for name in ("input", "linear_weight", "linear_bias")),
    *(f"{name}: gradient of the last chunk alone" for name in ("linear_weight", "linear_bias")),
    "upstream gradient of row 0", "loss in bf16", "input overwritten",
)  # fmt: skip


@pytest.mark.parametrize(
    ("mistake", "dtype"),
    [
        *((mistake, dtype) for mistake in LINEAR_MISTAKES for dtype in (torch.float32, torch.bfloat16)),
        ("logits in bf16", torch.float32), ("linear_weight: gradient summed in bf16", torch.bfloat16),
    ],
)  # fmt: skip
def test_mistakes_in_a_linear_head_are_refused(mistake, dtype):
    with pytest.raises(AssertionError):
        check_linear(linear_implementation(mistake), dtype)


def test_right_linear_heads_are_accepted(backend_dtype):
    backend, dtype = backend_dtype
    check_linear(linear_implementation(), dtype)
    check_linear(lambda *args, **options: linear_cross_entropy(*args, backend=backend, **options), dtype)


def test_a_product_that_is_worse_than_torch_is_refused():
    """By more than one rounding of its largest entry in 16 bits, and sqrt(terms) of them in fp32."""
    expected = torch.linspace(-1, 1, 64, dtype=torch.float64)
    for dtype, allowed in ((torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 16**0.5)):
        torchs = expected.to(dtype)
        worst, eps = (torchs.double() - expected).abs().max(), torch.finfo(dtype).eps
        for error, is_right in ((0.9, True), (1.1, False)):
            actual = expected.clone()
            actual[5] += worst + error * allowed * eps
            if is_right:
                oracle.assert_like_torch(actual, expected, torchs, dtype, 16)
            else:
                with pytest.raises(AssertionError):
                    oracle.assert_like_torch(actual, expected, torchs, dtype, 16)
    actual[5] = torch.nan
    with pytest.raises(AssertionError):
        oracle.assert_like_torch(actual, expected, torchs, torch.float32, 16)
