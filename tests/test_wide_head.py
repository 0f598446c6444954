"""An fp32 head beside a 16-bit input, as autocast leaves it: rounded for the products, its gradient not at all."""

from functools import partial

import oracle
import pytest
import torch
from test_cpu_kernels import CAPPED, PLAIN, error, head, kernels

from flow_kernels import cpu, linear_cross_entropy, linear_score_tokens, ops, reference

NARROW = (torch.bfloat16, torch.float16)
# Words of two bf16: the weight is rounded as it is packed. The others widen the input and take the weight as it is.
ROUNDING = ("avx512_bf16", "brgemm")


def problem(num_rows, dim, num_classes, dtype, is_exact=False):
    """A head in fp32 and the same in `dtype`; `is_exact`: both hold the same numbers."""
    input, weight, target, row_weight = head(num_rows, dim, num_classes, torch.float32)
    if num_rows > 2:
        target[1], row_weight[2] = -100, 0.0
    if is_exact:
        weight = weight.to(dtype).float()
    return input.to(dtype), weight, weight.to(dtype), target, row_weight


@pytest.mark.parametrize(("dtype", "name"), kernels(NARROW))
@pytest.mark.parametrize(
    ("num_rows", "dim", "num_classes"),
    [(1, 1, 1), (3, 0, 4), (3, 5, 2), (17, 31, 509), (70, 64, 1201), (1030, 33, 97), (5, 2304, 130), (300, 130, 509)],
)
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_the_kernels_agree_with_a_head_of_the_inputs_dtype(num_rows, dim, num_classes, dtype, name, options):
    input, wide, narrow, target, row_weight = problem(num_rows, dim, num_classes, dtype, name not in ROUNDING)
    bias, needs = torch.randn(num_classes), (True, True, True)
    run = partial(cpu.linear_cross_entropy_fwd_bwd, kernels=name)
    found = run(input, wide, target, row_weight, bias, *options, 0, *needs)
    expected = run(input, narrow, target, row_weight, bias, *options, 0, *needs)
    assert found[3].dtype == torch.float32
    assert found[2].dtype == dtype
    for actual, wanted in zip(found, expected, strict=True):
        # One rounding to the dtype where the other has it, and sums of fp32 in another order.
        assert error(actual, wanted) <= (torch.finfo(dtype).eps / 2 if wanted.dtype == dtype else 2e-6)
    exact = reference.linear_cross_entropy_fwd_bwd(
        input.double(), narrow.double(), target, row_weight.double(), bias.double(), *options, 0, *needs
    )
    # Where P is rounded to bf16 for the products; where the exponentials of bf16 rows are kept in 16 bits; fp32's.
    limit = 3e-3 if name in ROUNDING else 1e-4 if dtype == torch.bfloat16 else 5e-6
    assert error(found[3], exact[3]) <= limit

    kept = torch.where(row_weight == 0, -100, target)
    losses = [cpu.linear_cross_entropy_fwd(input, w, kept, bias, *options, 0, kernels=name) for w in (wide, narrow)]
    scores = [
        cpu.linear_cross_entropy_score(input, w, kept, bias, -100, options[3], 0, kernels=name) for w in (wide, narrow)
    ]
    for actual, wanted in (*zip(*losses, strict=True), *zip(*scores, strict=True)):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=2e-6)
    backward = partial(cpu.linear_cross_entropy_bwd, kernels=name)
    found = backward(row_weight, input, wide, kept, losses[0][1], bias, *options, 0, *needs)
    assert error(found[1], exact[3]) <= limit


@pytest.mark.parametrize("name", [name for name in cpu.kernel_names(torch.bfloat16) if name in ROUNDING])
@pytest.mark.parametrize("num_rows", [5, 200, 300, 1100])
@pytest.mark.parametrize(
    "case", ["plain", "rows of the head apart", "nothing kept but one row", "filtered", "frozen head", "frozen input"]
)
def test_bit_for_bit_but_for_the_gradients_rounding(case, num_rows, name):
    input, wide, narrow, target, row_weight = problem(num_rows, 128, 1500, torch.bfloat16)
    if case == "rows of the head apart":
        wide = torch.cat([wide, torch.full((1500, 8), float("nan"))], 1)[:, :128]
    needs = (case != "frozen input", case != "frozen head", False)
    numbers = (int(case == "nothing kept but one row"), *needs, 2**-12 if case == "filtered" else 0.0)
    found, expected = (
        cpu.linear_cross_entropy_fwd_bwd(input, weight, target, row_weight, None, *PLAIN, *numbers, kernels=name)
        for weight in (wide, narrow)
    )
    for actual, wanted in zip(found, expected, strict=True):
        if case == "nothing kept but one row":  # in an fp32 gradient's memory there is room for more of them
            assert error(actual, wanted) <= (
                torch.finfo(wanted.dtype).eps / 2 if wanted.dtype == torch.bfloat16 else 1e-6
            )
        else:
            assert torch.equal(actual.to(wanted.dtype), wanted)
    if needs[1]:
        assert not torch.equal(found[3], expected[3].float())


def test_the_gradient_is_nearer_to_fp64s(backend):
    input, wide, narrow, target, row_weight = problem(90, 64, 201, torch.bfloat16)
    needs = (False, True, False)
    run = ops.linear_cross_entropy_fwd_bwd
    rest = (target, row_weight, None, *PLAIN, 0, *needs, 0.0)
    found, rounded = run(input, wide, *rest, backend)[3], run(input, narrow, *rest, backend)[3]
    exact = run(input.double(), narrow.double(), target, row_weight.double(), *rest[2:], "reference")[3]
    assert error(found, exact) < 0.8 * error(rounded, exact)


@pytest.mark.parametrize(
    "name", ["linear_cross_entropy_fwd", "linear_cross_entropy_fwd_bwd", "linear_cross_entropy_bwd"]
)
def test_opcheck(backend, name):
    input, wide, _, target, row_weight = problem(6, 4, 11, torch.bfloat16)
    leaves = [t.requires_grad_(name != "linear_cross_entropy_bwd") for t in (input, wide)]
    numbers = (*PLAIN, 2)
    arguments = {
        "linear_cross_entropy_fwd": (*leaves, target, None, *numbers, 0.0, backend),
        "linear_cross_entropy_fwd_bwd": (*leaves, target, row_weight, None, *numbers, True, True, False, 0.0, backend),
        "linear_cross_entropy_bwd": (
            row_weight, *leaves, target, torch.randn(6), None, *numbers, True, True, False, 0.0, backend,
        ),
    }[name]  # fmt: skip
    torch.library.opcheck(getattr(ops, name), arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", NARROW)
def test_autocast_gives_the_operators_the_head_itself(backend, dtype, reduction, monkeypatch):
    input, wide, narrow, target, _ = problem(20, 16, 61, dtype)
    weight = oracle.sample_weights(20)
    seen = []
    name = "linear_cross_entropy_fwd" + ("_bwd" if reduction == "mean" and dtype == torch.bfloat16 else "")
    operator = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: seen.append(args) or operator(*args))
    head = wide.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(
            input.float(), head, target, sample_weight=weight, reduction=reduction, backend=backend
        )
    (gradient,) = torch.autograd.grad(loss.sum(), head)
    assert seen[0][1] is head
    assert gradient.dtype == torch.float32
    expected = linear_cross_entropy(
        input.double(), narrow.double(), target, sample_weight=weight.double(), reduction=reduction
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-3)


def test_scores_under_autocast(backend):
    input, wide, narrow, target, _ = problem(20, 16, 61, torch.bfloat16, is_exact=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_score_tokens(input.float(), wide, target, backend=backend)
    expected = linear_score_tokens(input, narrow, target, backend=backend)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.correct, expected.correct)


def test_compiled_under_autocast(backend):
    input, wide, _, target, _ = problem(20, 16, 61, torch.bfloat16)
    results = []
    for compile in (lambda function: function, partial(torch.compile, backend="aot_eager", fullgraph=True)):
        leaves = [input.float().requires_grad_(), wide.clone().requires_grad_()]

        def loss(hidden, head):
            with torch.autocast("cpu", torch.bfloat16):
                return linear_cross_entropy(hidden, head, target, backend=backend)

        value = compile(loss)(*leaves)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_only_autocast_leaves_it_wide(backend):
    input, wide, narrow, target, _ = problem(20, 16, 61, torch.bfloat16)
    with pytest.raises(TypeError, match=r"linear_weight is torch\.float32 but input is torch\.bfloat16; cast one"):
        linear_cross_entropy(input, wide, target, backend=backend)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"linear_weight is .*bfloat16 but"):
        linear_cross_entropy(input.double(), narrow, target, backend=backend)
    for hidden, weight in (
        (input.float(), narrow),
        (input, narrow.half()),
        (input, narrow.double()),
        (input.double(), wide),
    ):
        with pytest.raises(TypeError, match="linear_weight is"):
            ops.linear_cross_entropy_fwd(hidden, weight, target, None, *PLAIN, 0, 0.0, backend)
