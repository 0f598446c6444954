"""cross_entropy and linear_cross_entropy against the oracle and against torch."""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from linear_heads import identity_head

import flow_kernels
from flow_kernels import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, ops

LINEAR = identity_head(linear_cross_entropy)


@pytest.fixture(params=[cross_entropy, LINEAR], ids=["cross_entropy", "identity_head"])
def loss_fn(request, backend_dtype):
    """Each operator on each backend and dtype, called with logits."""
    return partial(request.param, backend=backend_dtype[0])


@pytest.fixture
def dtype(backend_dtype):
    return backend_dtype[1]


def head(num_rows=24, hidden=16, num_classes=37, dtype=torch.float32, bias=False):
    """A small linear head: input, linear_weight, target, linear_bias."""
    input, linear_weight = torch.randn(num_rows, hidden), torch.randn(num_classes, hidden)
    target = torch.randint(num_classes, (num_rows,))
    target[1::7] = oracle.IGNORE
    return input.to(dtype), linear_weight.to(dtype), target, torch.randn(num_classes).to(dtype) if bias else None


@pytest.mark.parametrize("checker", oracle.CHECKERS, ids=lambda f: f.__name__)
def test_checkers(loss_fn, dtype, checker):
    checker(loss_fn, dtype)


CLASS_WEIGHT = torch.linspace(0.1, 2.0, 37)
OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "all_smoothing": {"label_smoothing": 1.0},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 1e-2},
    "class_weight": {"weight": CLASS_WEIGHT},
    "class_weight_smoothing": {"weight": CLASS_WEIGHT, "label_smoothing": 0.2},
    "everything": {"weight": CLASS_WEIGHT, "label_smoothing": 0.2, "softcap": 7.0, "z_loss": 1e-2},
    "class_weight_weights": {"weight": CLASS_WEIGHT, "normalizer": "weights"},
    "ignore_a_class": {"ignore_index": 3},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(loss_fn, dtype, options, reduction):
    logits, target = oracle.batch(dtype=dtype)
    if "ignore_index" in options:
        target[target == oracle.IGNORE] = options["ignore_index"]
    if reduction != "mean":
        options = {name: value for name, value in options.items() if name != "normalizer"}
    weights = oracle.sample_weights(len(target))
    oracle.check_cross_entropy(loss_fn, logits, target, sample_weight=weights, reduction=reduction, **options)
    oracle.check_cross_entropy(loss_fn, logits, target, reduction=reduction, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["", "class_weight"])
def test_unweighted_equals_torch(backend, weight, reduction, label_smoothing):
    logits, target = oracle.batch()
    options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    expected = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(cross_entropy(logits, target, backend=backend, **options), expected)
    torch.testing.assert_close(CrossEntropyLoss(backend=backend, **options)(logits, target), expected)


@pytest.mark.parametrize("form", ["row", "sequence", "leading", "cu_seqlens", "integer", "bool"])
@pytest.mark.parametrize("normalizer", ["targets", "weights", 9])
def test_weight_forms(loss_fn, dtype, form, normalizer):
    logits, target = oracle.batch(dtype=dtype)
    options = {"normalizer": normalizer}
    if form in ("row", "sequence"):
        logits, target = logits.view(4, 6, -1), target.view(4, 6)
        weights = oracle.sample_weights(24).view(4, 6) if form == "row" else oracle.sample_weights(4)
    elif form == "leading":
        logits, target, weights = logits.view(2, 3, 4, -1), target.view(2, 3, 4), torch.tensor([0.3, 1.7])
    elif form == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 1, 1, 10, 24], dtype=torch.int32)
        weights = torch.tensor([0.5, 100.0, 0.0, 2.0])
    else:
        weights = (torch.arange(24) % 3).to(torch.int64 if form == "integer" else torch.bool)
        expected = oracle.cross_entropy(logits.double(), target, sample_weight=weights, **options)
        oracle.assert_close(loss_fn(logits, target, sample_weight=weights, **options), expected)
        return
    oracle.check_cross_entropy(loss_fn, logits, target, sample_weight=weights, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 31), (7, 31), (0, 5), (2, 0, 5), (0, 3, 5), (5,)])
def test_shapes(loss_fn, dtype, shape, reduction):
    logits = torch.randn(shape).to(dtype)
    target = torch.randint(shape[-1], shape[:-1])
    oracle.check_cross_entropy(loss_fn, logits, target, reduction=reduction)
    oracle.check_cross_entropy(loss_fn, logits, target, reduction=reduction, sample_weight=torch.rand(shape[:-1]))


@pytest.mark.parametrize(("num_rows", "num_classes"), [(9, 50257), (3, 151936), (2, 262144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies(backend, num_rows, num_classes, dtype):
    logits, target = oracle.batch(num_rows, num_classes, dtype)
    target[0] = num_classes - 1
    oracle.check_cross_entropy(partial(cross_entropy, backend=backend), logits, target, softcap=30.0)
    input, linear_weight, target, _ = head(num_rows, 8, num_classes, dtype)
    fn = partial(linear_cross_entropy, backend=backend, chunk_size=2)
    oracle.check_linear_cross_entropy(fn, input, linear_weight, target)


STRIDES = {
    "transposed": lambda z: z.t().contiguous().t(),
    "every_second_column": lambda z: torch.cat([z, z], 1).reshape(*z.shape, 2)[..., 0],
    "column_slice": lambda z: F.pad(z, (3, 5))[:, 3:-5],
    "every_second_row": lambda z: z.repeat_interleave(2, 0)[::2],
    "expanded_rows": lambda z: z[:1].expand(z.shape),
    "expanded_columns": lambda z: z[:, :1].expand(z.shape),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_strides(loss_fn, dtype, view, reduction):
    logits, target = oracle.batch(dtype=dtype)
    strided_target = torch.stack([target, target], 1)[:, 0]
    weights = oracle.sample_weights(48)[::2]
    oracle.check_cross_entropy(loss_fn, view(logits), strided_target, sample_weight=weights, reduction=reduction)


# Not a head of expanded rows: all classes equal make the input gradient 0, which leaves no scale to compare on.
@pytest.mark.parametrize(
    ("name", "view"),
    [(n, v) for n in ("input", "linear_weight") for v in STRIDES if (n, v) != ("linear_weight", "expanded_rows")],
)
def test_strides_of_a_head(backend, name, view):
    input, linear_weight, target, _ = head()
    tensors = {"input": input, "linear_weight": linear_weight}
    tensors[name] = STRIDES[view](tensors[name])
    fn = partial(linear_cross_entropy, backend=backend)
    oracle.check_linear_cross_entropy(fn, tensors["input"], tensors["linear_weight"], target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_offsets_beyond_int32(backend, reduction):
    # 4 GiB of address space, of which only the rows are ever touched.
    memory = torch.empty(2**31 + 1000, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 1000), (2**30, 1))
    logits.copy_(torch.randn(3, 1000))
    target = torch.tensor([1, oracle.IGNORE, 999])
    oracle.check_cross_entropy(partial(cross_entropy, backend=backend), logits, target, reduction=reduction)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_head(backend_dtype, options, bias):
    backend, dtype = backend_dtype
    input, linear_weight, target, linear_bias = head(dtype=dtype, bias=bias)
    if "ignore_index" in options:
        target = torch.where(target == oracle.IGNORE, options["ignore_index"], target)
    for reduction in ("mean",) if "normalizer" in options else ("mean", "sum", "none"):
        oracle.check_linear_cross_entropy(
            partial(linear_cross_entropy, backend=backend, chunk_size=5), input, linear_weight, target,
            linear_bias=linear_bias, reduction=reduction, sample_weight=oracle.sample_weights(24), **options,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_does_not_grow_with_the_number_of_chunks(backend_dtype, reduction):
    backend, dtype = backend_dtype
    input, linear_weight, target, linear_bias = head(num_rows=160, dtype=dtype, bias=True)
    for chunk_size in (1, 7, 160, None):
        fn = partial(linear_cross_entropy, backend=backend, chunk_size=chunk_size)
        oracle.check_linear_cross_entropy(
            fn, input, linear_weight, target, linear_bias=linear_bias, reduction=reduction
        )


@pytest.mark.parametrize("scale", [1, 2**16])
def test_fp16_gradients_survive_with_a_loss_scale(backend, scale):
    # A loss scale must act before gradients are rounded: entries of p / N lie below the smallest fp16 number.
    logits, target = oracle.batch(num_rows=64, num_classes=512, dtype=torch.float16)
    upstream = torch.tensor(float(scale), dtype=torch.float64)
    for fn in (cross_entropy, LINEAR):
        oracle.check_cross_entropy(partial(fn, backend=backend), logits, target, upstream=upstream, normalizer=1e5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(loss_fn, dtype, reduction):
    logits, target = oracle.batch(dtype=dtype)
    logits.requires_grad_()
    loss = loss_fn(logits, target, reduction=reduction)
    first, second = torch.randn(loss.shape), torch.randn(loss.shape)
    for upstream in (first, second, first):
        (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype), retain_graph=True)
        once = loss_fn(logits, target, reduction=reduction)
        torch.testing.assert_close(gradient, torch.autograd.grad(once, logits, upstream.to(loss.dtype))[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_a_retained_graph_belong_to_the_caller(loss_fn, dtype, reduction):
    # They are made in the forward pass, and with an upstream gradient of 1 handed out as they are: what is done to them
    # must not reach the next backward pass.
    logits, target = oracle.batch(dtype=dtype)
    logits.requires_grad_()
    loss = loss_fn(logits, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = gradient.clone()
    gradient.mul_(3)
    for _ in range(2):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, expected, rtol=0, atol=0)
        logits.grad.data.zero_()  # which no version counter sees
    loss.backward()
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients(loss_fn, dtype, reduction):
    logits, target = oracle.batch(dtype=dtype)
    options = {"sample_weight": oracle.sample_weights(len(target)), "reduction": reduction}
    expected = oracle.cross_entropy(logits.double(), target, **options)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = loss_fn(logits.clone().requires_grad_(), target, **options)
        assert not loss.requires_grad
        oracle.assert_close(loss, expected)
    oracle.assert_close(loss_fn(logits, target, **options), expected)


def calls_of(monkeypatch, name):
    """Records the results of one operator, as `(arguments, results)`."""
    calls, operator = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: calls.append((args, operator(*args))) or calls[-1][1])
    return calls


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [{"input"}, {"linear_weight"}, {"linear_bias"}, {"linear_weight", "linear_bias"}])
def test_frozen_parts_compute_nothing(backend, monkeypatch, trained, reduction):
    input, linear_weight, target, linear_bias = head(bias=True)
    tensors = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    calls = calls_of(monkeypatch, "linear_cross_entropy_" + ("fwd_bwd" if reduction == "mean" else "bwd"))

    def gradients(function):
        leaves = {name: t.clone().requires_grad_(name in trained) for name, t in tensors.items()}
        loss = function(
            leaves["input"], leaves["linear_weight"], target, linear_bias=leaves["linear_bias"], reduction=reduction
        )
        loss.backward(oracle.upstream_like(loss).to(loss.dtype))
        return {name: t.grad for name, t in leaves.items()}

    actual = gradients(partial(linear_cross_entropy, backend=backend))
    expected = gradients(oracle.linear_cross_entropy)
    ((_, results),) = calls
    for name, buffer in zip(tensors, results[-3:], strict=True):
        if name in trained:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert actual[name] is None
            assert buffer.numel() == 0


def test_only_sample_weights_train(loss_fn, dtype):
    logits, target = oracle.batch(dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        weights = torch.rand(len(target), requires_grad=True)
        loss = loss_fn(logits, target, sample_weight=weights, reduction=reduction)
        weights64 = weights.detach().double().requires_grad_()
        expected = oracle.cross_entropy(logits.double(), target, sample_weight=weights64, reduction=reduction)
        upstream = oracle.upstream_like(loss)
        (actual,) = torch.autograd.grad(loss, weights, upstream.to(loss.dtype))
        oracle.assert_close(actual, torch.autograd.grad(expected, weights64, upstream)[0].float())


def test_autocast(backend):
    input, linear_weight, target, linear_bias = head(bias=True)
    # Kernels that multiply in fp32 do not round an fp32 head; this one is bf16 already.
    linear_weight = linear_weight.bfloat16().float()
    leaves = [t.requires_grad_() for t in (input, linear_weight, linear_bias)]
    half = [t.detach().bfloat16().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, backend=backend)
        logits_loss = cross_entropy(F.linear(input, linear_weight, linear_bias), target, backend=backend)
    expected = linear_cross_entropy(half[0], half[1], target, linear_bias=half[2], backend=backend)
    assert loss.dtype == logits_loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits_loss, expected, rtol=2**-8, atol=0)
    # The backward pass runs outside the context, as in every training loop.
    loss.backward()
    expected.backward()
    for given, cast in zip(leaves, half, strict=True):
        assert given.grad.dtype == torch.float32
        # That of the head has not been rounded on its way (test_wide_head).
        found = given.grad.bfloat16() if given is linear_weight else given.grad
        torch.testing.assert_close(found.float(), cast.grad.float(), rtol=0, atol=0)


def test_the_gradient_of_a_weight_is_its_rows_loss_but_for_weights_of_0(backend):
    input, linear_weight, target = head()[:3]
    weight = oracle.sample_weights(24)
    weight[::5] = 0.0
    nll = oracle.linear_cross_entropy(input, linear_weight, target, reduction="none")
    given = weight.clone().requires_grad_()
    linear_cross_entropy(input, linear_weight, target, sample_weight=given, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(given.grad, torch.where(weight == 0, 0, nll), rtol=1e-5, atol=1e-5, check_dtype=False)
    given = weight.clone().requires_grad_()
    # What the docstring says to do where the weight is 0, as when weights are learned.
    (given * linear_cross_entropy(input, linear_weight, target, reduction="none", backend=backend)).sum().backward()
    torch.testing.assert_close(given.grad, nll, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_modules(backend):
    input, linear_weight, target, linear_bias = head(bias=True)
    weights, options = oracle.sample_weights(24), {"softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.1}
    given = {"sample_weight": weights, "normalizer": 5, "cu_seqlens": torch.tensor([0, 20, 24])}
    reference = {"weight": CLASS_WEIGHT, "shift": True, **options, **given}
    module = CrossEntropyLoss(CLASS_WEIGHT, shift=True, backend=backend, **options)
    logits = F.linear(input, linear_weight, linear_bias)
    oracle.assert_close(module(logits, target, **given), oracle.cross_entropy(logits, target, **reference))
    module = LinearCrossEntropyLoss(CLASS_WEIGHT, shift=True, chunk_size=3, backend=backend, **options)
    actual = module(input, linear_weight, target, linear_bias=linear_bias, **given)
    expected = oracle.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **reference)
    oracle.assert_close(actual, expected)
    # The constructor's normalizer, where the call gives none.
    normalized = CrossEntropyLoss(normalizer=7.0, backend=backend)
    torch.testing.assert_close(normalized(logits, target), cross_entropy(logits, target, normalizer=7.0))
    torch.testing.assert_close(normalized(logits, target, normalizer="targets"), cross_entropy(logits, target))
    assert "weight" in module.state_dict()
    assert module.double().weight.dtype == torch.float64
    assert "softcap=5.0" in repr(module)
    assert "chunk_size=3" in repr(module)


@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shift", [False, True])
def test_target_dtypes(backend, target_dtype, shift):
    logits, target = oracle.batch()
    target = target.clamp(min=0)
    expected = oracle.cross_entropy(logits, target, shift=shift)
    actual = cross_entropy(logits, target.to(target_dtype), shift=shift, backend=backend)
    oracle.assert_close(actual, expected)


def test_masked_classes(loss_fn, dtype):
    # -inf takes a class out of the vocabulary; its gradient is exactly 0.
    if loss_fn.func is LINEAR:
        loss_fn = partial(cross_entropy, **loss_fn.keywords)  # a matrix product makes NaN of -inf * 0
    logits, target = oracle.batch(dtype=dtype)
    logits[torch.arange(24), (target.clamp(min=0) + 1) % 37] = -torch.inf
    oracle.check_cross_entropy(loss_fn, logits, target, reduction="none")


def test_public_names():
    for name in flow_kernels.__all__:
        assert getattr(flow_kernels, name).__doc__, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_bias_that_cancel_are_summed_before_they_are_rounded(backend, dtype):
    bias = torch.zeros(6, dtype=dtype, requires_grad=True)  # 1/6 and -5/6, which 16 bits do not hold
    input, head = torch.zeros(600, 4, dtype=dtype), torch.zeros(6, 4, dtype=dtype)
    target = torch.arange(600) % 6
    linear_cross_entropy(input, head, target, linear_bias=bias, reduction="sum", backend=backend).backward()
    torch.testing.assert_close(bias.grad, torch.zeros_like(bias), rtol=0, atol=2e-3)


def test_one_weight_per_sequence_where_there_are_as_many_as_rows():
    """An empty sequence and one of two rows: the second weight is that of both rows."""
    logits, target = torch.randn(2, 5), torch.tensor([1, 3])
    found = cross_entropy(logits, target, sample_weight=torch.tensor([5.0, 2.0]), cu_seqlens=torch.tensor([0, 0, 2]))
    torch.testing.assert_close(found, 2 * F.cross_entropy(logits, target))


def test_autocast_leaves_fp64():
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (11, 5), (11,)))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, w, torch.arange(7), linear_bias=b)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, F.cross_entropy(F.linear(x, w, b), torch.arange(7)), rtol=1e-12, atol=0)


def test_options_may_be_0d_and_fp64_has_its_own_range():
    logits, target = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    for number in (torch.tensor(2.0), np.array(2.0), np.float32(2.0)):
        assert torch.equal(cross_entropy(logits, target, softcap=number), cross_entropy(logits, target, softcap=2.0))
        assert torch.equal(cross_entropy(logits, target, z_loss=number), cross_entropy(logits, target, z_loss=2.0))
    torch.testing.assert_close(cross_entropy(logits, target, softcap=1e39), F.cross_entropy(logits, target))
