"""`grad_filter_eps`: which classes are left out of the head's gradients, and that nothing else changes.

The definition is made here from autograd in fp64: within a block of 1024 rows that count, a class is left out if the
gradient of its logit, before row weights, is below the bound in every row.
"""

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_cpu_kernels import GRADIENT_ERROR, error, head, kernels

from flow_kernels import LinearCrossEntropyLoss, cpu, linear_cross_entropy, reference

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no compiled CPU kernels: {cpu.why_not()}")

ROW_BLOCK = 1024
EPS = 0.02
# What a kernel may take for the other side of the bound: kept exponentials of bf16 are exact to 2^-12.
DOUBT = 2**-9
ALL = {"softcap": 6.0, "z_loss": 1e-3}


def problem(num_rows, dim=24, num_classes=1201, dtype=torch.float32, seed=0):
    """A head with peaked rows, whose first two rows do not count; row weights of both signs and many sizes."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(num_rows, dim, generator=generator).to(dtype)
    linear_weight = (3.0 * torch.randn(num_classes, dim, generator=generator) / dim**0.5).to(dtype)
    target = torch.randint(0, num_classes // 4, (num_rows,), generator=generator)
    size = 10.0 ** torch.randint(-4, 1, (num_rows,), generator=generator)
    row_weight = size * torch.randn(num_rows, generator=generator)
    target[0], row_weight[1] = -100, 0.0
    input[:2] = float("nan")
    return input, linear_weight, target, row_weight


def logit_gradients(input, linear_weight, target, linear_bias, options):
    logits = F.linear(input.double(), linear_weight.double(), linear_bias).detach().requires_grad_()
    return torch.autograd.grad(oracle.row_losses(logits, target, **options).sum(), logits)[0]


def expected(input, linear_weight, target, row_weight, eps, linear_bias=None, **options):
    """`(dinput, dlinear_weight)`, what of dinput is in doubt, and masks of the classes in doubt and left out; fp64."""
    keep = ((target != -100) & (row_weight != 0)).nonzero().squeeze(1)
    dinput, in_doubt = (torch.zeros(input.shape, dtype=torch.float64) for _ in range(2))
    dlinear_weight = torch.zeros(linear_weight.shape, dtype=torch.float64)
    doubtful, left_out = (torch.full((len(linear_weight),), value) for value in (False, True))
    for rows in keep.split(ROW_BLOCK):
        gradient = logit_gradients(input[rows], linear_weight, target[rows], linear_bias, options)
        largest = gradient.abs().amax(0)
        near = (largest / eps - 1).abs() < DOUBT
        gradient = row_weight[rows, None].double() * gradient * (largest >= eps)
        dinput[rows] = gradient @ linear_weight.double()
        in_doubt[rows] = gradient.abs() @ (near[:, None] * linear_weight.double().abs())
        dlinear_weight += gradient.T @ input[rows].double()
        doubtful |= near
        left_out &= largest < eps
    return dinput, dlinear_weight, in_doubt, doubtful, left_out & ~doubtful


@pytest.mark.parametrize(("dtype", "name"), kernels())
# Small chunks keep the exponentials of some rows in dweight's own memory, and those of the others for some tiles.
@pytest.mark.parametrize(
    ("num_rows", "eps", "dim", "chunk_size"),
    [
        (3, EPS, 24, 0), (70, EPS, 24, 0), (ROW_BLOCK + 70, 0.3, 24, 0),
        (70, EPS, 128, 1), (150, EPS, 128, 1), (ROW_BLOCK + 70, 0.3, 128, 1), (ROW_BLOCK + 70, 0.3, 128, 400),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_leaves_out_exactly_what_is_small(num_rows, eps, dim, chunk_size, options, dtype, name):
    input, linear_weight, target, row_weight = problem(num_rows, dim, dtype=dtype)
    class_weight = linear_bias = None
    if options:
        class_weight, linear_bias = 0.5 + torch.rand(len(linear_weight)), torch.randn(len(linear_weight)).to(dtype)
    wanted = expected(
        input, linear_weight, target, row_weight, eps, None if linear_bias is None else linear_bias.double(),
        weight=class_weight, **options,
    )  # fmt: skip
    dinput, dlinear_weight, in_doubt, doubtful, left_out = wanted
    # Something is left out, something stays, and little of it is near the bound.
    assert 0.05 < left_out.double().mean() < 1
    assert doubtful.double().mean() <= 0.05
    numbers = (class_weight, -100, 0.0, options.get("softcap", 0.0), options.get("z_loss", 0.0))
    head = (input, linear_weight, target)
    one_pass = cpu.linear_cross_entropy_fwd_bwd(
        *head, row_weight, linear_bias, *numbers, chunk_size, True, True, True, eps, kernels=name
    )
    whole = cpu.linear_cross_entropy_fwd_bwd(
        *head, row_weight, linear_bias, *numbers, chunk_size, True, True, True, kernels=name
    )
    lse = cpu.linear_cross_entropy_fwd(*head, linear_bias, *numbers, 0, kernels=name)[1]
    two_pass = cpu.linear_cross_entropy_bwd(
        row_weight, *head, lse, linear_bias, *numbers, 0, True, True, True, eps, kernels=name
    )
    for actual in (one_pass[2:], two_pass):
        assert error(actual[1][~doubtful], dlinear_weight[~doubtful]) <= GRADIENT_ERROR[dtype]
        assert (actual[1][left_out] == 0).all()
        bound = GRADIENT_ERROR[dtype] * dinput.norm() + in_doubt.norm()
        assert (actual[0].double() - dinput).norm() <= bound
        # The bias' gradient is a sum that costs nothing: of all classes.
        assert error(actual[2], whole[4].double()) <= 2 * GRADIENT_ERROR[dtype]
    # A kernel that left out nothing would not pass.
    assert (whole[3][left_out] != 0).any()
    assert torch.equal(one_pass[1], whole[1])


@pytest.mark.parametrize(("dtype", "name"), kernels())
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_frozen_parts(needs, dtype, name):
    input, linear_weight, target, row_weight = problem(70, dtype=dtype)
    arguments = (input, linear_weight, target, row_weight, None, None, -100, 0.0, 0.0, 0.0, 0)
    both = cpu.linear_cross_entropy_fwd_bwd(*arguments, True, True, False, EPS, kernels=name)[2:4]
    alone = cpu.linear_cross_entropy_fwd_bwd(*arguments, *needs, False, EPS, kernels=name)[2:4]
    for gradient, wanted, need in zip(alone, both, needs, strict=True):
        assert torch.equal(gradient, wanted) if need else gradient.numel() == 0


@pytest.mark.parametrize(("dtype", "name"), kernels())
@pytest.mark.parametrize("num_rows", [40, ROW_BLOCK + 40])
def test_a_bound_below_everything_leaves_out_nothing(num_rows, dtype, name):
    input, linear_weight, target, row_weight = problem(num_rows, dtype=dtype)
    arguments = (input, linear_weight, target, row_weight, None, None, -100, 0.0, 0.0, 0.0, 0, True, True, False)
    got = cpu.linear_cross_entropy_fwd_bwd(*arguments, 1e-30, kernels=name)[2:4]
    whole = cpu.linear_cross_entropy_fwd_bwd(*arguments, kernels=name)[2:4]
    for actual, wanted in zip(got, whole, strict=True):
        assert error(actual, wanted.double()) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("weight", [1.0, -1e-6, 1e4])
def test_the_bound_is_before_row_weights(weight):
    input, linear_weight, target, _ = (t[2:] if t.shape[0] == 70 else t for t in problem(70))

    def gradients(factor):
        leaves = [t.clone().requires_grad_() for t in (input, linear_weight)]
        weights = torch.full((len(target),), factor)
        linear_cross_entropy(
            *leaves, target, sample_weight=weights, grad_filter_eps=EPS, reduction="sum", backend="cpu"
        ).backward()
        return [t.grad for t in leaves]

    for actual, plain in zip(gradients(weight), gradients(1.0), strict=True):
        assert torch.equal(actual == 0, plain == 0)
        torch.testing.assert_close(actual, weight * plain, rtol=1e-5, atol=1e-6 * abs(weight))


@pytest.mark.parametrize(("dtype", "name"), kernels())
def test_nan_is_never_left_out(dtype, name):
    input, linear_weight, target, row_weight = problem(20, dtype=dtype)
    linear_weight[77, 3] = float("nan")
    grads = cpu.linear_cross_entropy_fwd_bwd(
        input, linear_weight, target, row_weight, None, None, -100, 0.0, 0.0, 0.0, 0, True, True, False, 0.9,
        kernels=name,
    )[2:4]  # fmt: skip
    assert grads[0][2:].isnan().all()
    assert grads[1].isnan().all()


def test_bit_equal_from_run_to_run():
    arguments = (*problem(ROW_BLOCK + 30, dtype=torch.bfloat16), None, None, -100, 0.0, 0.0, 0.0, 0, True, True, False)
    first, second = (cpu.linear_cross_entropy_fwd_bwd(*arguments, EPS) for _ in range(2))
    for a, b in zip(first[1:4], second[1:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_rows", [90, ROW_BLOCK + 30])
def test_threads_change_the_sum_of_dinput_only(num_rows):
    arguments = (*problem(num_rows), None, None, -100, 0.0, 0.0, 0.0, 0, True, True, False)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(cpu.linear_cross_entropy_fwd_bwd(*arguments, EPS))
    finally:
        torch.set_num_threads(threads)
    one, three = found
    assert torch.equal(one[3], three[3])
    torch.testing.assert_close(one[2][2:], three[2][2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-30, 2**-12])
def test_exponentials_in_bytes(eps):
    """As the test of the same name in test_cpu_kernels.py: kept in one byte, in dweight's memory and beside it."""
    input, linear_weight, target, row_weight = head(1100, 64, 120_001, torch.bfloat16)
    input *= 3
    arguments = (input, linear_weight, target, row_weight, None, None, -100, 0.0, 0.0, 0.0, 0, True, True, False)
    whole = cpu.linear_cross_entropy_fwd_bwd(*arguments)[2:4]
    dinput, dlinear_weight = cpu.linear_cross_entropy_fwd_bwd(*arguments, eps)[2:4]
    kept = (dlinear_weight != 0).any(1)
    assert kept[target].all()
    # What one block leaves out of a class that the other keeps is small.
    assert error(dlinear_weight[kept], whole[1][kept].double()) <= 2 * GRADIENT_ERROR[torch.bfloat16]
    if eps == 1e-30:
        assert error(dlinear_weight, whole[1].double()) <= GRADIENT_ERROR[torch.bfloat16]
        assert error(dinput, whole[0].double()) <= GRADIENT_ERROR[torch.bfloat16]
    else:
        assert 0.01 < kept.double().mean() < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_public_functions_pass_it_on(reduction, dtype):
    input, linear_weight, target, row_weight = problem(40, dtype=dtype)

    def gradients(fn):
        leaves = [t.clone().requires_grad_() for t in (input, linear_weight)]
        fn(*leaves, target, sample_weight=row_weight).sum().backward()
        return [t.grad for t in leaves]

    def with_options(**options):
        return lambda *a, **k: linear_cross_entropy(*a, **k, reduction=reduction, **options)

    filtered = gradients(with_options(grad_filter_eps=EPS, backend="cpu"))
    module = LinearCrossEntropyLoss(reduction=reduction, grad_filter_eps=EPS, backend="cpu")
    for a, b in zip(filtered, gradients(module), strict=True):
        assert torch.equal(a, b)
    assert (filtered[1] == 0).all(1).any()
    # A permission, not an order: the reference computes everything.
    plain = gradients(with_options(backend="reference"))
    for a, b in zip(gradients(with_options(grad_filter_eps=EPS, backend="reference")), plain, strict=True):
        assert torch.equal(a, b)


def test_reference_takes_it_in_fp64():
    input, linear_weight, target, row_weight = problem(20)
    arguments = (
        input.double(),
        linear_weight.double(),
        target,
        row_weight.double(),
        None,
        None,
        -100,
        0.0,
        0.0,
        0.0,
        0,
    )
    got = cpu.linear_cross_entropy_fwd_bwd(*arguments, True, True, False, EPS)
    for a, b in zip(got, reference.linear_cross_entropy_fwd_bwd(*arguments, True, True, False), strict=True):
        assert torch.equal(a, b)
