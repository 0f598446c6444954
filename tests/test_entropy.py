"""Entropy of the prediction beside the loss, in one pass: every backend, and every kernel of the compiled one."""

import math
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_heads import identity_head

from flow_kernels import cpu, linear_score_samples, linear_score_tokens, score_samples, score_tokens

# A sum of V terms e u with u = log e, each term rounded a few times: relative to the largest of them, which is of the
# entropy's own size or below 1.
RTOL, ATOL = 2e-6, 2e-6


@pytest.fixture(params=["logits", "linear"], scope="session")
def score(request, backend):
    """`score_tokens` with the entropy, called with logits."""
    function = score_tokens if request.param == "logits" else identity_head(linear_score_tokens)
    return partial(function, return_entropy=True, backend=backend)


def entropies(z: torch.Tensor, target: torch.Tensor, *, softcap=None) -> torch.Tensor:
    """Entropy of what each row of logits predicts, nats; 0 where the target is ignored."""
    z = z.double() if softcap is None else softcap * torch.tanh(z.double() / softcap)
    return torch.where(target == oracle.IGNORE, 0.0, torch.distributions.Categorical(logits=z).entropy())


def assert_entropies(scores, logits, target, **options):
    assert scores.entropy.dtype == scores.loss.dtype
    assert scores.entropy.shape == target.shape
    expected = entropies(logits, target, **options)
    torch.testing.assert_close(scores.entropy.double(), expected, rtol=RTOL, atol=ATOL)
    assert not (scores.entropy < 0).any()


@given(
    num_rows=st.integers(1, 5),
    num_classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    offset=st.sampled_from([0.0, -40.0, 90.0]),
    softcap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 9),
)
def test_against_the_definition(score, num_rows, num_classes, scale, offset, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, num_classes, generator=generator) + offset
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    target[::3] = oracle.IGNORE if seed % 2 else target[::3]
    scores = score(logits, target, softcap=softcap)
    assert_entropies(scores, logits, target, softcap=softcap)


def test_the_other_scores_stay(score):
    logits, target = oracle.batch(40, 131, scale=3.0)
    target[::7] = logits[::7].argmax(1)
    scores, plain = score(logits, target), score(logits, target, return_entropy=False)
    assert len(plain) == 2
    assert torch.equal(scores.correct, plain.correct)
    assert scores.correct.any()
    torch.testing.assert_close(scores.loss, plain.loss, rtol=1e-6, atol=1e-7)
    oracle.assert_close(scores.loss, oracle.cross_entropy(logits.double(), target, reduction="none"))


def test_dtypes_and_long_rows(backend_dtype):
    backend, dtype = backend_dtype
    logits, target = oracle.batch(3, 20011, dtype, scale=2.0)
    scores = score_tokens(logits, target, return_entropy=True, backend=backend)
    assert_entropies(scores, logits, target)
    assert float(scores.entropy.max()) > 5


def test_uniform_one_hot_and_impossible_rows(score):
    """Equal logits, one class that takes all, -inf where a class is masked, and what has no softmax."""
    infinity = math.inf
    logits = torch.zeros(6, 48)
    logits[1, 5] = 200.0
    logits[2, 3:] = -infinity
    logits[3, 1:] = -infinity
    logits[4, 7] = math.nan
    logits[5, 7] = infinity
    target = torch.tensor([0, 5, 1, 0, 0, 0])
    if score.func is score_tokens:
        found = score(logits, target).entropy
        expected = [math.log(48), 0.0, math.log(3), 0.0]
        torch.testing.assert_close(found[:4], torch.tensor(expected), rtol=1e-6, atol=1e-7)
        assert found[4:].isnan().all()
        # A target that is masked itself has no finite loss, but the prediction has an entropy.
        masked = score(logits[2:3], torch.tensor([9]))
        assert masked.loss.isinf().all()
        torch.testing.assert_close(masked.entropy, torch.tensor([math.log(3)]), rtol=1e-6, atol=0)
    else:  # 0 times the identity's zeros is NaN for infinities: finite rows only
        torch.testing.assert_close(
            score(logits[:2], target[:2]).entropy, torch.tensor([math.log(48), 0.0]), rtol=1e-6, atol=1e-7
        )


def test_confident_rows_keep_their_precision(backend):
    """Where the target is the maximum the sum of the others is known apart: an entropy of 1e-8 is not rounded away."""
    logits = torch.zeros(4, 50)
    logits[torch.arange(4), torch.arange(4)] = torch.tensor([10.0, 15.0, 20.0, 25.0])
    found = score_tokens(logits, torch.arange(4), return_entropy=True, backend=backend).entropy.double()
    expected = entropies(logits, torch.arange(4))
    if backend == "reference":  # its sum holds the target's 1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        return
    assert float(expected[-1]) < 1e-7
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_linear_head(backend, chunk_size):
    hidden, head, bias = torch.randn(2, 5, 8), torch.randn(61, 8), torch.randn(61)
    target = torch.randint(61, (2, 5))
    target[0, 1] = oracle.IGNORE
    found = linear_score_tokens(
        hidden, head, target, linear_bias=bias, softcap=3.0, chunk_size=chunk_size, shift=True, return_entropy=True,
        backend=backend,
    )  # fmt: skip
    logits = F.linear(hidden.double(), head.double(), bias.double())
    shifted = torch.cat([target[:, 1:], torch.full((2, 1), oracle.IGNORE)], 1)
    assert_entropies(found, logits, shifted, softcap=3.0)


def compiled_kernels():
    if cpu.why_not() is not None:
        return []
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [
        pytest.param(dtype, name, id=f"{str(dtype)[6:]}-{name}") for dtype in dtypes for name in cpu.kernel_names(dtype)
    ]


@pytest.mark.parametrize(("dtype", "kernels"), compiled_kernels())
@pytest.mark.parametrize(("num_rows", "dim", "num_classes"), [(1, 1, 1), (17, 31, 509), (70, 64, 4099), (5, 300, 130)])
def test_compiled_kernels(dtype, kernels, num_rows, dim, num_classes):
    """Tile edges and stretches of every instruction set; the logits that they make are exact in fp32."""
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, dim, generator=generator).to(dtype)
    head = (3 * torch.randn(num_classes, dim, generator=generator) / dim**0.5).to(dtype)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    _, correct, entropy = cpu.linear_cross_entropy_score(hidden, head, target, None, -100, 0.0, 0, kernels=kernels)
    logits = hidden.double() @ head.double().T
    assert torch.equal(correct, logits.argmax(1) == target)
    torch.testing.assert_close(entropy.double(), entropies(logits, target), rtol=2e-6, atol=1e-5)
    given = logits.to(dtype)
    if kernels not in cpu.kernel_names(torch.float32):  # given logits are widened to fp32 as they are read
        return
    _, _, entropy = cpu.cross_entropy_score(given, target, -100, 2.0, kernels=kernels)
    torch.testing.assert_close(entropy.double(), entropies(given, target, softcap=2.0), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(("dtype", "kernels"), compiled_kernels())
@pytest.mark.parametrize("mask", [None, "lowest", -1e38, -1e20])
def test_compiled_kernels_over_several_tiles_of_a_stretch(dtype, kernels, mask):
    """More than 64 tiles, so that a thread carries a row's sums from tile to tile: upwards, and from a finite mask on."""
    num_classes, masked = 49152, 25000
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.ones(2, 8, dtype=dtype), torch.zeros(num_classes, 8, dtype=dtype)
    bias = torch.linspace(0, 40, num_classes) + torch.randn(num_classes, generator=generator)
    if mask is not None:
        bias[:masked] = torch.finfo(torch.float32).min if mask == "lowest" else mask
    bias, target = bias if dtype == torch.float16 else bias.to(dtype), torch.tensor([masked, num_classes - 1])
    loss, _, entropy = cpu.linear_cross_entropy_score(hidden, head, target, bias, -100, 0.0, 0, kernels=kernels)
    logits = bias.double().expand(2, -1)
    oracle.assert_close(loss, F.cross_entropy(logits, target, reduction="none"))
    torch.testing.assert_close(entropy.double(), entropies(logits, target), rtol=1e-5, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_bit_equal_for_any_number_of_threads(threads):
    if cpu.why_not() is not None:
        pytest.skip(cpu.why_not())
    hidden, head = torch.randn(33, 40).bfloat16(), torch.randn(9001, 40).bfloat16()
    target, before = torch.randint(9001, (33,)), torch.get_num_threads()
    once = cpu.linear_cross_entropy_score(hidden, head, target, None, -100, 0.0, 0)
    torch.set_num_threads(threads)
    try:
        again = cpu.linear_cross_entropy_score(hidden, head, target, None, -100, 0.0, 0)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize(
    ("function", "shapes"), [(score_samples, ((2, 3, 7),)), (linear_score_samples, ((2, 3, 4), (7, 4)))]
)
def test_sums_over_samples_have_no_place_for_it(function, shapes):
    with pytest.raises(TypeError, match=r"return_entropy is an option of score_tokens"):
        function(*map(torch.zeros, shapes), torch.zeros(2, 3, dtype=torch.long), return_entropy=True)
