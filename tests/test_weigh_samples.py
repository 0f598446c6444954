"""`weigh_samples`: a batch's weights from its row losses are those of the whole-data-set functions."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flow_kernels
from flow_kernels import flow_weights, score_samples, score_tokens, weigh_samples

TAU = 0.8


def losses(lengths, seed=0):
    """Row losses and targets of samples padded to the longest, padding ignored and NaN."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(len(lengths), max(max(lengths), 1), generator=generator) * 3
    target = torch.randint(9, loss.shape, generator=generator)
    for i, length in enumerate(lengths):
        target[i, length:], loss[i, length:] = oracle.IGNORE, torch.nan
    return loss, target


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    normalize=st.sampled_from(["none", "mean", "simplex"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_padded_and_packed_batches_get_the_weights_of_their_mean_losses(backend, lengths, normalize, dtype):
    loss, target = losses(lengths)
    loss = loss.to(dtype)
    means = torch.tensor([float(row[:n].double().mean()) if n else 0.0 for row, n in zip(loss, lengths, strict=True)])
    has_target = torch.tensor(lengths) > 0
    expected = flow_weights(means.double(), TAU, mask=has_target, normalize=normalize)
    got = weigh_samples(loss, target, TAU, normalize=normalize, backend=backend)
    assert got.mean_loss.dtype == got.weight.dtype == torch.float32
    torch.testing.assert_close(got.mean_loss, means, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.weight.double(), expected, rtol=5e-6, atol=0)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flat = [torch.cat([t[i, :n] for i, n in enumerate(lengths)]) for t in (loss, target)]
    packed = weigh_samples(*flat, TAU, cu_seqlens=offsets, normalize=normalize, backend=backend)
    torch.testing.assert_close(packed.weight, got.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed.mean_loss, got.mean_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [False, True])
def test_with_score_tokens_one_pass_over_the_logits_gives_losses_and_weights(backend, shift):
    logits, target = oracle.batch(12, 23, torch.float32)
    logits, target = logits.view(3, 4, 23), target.view(3, 4)
    scores = score_tokens(logits, target, shift=shift, backend=backend)
    got = weigh_samples(scores.loss, target, torch.tensor(TAU), shift=shift, backend=backend)
    sums = score_samples(logits, target, shift=shift, backend=backend)
    torch.testing.assert_close(got.mean_loss, sums.loss_sum / sums.num_targets.clamp(min=1))
    torch.testing.assert_close(got.weight, torch.exp(-got.mean_loss / TAU) * (sums.num_targets > 0))


@pytest.mark.parametrize("normalize", ["none", "mean", "simplex"])
def test_samples_of_infinite_loss_alone_weigh_nothing(backend, normalize):
    loss = torch.full((2, 3), torch.inf)
    got = weigh_samples(loss, torch.zeros(2, 3).long(), 1.0, normalize=normalize, backend=backend)
    assert got.mean_loss.tolist() == [torch.inf] * 2
    assert got.weight.tolist() == [0.0] * 2


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_samples_and_no_rows(backend, shape):
    got = weigh_samples(torch.zeros(shape), torch.zeros(shape, dtype=torch.long), 1.0, backend=backend)
    assert got.mean_loss.tolist() == got.weight.tolist() == [0.0] * shape[0]


def test_every_row_alone_is_a_sample_and_nothing_is_looked_at(backend):
    loss, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, oracle.IGNORE, 0])
    expected = torch.tensor([-1.0, -torch.inf, -3.0]).exp()
    torch.testing.assert_close(weigh_samples(loss, target, 1.0, backend=backend).weight, expected)
    compiled = torch.compile(weigh_samples, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(loss, target, torch.tensor(1.0), backend=backend).weight,
        weigh_samples(loss, target, torch.tensor(1.0), backend=backend).weight,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalize": "sum"}, ValueError, "normalize must be one of"),
        ({"temperature": None}, TypeError, "temperature must be a number or a 0-d tensor, got NoneType"),
        ({"temperature": 0.0}, ValueError, "the temperature must be positive and finite, got 0.0"),
        ({"temperature": torch.ones(2)}, ValueError, "a number or a 0-d tensor, got shape"),
        ({"loss": torch.zeros(2, 4)}, ValueError, r"loss has shape \(2, 4\); it must be that of target"),
        ({"loss": torch.zeros(2, 3).long()}, TypeError, "loss must be"),
        ({"target": torch.zeros(2, 3)}, TypeError, "target must be an integer tensor"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    arguments = {"loss": torch.zeros(2, 3), "target": torch.zeros(2, 3).long(), "temperature": 1.0, **change}
    with pytest.raises(error, match=message):
        weigh_samples(**arguments)


def test_the_public_name():
    assert flow_kernels.weigh_samples is weigh_samples
