"""The Triton kernels and launchers against the reference in fp64; without a GPU they run in Triton's interpreter."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

import flow_kernels
import flow_kernels.kernels.flow_weights
from flow_kernels import kernels, reference
from flow_kernels.kernels import configs, cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid value encountered:RuntimeWarning", "ignore:All-NaN slice")

# The function of the same name hides the module in the package.
weighting = sys.modules["flow_kernels.kernels.flow_weights"]

IGNORE = -100
PLAIN = (IGNORE, 0.0, 0.0, 0.0)
# (with class weights, (ignore_index, label_smoothing, softcap, z_loss))
OPTIONS = {
    "plain": (False, PLAIN),
    "class weights": (True, PLAIN),
    "smoothing": (False, (IGNORE, 0.1, 0.0, 0.0)),
    "softcap": (False, (IGNORE, 0.0, 8.0, 0.0)),
    "z-loss": (False, (IGNORE, 0.0, 0.0, 1e-2)),
    "all": (True, (IGNORE, 0.2, 15.0, 1e-3)),
}
# Largest error of one rounding to the dtype, relative to the number. And of a few operations in fp32, relative to the
# numbers that go into them.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FP32_ERROR = 2**-22
DTYPES = list(ROUNDING)


def double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.dtype.is_floating_point else t for t in tensors]


def assert_near(got, exact, relative, size=0.0):
    """`got` within `relative` of the largest exact value, and fp32's error at numbers of `size`; NaN nowhere."""
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    if exact.numel():
        error = float((got.double() - exact).abs().max())
        allowed = relative * float(exact.abs().max()) + FP32_ERROR * float(size)
        assert error <= allowed, f"error {error}, allowed {allowed}"


def batch(num_rows, num_classes, dtype, seed=0):
    """Peaked and confident rows, an ignored one that holds NaN, weights of both signs, one of 0 over infinities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_classes, generator=generator) * 3
    target = torch.randint(0, num_classes, (num_rows,), generator=generator)
    row_weight = torch.randn(num_rows, generator=generator)
    logits[0, target[0]] += 14
    if num_rows > 3:
        target[1], target[2] = num_classes - 1, 0
        target[3], logits[3] = IGNORE, float("nan")
    if num_rows > 4:
        row_weight[4], logits[4] = 0.0, float("inf")
    class_weight = torch.rand(num_classes, generator=generator) + 0.5
    return logits.to(DEVICE, dtype), target.to(DEVICE), row_weight.to(DEVICE), class_weight.to(DEVICE)


def check_logits_operators(logits, target, row_weight, class_weight, options):
    """All three operators; rows of weight 0 are ignored in the forward-only one, which knows no weights."""
    exact_logits, exact_weight, exact_class_weight = double(logits, row_weight, class_weight)
    kept = torch.where(row_weight == 0, IGNORE, target)
    exact_loss, exact_lse, exact_correct = reference.cross_entropy_fwd(exact_logits, kept, exact_class_weight, *options)
    # Everything is a difference of numbers of the size of lse; a softmax has its absolute error as a relative one.
    size = max(1.0, float(exact_lse.abs().max())) if kept.numel() else 1.0
    weight_size = size * float(row_weight.abs().sum())

    total, loss, dlogits = kernels.cross_entropy_fwd_bwd(logits, target, row_weight, class_weight, *options)
    exact = reference.cross_entropy_fwd_bwd(exact_logits, target, exact_weight, exact_class_weight, *options)
    assert_near(total, exact[0], 0, weight_size)
    assert_near(loss, exact[1], 0, size)
    assert_near(dlogits, exact[2], ROUNDING[logits.dtype], weight_size)

    loss, lse, correct = kernels.cross_entropy_fwd(logits, kept, class_weight, *options)
    assert_near(loss, exact_loss, 0, size)
    assert_near(lse, exact_lse, 0, size)
    assert torch.equal(correct, exact_correct)

    dlogits = kernels.cross_entropy_bwd(row_weight, logits, target, lse, class_weight, *options)
    assert_near(dlogits, exact[2], ROUNDING[logits.dtype], weight_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 3, 7, 31, 128, 257, 1024, 1031, 2053, 4099, 8192, 16411])
def test_logits_operators(num_classes, dtype):
    logits, target, row_weight, _ = batch(6, num_classes, dtype)
    check_logits_operators(logits, target, row_weight, None, PLAIN)


@pytest.mark.parametrize("num_classes", [32768, 50257, 65536, 65537, 70001])
def test_logits_operators_on_long_rows(num_classes):
    logits, target, row_weight, _ = batch(5, num_classes, torch.bfloat16)
    check_logits_operators(logits, target, row_weight, None, PLAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 5, 1000, 17000])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, num_classes, dtype):
    has_class_weight, options = OPTIONS[name]
    logits, target, row_weight, class_weight = batch(5, num_classes, dtype, seed=1)
    check_logits_operators(logits, target, row_weight, class_weight if has_class_weight else None, options)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(num_rows):
    logits, target, row_weight, _ = (t[:num_rows] for t in batch(2, 40, torch.bfloat16))
    check_logits_operators(logits, target, row_weight, None, PLAIN)
    dlogits = kernels.cross_entropy_fwd_bwd(logits, target, row_weight, None, *PLAIN)[2]
    assert dlogits.shape == (num_rows, 40)


@pytest.mark.parametrize(
    "view",
    ["rows apart", "rows apart by 16", "not at 16 bytes", "every other row", "columns apart", "transposed", "expanded"],
)
def test_strides(view):
    logits, target, row_weight, _ = batch(8, 90, torch.bfloat16)
    logits = {
        "rows apart": lambda x: torch.cat([x, x], 1)[:, :90],
        "rows apart by 16": lambda x: torch.nn.functional.pad(x, (0, 6), value=float("nan"))[:, :90],
        "not at 16 bytes": lambda x: torch.nn.functional.pad(x, (3, 3), value=float("nan"))[:, 3:93],
        "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
        "columns apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "transposed": lambda x: x.T.contiguous().T,
        "expanded": lambda x: x[:1].expand(8, 90),
    }[view](logits)
    target = target.repeat_interleave(2)[::2]
    check_logits_operators(logits, target, row_weight, None, PLAIN)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999, 0.99999])
def test_confident_rows_keep_their_precision(probability):
    num_classes = 1000
    rest = torch.log(torch.tensor((1 - probability) / probability / (num_classes - 1)))
    logits = rest.to(torch.bfloat16).float().expand(1, num_classes).clone().to(DEVICE)
    target = torch.tensor([517], device=DEVICE)
    logits[0, 517] = 0.0
    one = torch.ones(1, device=DEVICE)
    _, loss, dlogits = kernels.cross_entropy_fwd_bwd(logits.bfloat16(), target, one, None, *PLAIN)
    _, exact_loss, exact = reference.cross_entropy_fwd_bwd(logits.double(), target, one.double(), None, *PLAIN)
    # Relative to the target's own gradient 1 - p, which a difference of two rounded numbers would lose.
    torch.testing.assert_close(dlogits[0, 517].double(), exact[0, 517], rtol=2**-8, atol=0)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=0)


def test_ties_go_to_the_first_column():
    logits = torch.zeros(4, 3000, device=DEVICE, dtype=torch.bfloat16)
    logits[:, 1500:] = 1.0
    target = torch.tensor([1500, 1501, 2999, 3], device=DEVICE)
    _, _, correct = kernels.cross_entropy_fwd(logits, target, None, *PLAIN)
    assert correct.tolist() == [True, False, False, False]


def test_infinite_logits_follow_the_reference():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, ::2] = -float("inf")
    logits[1, 5] = torch.finfo(torch.float32).min
    logits[2, 9] = float("inf")
    logits[3] = -float("inf")
    target = torch.tensor([1, 5, 4, 4], device=DEVICE)
    weight = torch.ones(4, device=DEVICE)
    _, loss, dlogits = kernels.cross_entropy_fwd_bwd(logits, target, weight, None, *PLAIN)
    _, exact, exact_dlogits = reference.cross_entropy_fwd_bwd(logits.double(), target, weight.double(), None, *PLAIN)
    torch.testing.assert_close(loss.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits[:2].double(), exact_dlogits[:2], rtol=1e-5, atol=1e-6)


def test_offsets_beyond_int32():
    # 4 GiB of address space; on a CPU only the rows are ever touched.
    logits = torch.empty(2**31 + 1000, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 1000), (2**30, 1))
    logits.copy_(torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)))
    target = torch.tensor([1, IGNORE, 999], device=DEVICE)
    loss, _, _ = kernels.cross_entropy_fwd(logits, target, None, *PLAIN)
    exact = torch.nn.functional.cross_entropy(logits.double(), target, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="looking at the targets would synchronise a GPU")
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_target_out_of_range_raises_on_the_cpu(bad):
    logits, target = torch.zeros(3, 50), torch.tensor([0, bad, 1])
    message = rf"the target of row 1 is {bad}, outside \[0, 50\)"
    with pytest.raises(IndexError, match=message):
        kernels.cross_entropy_fwd(logits, target, None, *PLAIN)
    with pytest.raises(IndexError, match=message):
        kernels.cross_entropy_fwd_bwd(logits, target, torch.ones(3), None, *PLAIN)
    with pytest.raises(IndexError, match=message):
        kernels.linear_cross_entropy_fwd(torch.ones(3, 4), torch.ones(50, 4), target, None, None, *PLAIN, 0)


@pytest.mark.parametrize("num_classes", [50, 70000])
@pytest.mark.parametrize("bad", [-1, 70000, 2**40])
def test_target_out_of_range_on_a_gpu_gives_nan_and_reads_nothing(bad, num_classes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "check_target", lambda *args: None)
    logits = torch.zeros(2, num_classes, device=DEVICE, dtype=torch.bfloat16)
    target = torch.tensor([bad, 1], device=DEVICE)
    loss, lse, correct = kernels.cross_entropy_fwd(logits, target, None, *PLAIN)
    assert loss.isnan().tolist() == lse.isnan().tolist() == [True, False]
    assert not correct[0]
    weight = torch.ones(2, device=DEVICE)
    total, loss, dlogits = kernels.cross_entropy_fwd_bwd(logits, target, weight, None, *PLAIN)
    assert total.isnan()
    assert loss.isnan().tolist() == [True, False]
    assert not dlogits[0].any()
    assert not kernels.cross_entropy_bwd(weight, logits, target, lse, None, *PLAIN)[0].any()


def test_a_row_too_long_names_the_limit_and_the_backend(monkeypatch):
    monkeypatch.setattr(configs, "MAX_CLASSES", 9)
    with pytest.raises(ValueError, match=r"at most 9 logits, got 10; backend='reference'"):
        kernels.cross_entropy_fwd(torch.zeros(1, 10), torch.tensor([0]), None, *PLAIN)


def test_a_grid_too_long_names_the_limit_and_the_backend(monkeypatch):
    monkeypatch.setattr(configs, "MAX_GRID_Y", 0)
    logits, target, row_weight, _ = batch(2, 40, torch.float32)
    with pytest.raises(
        ValueError, match=r"backward pass takes rows of at most 0 torch.float32 logits, got 40; backend="
    ):
        kernels.cross_entropy_bwd(row_weight, logits, target, row_weight, None, *PLAIN)


def head(dtype, num_rows=21, hidden=24, num_classes=103):
    generator = torch.Generator().manual_seed(2)
    input = torch.randn(num_rows, hidden, generator=generator)
    linear_weight = torch.randn(num_classes, hidden, generator=generator) / hidden**0.5 * 2
    linear_bias = torch.randn(num_classes, generator=generator)
    class_weight = torch.rand(num_classes, generator=generator)
    target = torch.randint(0, num_classes, (num_rows,), generator=generator)
    row_weight = torch.randn(num_rows, generator=generator)
    target[3], input[3] = IGNORE, float("nan")
    row_weight[5], input[5] = 0.0, float("inf")
    tensors = (input.to(dtype), linear_weight.to(dtype), target, row_weight, linear_bias.to(dtype), class_weight)
    return tuple(t.to(DEVICE) for t in tensors)


# The matmul's logits are rounded to the dtype before anything else; their error is a few units of it.
HEAD_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Rows that end inside 16 elements go on to them in the buffer, which a chunk's gradient leaves to the next one.
@pytest.mark.parametrize(("num_classes", "chunk_size"), [(103, 0), (103, 1), (103, 8), (112, 8)])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_linear_operators(name, num_classes, chunk_size, dtype):
    input, linear_weight, target, row_weight, linear_bias, class_weight = head(dtype, num_classes=num_classes)
    has_class_weight, options = OPTIONS[name]
    linear_bias, class_weight = (linear_bias, class_weight) if has_class_weight else (None, None)
    needs = (True, True, has_class_weight)
    exact_input, exact_head, exact_weight, exact_bias, exact_class_weight = double(
        input, linear_weight, row_weight, linear_bias, class_weight
    )
    arguments = (linear_bias, class_weight, *options, chunk_size)
    exact_arguments = (exact_bias, exact_class_weight, *options, 0)
    got = kernels.linear_cross_entropy_fwd_bwd(input, linear_weight, target, row_weight, *arguments, *needs)
    exact = reference.linear_cross_entropy_fwd_bwd(
        exact_input, exact_head, target, exact_weight, *exact_arguments, *needs
    )
    for result, want in zip(got, exact, strict=True):
        assert_near(result, want, HEAD_ERROR[dtype])
    kept = torch.where(row_weight == 0, IGNORE, target)
    got = kernels.linear_cross_entropy_fwd(input, linear_weight, kept, *arguments)
    exact = reference.linear_cross_entropy_fwd(exact_input, exact_head, kept, *exact_arguments)
    for result, want in zip(got[:2], exact[:2], strict=True):
        assert_near(result, want, HEAD_ERROR[dtype])
    lse, exact_lse = got[1], exact[1]
    got = kernels.linear_cross_entropy_bwd(row_weight, input, linear_weight, target, lse, *arguments, *needs)
    exact = reference.linear_cross_entropy_bwd(
        exact_weight, exact_input, exact_head, target, exact_lse, *exact_arguments, *needs
    )
    for result, want in zip(got, exact, strict=True):
        assert_near(result, want, HEAD_ERROR[dtype])


@pytest.mark.parametrize("needs", [(False, True, True), (True, False, False), (False, False, True)])
def test_gradients_nobody_asked_for_are_empty(needs):
    input, linear_weight, target, row_weight, linear_bias, _ = head(torch.float32)
    arguments = (linear_bias, None, *PLAIN, 8)
    grads = kernels.linear_cross_entropy_fwd_bwd(input, linear_weight, target, row_weight, *arguments, *needs)[2:]
    full = kernels.linear_cross_entropy_fwd_bwd(input, linear_weight, target, row_weight, *arguments, True, True, True)
    for need, grad, whole in zip(needs, grads, full[2:], strict=True):
        assert torch.equal(grad, whole) if need else grad.numel() == 0


def test_head_of_no_rows():
    input, linear_weight, target, row_weight, _, _ = head(torch.float32)
    total, loss, dinput, dlinear_weight, _ = kernels.linear_cross_entropy_fwd_bwd(
        input[:0], linear_weight, target[:0], row_weight[:0], None, None, *PLAIN, 0, True, True, False
    )
    assert total == 0
    assert loss.shape == (0,)
    assert dinput.shape == (0, 24)
    assert not dlinear_weight.any()


def samples():
    generator = torch.Generator().manual_seed(3)
    loss = torch.rand(21, 300, generator=generator) * 3
    target = torch.randint(0, 9, (21, 300), generator=generator)
    target[2] = IGNORE
    target[4, 5:] = IGNORE
    loss[0, 7] = float("inf")
    loss[target == IGNORE] = float("nan")
    return loss.to(DEVICE), target.to(DEVICE)


@pytest.mark.parametrize("normalize", ["none", "mean", "simplex"])
def test_flow_weights(normalize):
    loss, target = samples()
    keep = target != IGNORE
    exact = torch.where(keep, loss, 0).double().sum(1) / keep.sum(1).clamp(min=1)
    # One loss is infinite, which `flow_kernels.flow_weights` refuses: its weight is 0, and no other is touched.
    weights = torch.where(keep.any(1), torch.exp(-exact / 0.7), 0)
    weights *= {"none": 1, "mean": int(keep.any(1).sum()) / weights.sum(), "simplex": 1 / weights.sum()}[normalize]
    temperature = torch.tensor(0.7, dtype=torch.float64)  # on the CPU, wherever the losses are
    got = kernels.flow_weights(loss, target, temperature, None, IGNORE, normalize)
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].double(), weights, rtol=5e-6, atol=0)
    offsets = torch.arange(0, 21 * 300 + 1, 300, device=DEVICE)
    packed = kernels.flow_weights(loss.reshape(-1), target.reshape(-1), temperature, offsets, IGNORE, normalize)
    assert all(map(torch.equal, packed, got))


def test_flow_weights_of_unequal_lengths_and_of_nothing():
    loss = torch.arange(1.0, 8.0, device=DEVICE)
    target = torch.zeros(7, dtype=torch.int64, device=DEVICE)
    offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32, device=DEVICE)
    two = torch.tensor(2.0, device=DEVICE)
    mean_loss, weights = kernels.flow_weights(loss, target, two, offsets, IGNORE, "none")
    torch.testing.assert_close(mean_loss.cpu(), torch.tensor([1.5, 0.0, 5.0]))
    torch.testing.assert_close(weights.cpu(), torch.tensor([-0.75, -torch.inf, -2.5]).exp())
    assert kernels.flow_weights(loss[:0], target[:0], two, offsets[:1], IGNORE, "none")[0].shape == (0,)
    none = kernels.flow_weights(loss, target - 100, two, offsets, IGNORE, "simplex")
    assert not none[0].any()
    assert not none[1].any()


def test_losses_of_a_batch_and_their_weights_in_one_pass_over_the_logits():
    logits, target, _, _ = batch(8, 120, torch.bfloat16)
    loss, _, _ = kernels.cross_entropy_fwd(logits[:4], target[:4], None, *PLAIN)
    _, weights = flow_kernels.weigh_samples(loss.view(2, 2), target[:4].view(2, 2), 1.5, backend="triton")
    scores = flow_kernels.score_samples(logits[:4].view(2, 2, 120), target[:4].view(2, 2), backend="triton")
    expected = torch.exp(-scores.loss_sum / scores.num_targets / 1.5)
    torch.testing.assert_close(weights, expected)
