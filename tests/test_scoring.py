"""Forward-only scores: padded, packed and looped samples agree, and no gradient is recorded."""

from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_heads import identity_head

from flow_kernels import (
    cross_entropy,
    linear_cross_entropy,
    linear_score_samples,
    linear_score_tokens,
    score_samples,
    score_tokens,
)


@pytest.fixture(params=["logits", "linear"], scope="session")
def scorers(request, backend):
    """`(score_tokens, score_samples, cross_entropy)`, each called with logits."""
    if request.param == "logits":
        functions = score_tokens, score_samples, cross_entropy
    else:
        functions = map(identity_head, (linear_score_tokens, linear_score_samples, linear_cross_entropy))
    return [partial(f, backend=backend) for f in functions]


def assert_scores(scores, expected):
    """Per-sample scores against the oracle's loop."""
    loss_sum, num_targets, num_correct = expected
    assert scores.num_targets.tolist() == num_targets
    assert scores.num_correct.tolist() == num_correct
    assert scores.num_targets.dtype == scores.num_correct.dtype == torch.int64
    # Each of a sample's tokens may err by the tolerance of a loss.
    rtol, atol = oracle.TOLERANCES[scores.loss_sum.dtype]
    expected = torch.tensor(loss_sum, dtype=torch.float64)
    oracle.assert_bounded(scores.loss_sum, expected, rtol * expected + atol * torch.tensor(num_targets))


def padded_batch(lengths, num_classes=23, dtype=torch.float32, seed=0):
    """Sequences of `lengths` padded to the longest, the prompt's first label and all padding ignored."""
    longest = max(lengths)
    logits, target = oracle.batch(len(lengths) * longest, num_classes, dtype, seed=seed)
    logits, target = logits.view(len(lengths), longest, -1), target.view(len(lengths), longest)
    easy = target.clamp(min=0).unsqueeze(-1)
    logits[..., ::2, :] = logits[..., ::2, :].scatter_add(-1, easy[:, ::2], torch.full_like(easy[:, ::2], 9).to(dtype))
    for i, length in enumerate(lengths):
        target[i, length:] = oracle.IGNORE
        logits[i, length:] = torch.nan
    return logits, target


def packed(tensor, lengths):
    """The same without padding."""
    return torch.cat([tensor[i, :length] for i, length in enumerate(lengths)])


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    shift=st.booleans(),
    softcap=st.sampled_from([None, 4.0]),
)
def test_padded_packed_and_looped_samples_agree(scorers, lengths, shift, softcap):
    tokens, samples, _ = scorers
    logits, target = padded_batch(lengths)
    options = {"shift": shift, "softcap": softcap}
    expected = oracle.samples(logits, target, **options)
    assert any(expected[2]) or not any(expected[1]) or shift
    assert_scores(samples(logits, target, **options), expected)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    flat = packed(logits, lengths), packed(target, lengths)
    assert_scores(samples(*flat, cu_seqlens=cu_seqlens, **options), expected)

    one_by_one = [samples(logits[i : i + 1, :n], target[i : i + 1, :n], **options) for i, n in enumerate(lengths) if n]
    nonempty = samples(logits, target, **options).num_targets[[bool(n) for n in lengths]]
    assert torch.cat([s.num_targets for s in one_by_one]).tolist() == nonempty.tolist()

    scores = tokens(logits, target, **options)
    assert scores.loss.shape == scores.correct.shape == target.shape
    expected_loss = oracle.cross_entropy(logits.double(), target, reduction="none", **options)
    oracle.assert_close(scores.loss, expected_loss)
    assert scores.correct.sum() == sum(expected[2])
    assert not scores.correct[expected_loss == 0].any()


@pytest.mark.parametrize("shift", [False, True])
def test_equals_the_losses(scorers, shift):
    tokens, _, loss = scorers
    logits, target = padded_batch([5, 0, 9, 2])
    options = {"softcap": 20.0, "shift": shift}
    expected = loss(logits, target, reduction="none", **options)
    torch.testing.assert_close(tokens(logits, target, **options).loss, expected, rtol=0, atol=0)


def test_dtypes(backend_dtype):
    backend, dtype = backend_dtype
    logits, target = padded_batch([5, 1, 9, 2], dtype=dtype)
    scores = score_samples(logits, target, backend=backend)
    assert scores.loss_sum.dtype == oracle.loss_dtype(dtype)
    # Ties between rounded logits may fall either way; the losses may not.
    expected = oracle.samples(logits, target)
    assert_scores(scores._replace(num_correct=torch.tensor(expected[2])), expected)
    assert abs(int(scores.num_correct.sum()) - sum(expected[2])) <= 1


def test_confident_bf16_samples_keep_fp32_losses(backend):
    # exp(-loss / tau) cannot live on bf16 losses: 1e-4 must not become 0.
    logits, target = oracle.confident_batch(torch.bfloat16, 0.9999)
    expected = oracle.cross_entropy(logits.double(), target, reduction="none")
    assert float(expected.max()) < 2e-4
    oracle.assert_close(score_tokens(logits, target, backend=backend).loss, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_linear_head(backend, bias, chunk_size):
    hidden, linear_weight = torch.randn(3, 5, 8), torch.randn(31, 8)
    linear_bias = torch.randn(31) if bias else None
    target = torch.randint(31, (3, 5))
    target[0, 2:] = oracle.IGNORE
    logits = F.linear(hidden.double(), linear_weight.double(), None if linear_bias is None else linear_bias.double())
    options = {"linear_bias": linear_bias, "chunk_size": chunk_size, "backend": backend, "shift": True}
    loss_sum, num_targets, num_correct = oracle.samples(logits, target, shift=True)
    scores = linear_score_samples(hidden, linear_weight, target, **options)
    assert (scores.num_targets.tolist(), scores.num_correct.tolist()) == (num_targets, num_correct)
    torch.testing.assert_close(
        scores.loss_sum.double(), torch.tensor(loss_sum, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    scores = linear_score_tokens(hidden, linear_weight, target, **options)
    expected = oracle.cross_entropy(logits, target, shift=True, reduction="none")
    torch.testing.assert_close(scores.loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (), (0,), (0, 3), (2, 0), (2, 3, 4)])
def test_shapes(scorers, shape):
    tokens, samples, _ = scorers
    logits, target = torch.randn(*shape, 7), torch.randint(7, shape)
    assert tokens(logits, target).loss.shape == shape
    scores = samples(logits, target)
    if 0 in shape:
        assert [s.tolist() for s in scores] == [[0] * shape[0]] * 3
    else:
        assert_scores(scores, oracle.samples(logits, target))


def test_no_sequences(scorers):
    _, samples, _ = scorers
    scores = samples(torch.randn(0, 7), torch.randint(7, (0,)), cu_seqlens=torch.tensor([0]))
    assert [s.tolist() for s in scores] == [[]] * 3


def test_samples_without_targets_are_zero(scorers):
    _, samples, _ = scorers
    logits, target = padded_batch([4, 0, 3])
    target[2] = oracle.IGNORE
    assert [s[1:].tolist() for s in samples(logits, target)] == [[0, 0]] * 3
    assert not any(float(s.sum()) for s in samples(logits, torch.full_like(target, oracle.IGNORE)))


def test_other_ignore_index(scorers):
    _, samples, _ = scorers
    logits, target = padded_batch([4, 6, 3])
    expected = oracle.samples(logits, target, shift=True)
    assert_scores(samples(logits, torch.where(target < 0, 22, target), shift=True, ignore_index=22),
                  oracle.samples(logits, torch.where(target < 0, 22, target), shift=True, ignore_index=22))  # fmt: skip
    assert_scores(samples(logits, torch.where(target < 0, -1, target), shift=True, ignore_index=-1), expected)


def test_no_gradient_is_recorded(scorers):
    tokens, samples, _ = scorers
    logits, target = padded_batch([4, 6])
    logits.requires_grad_()
    for scores in (tokens(logits, target, return_entropy=True), samples(logits, target)):
        assert not any(s.requires_grad for s in scores)


def test_sums_are_deterministic_and_rounded_once(scorers):
    # 4,096 tokens whose fp32 running sum would drift; the sum is made in fp64 and rounded once.
    tokens, samples, _ = scorers
    logits, target = oracle.batch(4096, 5, scale=1e-3)
    cu_seqlens = torch.tensor([0, 4096])
    first = samples(logits, target, cu_seqlens=cu_seqlens)
    exact = tokens(logits, target).loss.double().sum()
    assert float(first.loss_sum) == float(exact.float())
    assert torch.equal(first.loss_sum, samples(logits.view(1, 4096, 5), target.view(1, 4096)).loss_sum)
