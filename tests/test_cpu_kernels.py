"""The compiled CPU kernels, every instruction set this CPU has, against the reference in fp64.

What all backends share is tested over all backends elsewhere; here is what only these kernels can get wrong: tile and
row-block edges, kept exponentials, threads, packing of skipped rows, and the precision that the tiles promise.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from flow_kernels import backends, cpu, reference

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no compiled CPU kernels: {cpu.why_not()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative Frobenius error of a gradient that is rounded once to the dtype, after operands rounded once (fp16 input is
# multiplied in fp32): unit roundoff 2^-8 and 2^-11, and fp32's accumulation.
GRADIENT_ERROR = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# class weights, ignore_index, label smoothing, soft-cap, z-loss
PLAIN = (None, -100, 0.0, 0.0, 0.0)
CAPPED = (None, -100, 0.1, 2.0, 1e-3)


def kernels(dtypes=DTYPES):
    if cpu.why_not() is not None:
        return []
    return [
        pytest.param(dtype, name, id=f"{str(dtype)[6:]}-{name}") for dtype in dtypes for name in cpu.kernel_names(dtype)
    ]


def head(num_rows, dim, num_classes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(num_rows, dim, generator=generator).to(dtype)
    weight = (torch.randn(num_classes, dim, generator=generator) / dim**0.5).to(dtype)
    target = torch.randint(0, num_classes, (num_rows,), generator=generator)
    return input, weight, target, torch.randn(num_rows, generator=generator)


def wide(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def error(actual, expected):
    # With one class the gradient is what is left of terms near 1, so its own size is no measure.
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(0.1))


@pytest.mark.parametrize(("dtype", "name"), kernels())
@pytest.mark.parametrize(
    ("num_rows", "dim", "num_classes"),
    [(1, 1, 1), (3, 0, 4), (3, 5, 2), (17, 31, 509), (70, 64, 1201), (1030, 33, 97), (5, 2304, 130), (40, 130, 509)],
)
@pytest.mark.parametrize("has_options", [False, True])
def test_against_fp64(num_rows, dim, num_classes, dtype, name, has_options):
    input, weight, target, row_weight = head(num_rows, dim, num_classes, dtype)
    bias = class_weight = None
    options = PLAIN
    if has_options:
        bias, class_weight = torch.randn(num_classes).to(dtype), torch.rand(num_classes)
        options = (class_weight, -100, 0.1, 5.0, 1e-3)
    if num_rows > 2:
        target[1], row_weight[2] = -100, 0.0
        input[1:3] = float("nan")
    needs = (True, True, has_options)
    arguments = wide(input, weight, target, row_weight, bias)
    expected_options = (*wide(options[0]), *options[1:])
    expected = reference.linear_cross_entropy_fwd_bwd(*arguments, *expected_options, 0, *needs)
    total, loss, *grads = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight, bias, *options, 0, *needs, kernels=name
    )
    torch.testing.assert_close(total, expected[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected[1].float(), rtol=1e-6, atol=1e-5)
    for actual, wanted in zip(grads, expected[2:], strict=True):
        assert error(actual, wanted) <= GRADIENT_ERROR[dtype]

    kept = torch.where(row_weight == 0, -100, target)
    loss, lse, correct = cpu.linear_cross_entropy_fwd(input, weight, kept, bias, *options, 0, kernels=name)
    wanted = reference.linear_cross_entropy_fwd(*wide(input, weight, kept, bias), *expected_options, 0)
    torch.testing.assert_close(loss, wanted[0].float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-6, atol=1e-5)
    assert torch.equal(correct, wanted[2])
    grads = cpu.linear_cross_entropy_bwd(
        row_weight, input, weight, target, lse, bias, *options, 0, *needs, kernels=name
    )
    for actual, wanted in zip(grads, expected[2:], strict=True):
        assert error(actual, wanted) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
# Given logits are widened to fp32 as they are read: the kernels of fp32 serve every dtype.
@pytest.mark.parametrize("name", cpu.kernel_names(torch.float32) if cpu.why_not() is None else [])
@pytest.mark.parametrize("num_classes", [1, 2, 1023, 1024, 50257])
@pytest.mark.parametrize("has_options", [False, True])
def test_given_logits_against_fp64(num_classes, name, dtype, has_options):
    logits = (4 * torch.randn(6, num_classes)).to(dtype)
    target = torch.randint(0, num_classes, (6,))
    target[1] = -100
    logits[1] = float("nan")
    row_weight = torch.randn(6)
    options = (torch.rand(num_classes), -100, 0.1, 5.0, 1e-3) if has_options else PLAIN
    expected_options = (*wide(options[0]), *options[1:])
    expected = reference.cross_entropy_fwd_bwd(*wide(logits, target, row_weight), *expected_options)
    _, loss, dlogits = cpu.cross_entropy_fwd_bwd(logits, target, row_weight, *options, kernels=name)
    torch.testing.assert_close(loss, expected[1].float(), rtol=1e-6, atol=1e-5)
    assert error(dlogits, expected[2]) <= GRADIENT_ERROR[dtype]
    loss, lse, correct = cpu.cross_entropy_fwd(logits, target, *options, kernels=name)
    wanted = reference.cross_entropy_fwd(*wide(logits), target, *expected_options)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-6, atol=1e-5)
    assert torch.equal(correct, wanted[2])
    dlogits = cpu.cross_entropy_bwd(row_weight, logits, target, lse, *options, kernels=name)
    assert error(dlogits, expected[2]) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize(("dtype", "name"), kernels())
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_confident_rows(dtype, name, p):
    # One logit stands out by the margin that makes its probability about p; the gradient is what is left of 1 - p.
    num_rows, dim, num_classes = 16, 32, 300
    margin = torch.logit(torch.tensor(p, dtype=torch.float64)) + torch.log(torch.tensor(num_classes - 1.0))
    _, weight, target, row_weight = head(num_rows, dim, num_classes, torch.float64, seed=3)
    weight = (weight / weight.norm(dim=1, keepdim=True)).to(dtype)
    input = (margin * weight[target].double()).to(dtype)
    needs = (True, True, False)
    _, loss, *expected = reference.linear_cross_entropy_fwd_bwd(
        *wide(input, weight, target, row_weight), None, *PLAIN, 0, *needs
    )
    _, actual_loss, *actual = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight.float(), None, *PLAIN, 0, *needs, kernels=name
    )
    # The others' sum is made without the target: a loss of 1e-4 is off by what fp32 logits near 10 are, 1e-6, of itself.
    torch.testing.assert_close(actual_loss, loss.float(), rtol=2e-5, atol=0)
    leaves = [input.clone().requires_grad_(), weight.clone().requires_grad_()]
    nll = torch.nn.functional.cross_entropy((leaves[0] @ leaves[1].T).float(), target, reduction="none")
    eager = torch.autograd.grad((row_weight.float() * nll).sum(), leaves)
    for got, wanted, other in zip(actual[:2], expected[:2], eager, strict=True):
        relative = float((got.double() - wanted).norm() / wanted.norm())
        if dtype != torch.float32:
            assert relative <= float((other.double() - wanted).norm() / wanted.norm()) / 2
        assert relative <= {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_threads_and_runs_agree(dtype, name):
    input, weight, target, row_weight = head(75, 48, 3001, dtype)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            result = cpu.linear_cross_entropy_fwd_bwd(
                input, weight, target, row_weight, None, *PLAIN, 0, True, True, False, kernels=name
            )
            same = results.setdefault(threads, result)
            assert all(torch.equal(a, b) for a, b in zip(result, same, strict=True)), "not the same from run to run"
    finally:
        torch.set_num_threads(before)
    one, two = results[1], results[2]
    assert torch.equal(one[1], two[1]), "losses depend on the number of threads"
    assert torch.equal(one[3], two[3]), "dweight depends on the number of threads"
    # dinput is summed over threads in fp32, and what crosses a rounding boundary by that moves by one unit.
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    assert error(one[2], two[2].double()) <= bound


@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["exponentials", "logits"])
@pytest.mark.parametrize(("num_rows", "dim"), [(40, 64), (150, 256), (1100, 256)])
@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_what_is_kept_changes_nothing(dtype, name, num_rows, dim, options):
    """The same gradients whether exponentials (with a soft-cap, logits) are kept for all tiles, some or none.

    Of 150 and 1100 rows, the smaller chunks leave most to dweight's memory, where it has room, and make some again.
    """
    num_classes = 3001 if num_rows < 1000 else 1201
    input, weight, target, row_weight = head(num_rows, dim, num_classes, dtype)
    bias = torch.randn(num_classes).to(dtype)
    needs = (True, True, True)
    expected = reference.linear_cross_entropy_fwd_bwd(
        *wide(input, weight, target, row_weight, bias), *options, 0, *needs
    )
    for chunk_size in (1, 13, 40, 10**9):
        actual = cpu.linear_cross_entropy_fwd_bwd(
            input, weight, target, row_weight, bias, *options, chunk_size, *needs, kernels=name
        )
        torch.testing.assert_close(actual[1].double(), expected[1], rtol=2e-6, atol=2e-6)
        for got, wanted in zip(actual[2:], expected[2:], strict=True):
            assert error(got, wanted) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("need_dlinear_weight", [True, False])
def test_exponentials_in_bytes(need_dlinear_weight):
    """More logits than fit in two bytes each: kept in one byte, in dweight's memory and beside it, or made again."""
    num_rows, dim, num_classes = 1100, 64, 120_001
    input, weight, target, row_weight = head(num_rows, dim, num_classes, torch.bfloat16)
    input *= 3  # probabilities up to 0.5
    _, loss, *grads = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight, None, *PLAIN, 0, True, need_dlinear_weight, False
    )
    # One row of logits in the buffer: the others are made again, but for those in dweight's memory, in two bytes.
    _, other_loss, *others = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight, None, *PLAIN, 1, True, need_dlinear_weight, False
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=2e-6)
    rows = torch.arange(0, num_rows, 45)
    logits = (input[rows].float() @ weight.float().T).double()
    dlogits = torch.softmax(logits, 1)
    dlogits[torch.arange(len(rows)), target[rows]] -= 1
    dlogits *= row_weight[rows, None].double()
    expected = (dlogits.float() @ weight.float()).double()
    assert error(grads[0][rows], expected) <= GRADIENT_ERROR[torch.bfloat16]
    if need_dlinear_weight:
        assert error(grads[1], others[1].double()) <= GRADIENT_ERROR[torch.bfloat16]


@pytest.mark.parametrize("value", [-1, 40, 2**40, -(2**40)])
def test_bad_target_is_named(value):
    input, weight, target, row_weight = head(5, 8, 40, torch.float32)
    target[3] = value
    message = rf"the target of row 3 is {value}, outside \[0, 40\) and not ignore_index=-100"
    with pytest.raises(IndexError, match=message):
        cpu.linear_cross_entropy_fwd(input, weight, target, None, *PLAIN, 0)
    with pytest.raises(IndexError, match=message):
        cpu.linear_cross_entropy_fwd_bwd(input, weight, target, row_weight, None, *PLAIN, 0, True, True, False)
    with pytest.raises(IndexError, match=message):
        cpu.cross_entropy_fwd(input @ weight.T, target, *PLAIN)


@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_strides(dtype, name):
    input, weight, target, row_weight = head(9, 24, 130, dtype)
    wanted = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight, None, *PLAIN, 0, True, True, False, kernels=name
    )
    strided = torch.zeros(9, 60, dtype=dtype)
    strided[:, 6:30] = input
    for other in (strided[:, 6:30], input.T.contiguous().T):
        got = cpu.linear_cross_entropy_fwd_bwd(
            other, weight.T.contiguous().T, target, row_weight, None, *PLAIN, 0, True, True, False, kernels=name
        )
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    # One row expanded to all, and an upstream gradient of stride 0.
    expanded = input[:1].expand(9, 24)
    got = cpu.linear_cross_entropy_fwd(expanded, weight, target, None, *PLAIN, 0, kernels=name)
    grads = cpu.linear_cross_entropy_bwd(
        torch.ones(1).expand(9), expanded, weight, target, got[1], None, *PLAIN, 0, True, True, False, kernels=name
    )
    wanted = reference.linear_cross_entropy_bwd(
        torch.ones(9).double(), *wide(expanded, weight), target, got[1].double(), None, *PLAIN, 0, True, True, False
    )
    assert error(grads[1], wanted[1]) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize(("dtype", "name"), kernels())
@pytest.mark.parametrize("num_rows", [1, 17, 100])
def test_few_rows_have_the_bits_of_many(dtype, name, num_rows):
    """Their products are made the other way round, with the head's rows read where they lie, at any alignment."""
    input, weight, target, row_weight = head(300, 514, 1201, dtype)
    skewed = torch.zeros(1201, 517, dtype=dtype)
    skewed[:, 1:515] = weight
    options = ((*CAPPED, 0), (True, False, False))
    many = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight, None, *options[0], *options[1], kernels=name
    )
    lse = cpu.linear_cross_entropy_fwd(input, weight, target, None, *options[0], kernels=name)[1]
    few = [tensor[:num_rows] for tensor in (input, target, row_weight)]
    for rows in (weight, skewed[:, 1:515]):
        found = cpu.linear_cross_entropy_fwd(few[0], rows, few[1], None, *options[0], kernels=name)
        assert torch.equal(found[1], lse[:num_rows])
        found = cpu.linear_cross_entropy_fwd_bwd(few[0], rows, *few[1:], None, *options[0], *options[1], kernels=name)
        assert torch.equal(found[1], many[1][:num_rows])
        assert error(found[2], many[2][:num_rows].double()) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_nothing_counts(dtype, name):
    for num_rows in (0, 4):
        input, weight, target, _ = head(num_rows, 8, 20, dtype)
        input.fill_(float("nan"))
        total, loss, *grads = cpu.linear_cross_entropy_fwd_bwd(
            input, weight, target, torch.zeros(num_rows), None, *PLAIN, 0, True, True, True, kernels=name
        )
        assert total == 0
        assert all(not t.any() for t in (loss, *grads))
        assert grads[0].shape == input.shape
        assert grads[1].shape == weight.shape


@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_infinite_and_nan_logits(dtype, name):
    input, weight, target, _ = head(6, 16, 700, dtype)
    target.clamp_(max=300)
    # A masked end of the vocabulary is a vocabulary without it, also where whole tiles are masked.
    bias = torch.zeros(700).to(dtype)
    bias[310:] = float("-inf")
    masked = cpu.linear_cross_entropy_fwd(input, weight, target, bias, *PLAIN, 0, kernels=name)
    short = cpu.linear_cross_entropy_fwd(input, weight[:310], target, None, *PLAIN, 0, kernels=name)
    torch.testing.assert_close(masked[0], short[0], rtol=1e-6, atol=1e-6)
    bias = bias.flip(0)
    masked = cpu.linear_cross_entropy_fwd(input, weight, 699 - target, bias, *PLAIN, 0, kernels=name)
    short = cpu.linear_cross_entropy_fwd(input, weight[390:], 309 - target, None, *PLAIN, 0, kernels=name)
    torch.testing.assert_close(masked[0], short[0], rtol=1e-6, atol=1e-6)
    # NaN is never swallowed by a maximum.
    weight[650, 3] = float("nan")
    assert cpu.linear_cross_entropy_fwd(input, weight, target, None, *PLAIN, 0, kernels=name)[0].isnan().all()


@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_masked_tiles_before_low_logits(dtype, name):
    # Of tiles that are masked from the first on, zeros are kept; their shift must not make 0 * exp(-lse) of them, which
    # is NaN below an lse of -88.
    input, weight, target, row_weight = head(5, 8, 1400, dtype)
    target = 1000 + target % 400
    bias = torch.full((1400,), -120.0).to(dtype)
    bias[:1000] = float("-inf")
    options = (*PLAIN, 0, True, True, True)
    total, _, dinput, dweight, dbias = cpu.linear_cross_entropy_fwd_bwd(
        input, weight, target, row_weight, bias, *options, kernels=name
    )
    expected = reference.linear_cross_entropy_fwd_bwd(
        *wide(input, weight[1000:], target - 1000, row_weight, bias[1000:]), *options
    )
    torch.testing.assert_close(total, expected[0].float(), rtol=1e-5, atol=1e-5)
    for actual, wanted in zip((dinput, dweight[1000:], dbias[1000:]), expected[2:], strict=True):
        assert error(actual, wanted) <= GRADIENT_ERROR[dtype]
    assert not dweight[:1000].any()
    assert not dbias[:1000].any()


def test_operators_refuse_rows_that_do_not_fit():
    logits, target, options = torch.randn(2, 5), torch.zeros(3, dtype=torch.int64), PLAIN
    with pytest.raises(ValueError, match=r"target must have shape \[2\].*got \[3\]"):
        cpu.cross_entropy_fwd(logits, target, *options)
    with pytest.raises(ValueError, match=r"target must have shape \[2\]"):
        cpu.cross_entropy_fwd_bwd(logits, target, torch.ones(3), *options)
    with pytest.raises(ValueError, match=r"lse must have shape \[2\], one per row of logits, got \[1\]"):
        cpu.cross_entropy_bwd(torch.ones(2), logits, target[:2], torch.zeros(1), *options)


def test_dtypes_without_kernels_are_left_to_the_reference():
    assert backends.resolve("auto", "cpu", torch.float8_e5m2) == "reference"
    with pytest.raises(backends.BackendUnavailable, match=r"take fp32.*not torch.float8_e5m2"):
        backends.resolve("cpu", "cpu", torch.float8_e5m2)


def test_backend_choice():
    assert backends.resolve("auto", "cpu") == "cpu"
    found = backends.status("cpu", "cuda")
    assert not found.available
    with pytest.raises(backends.BackendUnavailable, match="CPU memory"):
        backends.resolve("cpu", "cuda")


def test_missing_and_broken_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "library_path", lambda: None)
    assert "pip install" in cpu.why_not()
    assert backends.resolve("auto", "cpu") == "reference"
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    with pytest.raises(ImportError, match="do not load"):
        backends.resolve("auto", "cpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the CPU's vendor is read from Linux")
def test_bf16_is_multiplied_in_fp32_where_vdpbf16ps_is_slow():
    info = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*:(.*)$", info, re.MULTILINE)[1].split())
    if "avx512_bf16" not in flags or not {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        expected = {"avx512", "avx2"}
    elif (
        "amx_bf16" in flags
        and torch.cpu._init_amx()
        and not {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & set(os.environ)
    ):
        expected = {"brgemm"}
    else:
        expected = {"avx512"} if "GenuineIntel" in info else {"avx512_bf16"}
    assert cpu.kernel_names(torch.bfloat16)[0] in expected
