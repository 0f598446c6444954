"""The operators as PyTorch sees them: opcheck, gradcheck, torch.compile, and no look at values on the way to them."""

import inspect
from functools import partial

import oracle
import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flow_kernels
from flow_kernels import (
    cross_entropy,
    linear_cross_entropy,
    linear_score_samples,
    linear_score_tokens,
    ops,
    reference,
    score_samples,
    score_tokens,
    sum_samples,
    weigh_samples,
)

OPTIONS = {
    "plain": (None, oracle.IGNORE, 0.0, 0.0, 0.0),
    "everything": (torch.linspace(0.1, 1.0, 11), oracle.IGNORE, 0.2, 5.0, 1e-2),
}


def rows(dtype=torch.float32, requires_grad=True, transposed=False, num_rows=6):
    """logits, input, linear_weight, linear_bias, target and row weights of a small problem with V = 11 and D = 4."""

    def make(*shape):
        tensor = torch.randn(*reversed(shape)).T if transposed and len(shape) == 2 else torch.randn(*shape)
        return tensor.to(dtype).requires_grad_(requires_grad)

    logits, target = make(num_rows, 11), torch.randint(11, (num_rows,))
    target[1:2] = oracle.IGNORE
    row_weight = torch.rand(num_rows, dtype=oracle.loss_dtype(dtype))
    row_weight[2:3] = 0
    return logits, make(num_rows, 4), make(11, 4), make(11), target, row_weight.requires_grad_(requires_grad)


def arguments(name, options, backend, needs=(True, True, True), **kwargs):
    """The arguments of operator `name`; the `_bwd` and `_score` operators have no gradient."""
    logits, input, linear_weight, linear_bias, target, row_weight = rows(
        **{"requires_grad": not name.endswith(("_entropy_bwd", "_score")), **kwargs}
    )
    class_weight, *numbers = options
    options = (None if class_weight is None else class_weight.to(row_weight.dtype), *numbers)
    if name.startswith("packed_attention"):
        return attention_arguments(
            name, backend, len(target), input.dtype, input.requires_grad, kwargs.get("transposed", False)
        )
    dloss = torch.randn(len(target), dtype=row_weight.dtype)
    with torch.no_grad():
        lse = ops.cross_entropy_fwd(logits, target, *options, backend)[1]
    flags = (2, *needs, 0.0)  # chunk_size = 2 makes several chunks; the last is grad_filter_eps
    return {
        "cross_entropy_fwd": (logits, target, *options, backend),
        "cross_entropy_bwd": (dloss, logits, target, lse, *options, backend),
        "cross_entropy_fwd_bwd": (logits, target, row_weight, *options, backend),
        "linear_cross_entropy_fwd": (input, linear_weight, target, linear_bias, *options, 2, 0.0, backend),
        "linear_cross_entropy_bwd": (
            dloss, input, linear_weight, target, lse, linear_bias, *options, *flags, backend,
        ),
        "linear_cross_entropy_fwd_bwd": (
            input, linear_weight, target, row_weight, linear_bias, *options, *flags, backend,
        ),
        "cross_entropy_score": (logits, target, oracle.IGNORE, options[3], backend),
        "linear_cross_entropy_score": (input, linear_weight, target, linear_bias, oracle.IGNORE, options[3], 2, backend),
        "flow_weights": (
            dloss.abs().view(-1, 2), target.view(-1, 2), torch.tensor(0.7), None, oracle.IGNORE, "mean", backend,
        ),
    }[name]  # fmt: skip


def attention_arguments(name, backend, num_tokens, dtype, requires_grad, transposed):
    """Two segments, one after the other in its text, of 4 query heads and 2 key heads of 3."""
    requires_grad = requires_grad and name.endswith("_fwd")

    def heads(number):
        tensor = (
            torch.randn(number, num_tokens, 3).transpose(0, 1) if transposed else torch.randn(num_tokens, number, 3)
        )
        return tensor.to(dtype).requires_grad_(requires_grad)

    query, key, value = heads(4), heads(2), heads(2)
    ends = torch.tensor([[0, 2, -1], [2, num_tokens, 0]])[: 2 if num_tokens else 0]
    options = (ends, 0.6, 4, "reference" if backend == "triton" else backend)
    if name.endswith("_fwd"):
        return query, key, value, *options
    out, lse = ops.packed_attention_fwd(query, key, value, *options)
    return torch.randn_like(out), query, key, value, lse, *options


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(backend, name, options):
    torch.library.opcheck(getattr(ops, name), arguments(name, options, backend))


@pytest.mark.parametrize("case", ["transposed", "bfloat16", "no rows"])
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck_of_other_tensors(backend, name, case):
    kwargs = {"transposed": {"transposed": True}, "bfloat16": {"dtype": torch.bfloat16}, "no rows": {"num_rows": 0}}[
        case
    ]
    args = arguments(name, OPTIONS["plain"], backend, **kwargs)
    torch.library.opcheck(getattr(ops, name), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
@pytest.mark.parametrize("name", ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd_bwd"])
def test_opcheck_of_frozen_parts(backend, name, needs):
    args = arguments(name, OPTIONS["plain"], backend, needs, requires_grad=False)
    torch.library.opcheck(getattr(ops, name), args, test_utils=("test_schema", "test_faketensor"))
    gradients = getattr(ops, name)(*args)[-3:]
    assert [g.numel() > 0 for g in gradients] == list(needs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_the_operators(float64_backend, options):
    for name in ("cross_entropy_fwd", "linear_cross_entropy_fwd"):
        args = arguments(name, options, float64_backend, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda *a, name=name: getattr(ops, name)(*a)[0], args)
    for name in ("cross_entropy_fwd_bwd", "linear_cross_entropy_fwd_bwd"):
        args = arguments(name, options, float64_backend, dtype=torch.float64)
        # A row of weight 0 is never computed, so its weight has no finite difference: leave it out here.
        args = [torch.where(a == 0, 0.3, a).detach().requires_grad_() if is_row_weight(a) else a for a in args]
        assert torch.autograd.gradcheck(lambda *a, name=name: getattr(ops, name)(*a)[0], args)


def is_row_weight(argument):
    """Of the operators' differentiable arguments only the row weights hold an exact 0."""
    return isinstance(argument, torch.Tensor) and argument.requires_grad and bool((argument == 0).any())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_the_functions(float64_backend, options, reduction):
    logits, input, linear_weight, linear_bias, target, _ = rows(torch.float64)
    weights = torch.tensor([0.3, 1.0, -0.6, 2.0, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    class_weight, _, smoothing, softcap, z_loss = options
    kwargs = {
        "weight": None if class_weight is None else class_weight.double(), "label_smoothing": smoothing,
        "softcap": softcap or None, "z_loss": z_loss, "reduction": reduction, "backend": float64_backend,
        **({"normalizer": "weights"} if reduction == "mean" else {}),
    }  # fmt: skip
    assert torch.autograd.gradcheck(lambda x, w: cross_entropy(x, target, sample_weight=w, **kwargs), (logits, weights))
    assert torch.autograd.gradcheck(
        lambda x, h, b, w: linear_cross_entropy(x, h, target, linear_bias=b, sample_weight=w, **kwargs),
        (input, linear_weight, linear_bias, weights),
    )


rand = partial(torch.rand, generator=torch.Generator().manual_seed(0))
CU_SEQLENS = torch.tensor([0, 2, 2, 7, 12])
# Every public function that belongs into a training or scoring step, called as `fn(logits or input, [head], ...)`.
CALLS = {
    "mean": (cross_entropy, {}),
    "sum": (cross_entropy, {"reduction": "sum", "z_loss": 1e-2, "label_smoothing": 0.1}),
    "none": (cross_entropy, {"reduction": "none", "sample_weight": rand(3, 4)}),
    "rows": (cross_entropy, {"sample_weight": rand(3, 4), "normalizer": "weights", "weight": rand(11)}),
    "sequences": (cross_entropy, {"sample_weight": rand(3), "shift": True, "softcap": 5.0}),
    "packed": (cross_entropy, {"sample_weight": rand(4), "cu_seqlens": CU_SEQLENS, "shift": True}),
    "step": (cross_entropy, {"normalizer": torch.tensor(31)}),
    "linear mean": (linear_cross_entropy, {"sample_weight": rand(3), "shift": True, "normalizer": 17}),
    "linear sum": (linear_cross_entropy, {"reduction": "sum", "chunk_size": 2, "linear_bias": rand(11)}),
    "linear none": (linear_cross_entropy, {"reduction": "none", "sample_weight": rand(3, 4)}),
    "linear packed": (linear_cross_entropy, {"sample_weight": rand(4), "cu_seqlens": CU_SEQLENS}),
    "score_tokens": (score_tokens, {"shift": True}),
    "score_samples": (score_samples, {"softcap": 5.0}),
    "score packed": (score_samples, {"cu_seqlens": CU_SEQLENS, "shift": True}),
    "linear_score_tokens": (linear_score_tokens, {"softcap": 5.0}),
    "entropy": (score_tokens, {"return_entropy": True, "shift": True}),
    "linear entropy": (linear_score_tokens, {"return_entropy": True, "cu_seqlens": CU_SEQLENS}),
    "linear_score_samples": (linear_score_samples, {"shift": True, "linear_bias": rand(11)}),
    "linear score packed": (linear_score_samples, {"cu_seqlens": CU_SEQLENS}),
    "weigh_samples": (weigh_samples, {"temperature": torch.tensor(0.7), "normalize": "mean"}),
    "weigh packed": (weigh_samples, {"temperature": 0.7, "cu_seqlens": CU_SEQLENS, "shift": True}),
}


def batch_of(name, num_sequences=3, length=4):
    """`(function, tensors, target, options)` of a call; packed calls get flat rows."""
    function, options = CALLS[name]
    shape = (num_sequences * length,) if "cu_seqlens" in options else (num_sequences, length)
    parameters = inspect.signature(function).parameters
    if "linear_weight" in parameters:
        tensors = [torch.randn(*shape, 4), torch.randn(11, 4)]
    else:
        tensors = [torch.rand(*shape)] if "loss" in parameters else [torch.randn(*shape, 11)]
    target = torch.randint(11, shape)
    target.view(-1)[1] = oracle.IGNORE
    return function, tensors, target, options


def results(function, tensors, target, options):
    """What a call returns and, where it has a gradient, those of its tensors."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, target, **options)
    if isinstance(out, tuple):
        return tuple(out)
    out.backward(oracle.upstream_like(out).to(out.dtype))
    return out.detach(), *(t.grad for t in leaves)


def test_every_function_is_compiled_below():
    step = {f for n, f in vars(flow_kernels).items() if n in flow_kernels.__all__ and inspect.isfunction(f)}
    once_per_data_set = {flow_kernels.temperature, flow_kernels.flow_weights, flow_kernels.effective_sample_size}
    # packed_attention is compiled in test_attention.py.
    assert step - once_per_data_set - {sum_samples, flow_kernels.packed_attention} == {
        function for function, _ in CALLS.values()
    }


@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(backend, name):
    torch.compiler.reset()
    function, *call, options = batch_of(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    options = {**options, "backend": backend}
    torch.testing.assert_close(results(compiled, *call, options), results(function, *call, options))


@pytest.mark.parametrize("name", ["sequences", "linear packed", "linear none"])
def test_compiled_with_inductor(backend, name):
    torch.compiler.reset()
    function, *call, options = batch_of(name)
    compiled = torch.compile(function, fullgraph=True)
    options = {**options, "backend": backend}
    torch.testing.assert_close(results(compiled, *call, options), results(function, *call, options))


@pytest.mark.parametrize("name", ["rows", "linear sum", "linear_score_samples"])
def test_compiled_with_dynamic_shapes(backend, name):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function, *_ = batch_of(name)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # Sizes that differ from each other and from D and V: torch takes equal ones for the same symbol.
    for num_sequences, length in ((3, 6), (5, 7), (2, 9)):
        function, *call, options = batch_of(name, num_sequences, length)
        options = {**options, "backend": backend}
        if "sample_weight" in options:
            options["sample_weight"] = torch.rand(num_sequences, length)
        torch.testing.assert_close(results(compiled, *call, options), results(function, *call, options))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def like(value, device):
    """The same shape, strides and dtype on another device; no values."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


@pytest.mark.parametrize("name", CALLS)
def test_no_look_at_values(name):
    # Meta tensors have no values: whatever would synchronise an accelerator (.item(), bool(), nonzero) raises. What
    # runs outside the kernels is the same for every backend; the reference is the one that serves every device.
    function, tensors, target, options = batch_of(name)
    leaves = [like(t, "meta").requires_grad_() for t in tensors]
    options = {key: like(value, "meta") for key, value in options.items()}
    out = function(*leaves, like(target, "meta"), **options, backend="reference")
    if not isinstance(out, tuple):
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert [g.shape for g in gradients] == [t.shape for t in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_fake_cpu_tensors_have_no_values(name):
    function, tensors, target, options = batch_of(name)
    with FakeTensorMode():
        options = {key: like(value, "cpu") for key, value in options.items()}
        out = function(*(like(t, "cpu") for t in tensors), like(target, "cpu"), **options, backend="reference")
    _, *call, options = batch_of(name)
    real = results(function, *call, options)[0]
    assert (out[0] if isinstance(out, tuple) else out).shape == real.shape


def test_compiled_with_changing_softcaps(backend):
    """From the second on the soft-cap is a symbol, which must not reach what the compiler takes for constant."""

    def both(logits, head, target, softcap):
        given = flow_kernels.cross_entropy(logits, target, softcap=softcap, backend=backend)
        return given + flow_kernels.linear_cross_entropy(logits, head, target, softcap=softcap, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    logits, head, target = torch.randn(6, 9), torch.randn(5, 9), torch.randint(5, (6,))
    for softcap in (30.0, 20.0, 10.0):
        torch.testing.assert_close(compiled(logits, head, target, softcap), both(logits, head, target, softcap))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_export(backend):
    function, tensors, target, options = batch_of("linear sum")

    class Step(torch.nn.Module):
        def forward(self, *call):
            return function(*call, **options, backend=backend)

    call = (*(t.detach() for t in tensors), target)
    program = torch.export.export(Step(), call)
    torch.testing.assert_close(program.module()(*call), Step()(*call), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_operators_trace_with_fake_cuda_tensors(backend, name, options):
    # Without gradients, whose bookkeeping needs a real device; the operators that make gradients are traced themselves.
    args = arguments(name, options, backend, requires_grad=False)
    expected = getattr(ops, name)(*args)
    with FakeTensorMode():
        out = getattr(ops, name)(*(like(a, "cuda") for a in args))
    pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
    for fake, real in pairs:
        assert (fake.device.type, fake.shape, fake.dtype) == ("cuda", real.shape, real.dtype)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_look_at_values_would_be_caught(device):
    with FakeTensorMode(), pytest.raises((RuntimeError, DataDependentOutputException)):
        bool(torch.empty(3, device=device).isfinite().all())
    with pytest.raises(RuntimeError):
        torch.empty(3, device="meta").nonzero()


def test_nothing_is_differentiated_twice_in_silence(backend):
    # Second derivatives are not implemented: asking for one must raise, not return a wrong number.
    logits, target = oracle.batch()
    logits.requires_grad_()
    loss = partial(cross_entropy, reduction="none", backend=backend)(logits, target).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no derivative.*for second derivatives"):
        gradient.square().sum().backward()
    # A mean's gradient is made in the forward pass, so a graph of it would hold it as a constant: refused at once.
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(cross_entropy(logits, target, backend=backend), logits, create_graph=True)
    head = torch.randn(logits.shape[-1], logits.shape[-1])
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(linear_cross_entropy(logits, head, target, backend=backend), logits, create_graph=True)


def test_a_tracer_on_real_tensors_takes_sample_weights(backend):
    logits, target = oracle.batch()
    weight = oracle.sample_weights(len(target))
    traced = make_fx(lambda x, w: cross_entropy(x, target, sample_weight=w, backend=backend))(logits, weight)
    expected = cross_entropy(logits, target, sample_weight=weight, backend=backend)
    torch.testing.assert_close(traced(logits, weight), expected)


def test_results_without_a_derivative_say_so(backend):
    for name in ("cross_entropy_score", "linear_cross_entropy_score"):
        losses = getattr(ops, name)(*arguments(name, OPTIONS["plain"], backend, requires_grad=True))[0]
        with pytest.raises(RuntimeError, match="has no derivative"):
            losses.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_refused(backend, reduction):
    logits, target = oracle.batch()
    head, options = torch.randn(5, logits.shape[-1]), {"reduction": reduction, "backend": backend}
    for function, tensor in (
        (lambda t: cross_entropy(t, target, **options), logits),
        (lambda t: linear_cross_entropy(logits, t, target.clamp(max=4), **options), head),
        (lambda t: linear_cross_entropy(t, head, target.clamp(max=4), **options), logits),
        (lambda t: linear_cross_entropy(logits, head, target.clamp(max=4), linear_bias=t, **options), torch.zeros(5)),
        (lambda t: cross_entropy(logits, target, sample_weight=t, **options), torch.ones(len(target))),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),))
        function(tensor)  # outside, nothing is refused


def test_the_reference_says_that_it_cannot_be_captured(monkeypatch):
    target = torch.tensor([1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    reference.check_target(target, 3, -100)  # of the CPU
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match="name backend='triton', or leave the loss out of the graph"),
    ):
        reference.check_target(torch.empty(1, dtype=torch.long, device="cuda"), 3, -100)


def test_the_reference_holds_larger_chunks_on_accelerators():
    assert [reference.default_chunk_size(262144, device) for device in ("cpu", "cuda")] == [64, 512]
    assert reference.default_chunk_size(10**6, "cuda") == reference.MIN_ACCELERATOR_ROWS
    assert reference.default_chunk_size(0) >= reference.MIN_CHUNK_ROWS
