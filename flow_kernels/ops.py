"""The operators as PyTorch sees them: schema, fake kernel, autograd. The only file that knows torch.library.

Four operators for given logits, four for a linear head, each over N flat rows, one from rows to samples, two of attention:

    *_fwd       per-row loss, lse (fp64) and correctness; differentiable in the loss with any per-row upstream gradient
    *_bwd       its backward pass, from the saved lse
    *_fwd_bwd   for row weights known before the forward pass (mean, sum, FLOW): the weighted total and its gradients
                in one pass; differentiable with a scalar upstream gradient, which only scales what is already there
    *_score     per-row loss, correctness and entropy of the prediction; not differentiable
    flow_weights    per-sample mean losses and FLOW weights of row losses; not differentiable
    packed_attention_*  attention within the texts of a packed row

`backend` is a resolved name of `flow_kernels.backends`. Gradients of the input, the head and the bias are made only
where the `need_*` flags ask for them; an empty tensor stands for the others. `grad_filter_eps` permits a backend to leave
out what is small of the first two; not every backend makes use of it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch._library.custom_ops import get_library_allowing_overwrite

from flow_kernels import backends
from flow_kernels.reference import accumulation_dtype

_OPTIONS = "Tensor? class_weight, int ignore_index, float label_smoothing, float softcap, float z_loss"
_NEEDS = "bool need_dinput, bool need_dlinear_weight, bool need_dlinear_bias"
_HEADS = "Tensor query, Tensor key, Tensor value"
_HEAD = "Tensor input, Tensor linear_weight, Tensor target"

SCHEMAS = {
    "cross_entropy_fwd": f"(Tensor logits, Tensor target, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
    "cross_entropy_bwd": (
        f"(Tensor dloss, Tensor logits, Tensor target, Tensor lse, {_OPTIONS}, str backend) -> Tensor"
    ),
    "cross_entropy_fwd_bwd": (
        f"(Tensor logits, Tensor target, Tensor row_weight, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)"
    ),
    "cross_entropy_score": (
        "(Tensor logits, Tensor target, int ignore_index, float softcap, str backend) -> (Tensor, Tensor, Tensor)"
    ),
    "linear_cross_entropy_fwd": (
        f"({_HEAD}, Tensor? linear_bias, {_OPTIONS}, int chunk_size, float grad_filter_eps, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "linear_cross_entropy_bwd": (
        f"(Tensor dloss, {_HEAD}, Tensor lse, Tensor? linear_bias, {_OPTIONS}, int chunk_size, {_NEEDS},"
        " float grad_filter_eps, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "linear_cross_entropy_fwd_bwd": (
        f"({_HEAD}, Tensor row_weight, Tensor? linear_bias, {_OPTIONS}, int chunk_size, {_NEEDS},"
        " float grad_filter_eps, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "linear_cross_entropy_score": (
        f"({_HEAD}, Tensor? linear_bias, int ignore_index, float softcap, int chunk_size, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "flow_weights": (
        "(Tensor loss, Tensor target, Tensor temperature, Tensor? cu_seqlens, int ignore_index, str normalize,"
        " str backend) -> (Tensor, Tensor)"
    ),
    "packed_attention_fwd": f"({_HEADS}, Tensor segments, float scale, int window, str backend) -> (Tensor, Tensor)",
    "packed_attention_bwd": (
        f"(Tensor dout, {_HEADS}, Tensor lse, Tensor segments, float scale, int window, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}


_LIBRARIES = {}


def _define(name: str):
    """Define operator `name`: its kernel calls the function of the same name in the chosen backend's module.

    This and `_register_autograd` make what `torch.library.custom_op` makes, without what that does at every call (it asks
    the schema for each argument's default and looks whether a result is an argument) and at the first one (it imports
    torch._dynamo, with triton, in a second). An operator of 16 arguments that does nothing takes the host 76
    microseconds, forward and backward, and took 161; benchmarks/host.py has whole calls.
    """

    def kernel(*args):
        *args, backend = args
        device_type = next(a for a in args if isinstance(a, Tensor)).device.type
        function = getattr(backends.implementation(backend), name)
        if not torch.is_autocast_enabled(device_type):
            return function(*args)
        # The dtypes of the inputs are the caller's choice; an autocast context must not change them a second time.
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    # One for each, in place of an older one where this module is loaded again.
    _LIBRARIES[name] = library = get_library_allowing_overwrite("flow_kernels", name)
    library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _hidden_from_dynamo(kernel), "CompositeExplicitAutograd")
    return getattr(torch.ops.flow_kernels, name).default


def _hidden_from_dynamo(function):
    """`function`, which Dynamo does not compile once it has been imported and could.

    That is the work; what autograd does around it, Dynamo may compile where it meets an operator that it has not traced.
    """
    disabled = []

    def hidden(*args):
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return hidden


def _name(operator) -> str:
    return operator._schema.name.partition("::")[2]


def _register_fake(*operators):
    def register(function):
        for operator in operators:
            torch.library.register_fake(operator, function, lib=_LIBRARIES[_name(operator)])
        return function

    return register


def _register_autograd(operator, setup_context, backward):
    """Make `operator` differentiable: `setup_context(ctx, inputs, output)`, then `backward(ctx, *grads)`."""
    below_autograd, keys_below = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def run(keys, args):
        with below_autograd():
            return operator.redispatch(keys & keys_below, *args)

    def forward(ctx, *args):
        *args, keys = args
        output = run(keys, args)
        setup_context(ctx, args, output)
        return output

    # By its name the node goes into profiles and anomaly reports.
    function = type(
        f"flow_kernels_{_name(operator)}_",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),
        },
    )

    def autograd(keys, *args):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args, keys)
        return run(keys, args)

    _LIBRARIES[_name(operator)].impl(_name(operator), autograd, "Autograd", with_keyset=True)


cross_entropy_fwd = _define("cross_entropy_fwd")
cross_entropy_bwd = _define("cross_entropy_bwd")
cross_entropy_fwd_bwd = _define("cross_entropy_fwd_bwd")
cross_entropy_score = _define("cross_entropy_score")
linear_cross_entropy_fwd = _define("linear_cross_entropy_fwd")
linear_cross_entropy_bwd = _define("linear_cross_entropy_bwd")
linear_cross_entropy_fwd_bwd = _define("linear_cross_entropy_fwd_bwd")
linear_cross_entropy_score = _define("linear_cross_entropy_score")
flow_weights = _define("flow_weights")
packed_attention_fwd = _define("packed_attention_fwd")
packed_attention_bwd = _define("packed_attention_bwd")


def _rows(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(like.shape[0], dtype=dtype or accumulation_dtype(like.dtype))


@_register_fake(cross_entropy_fwd, linear_cross_entropy_fwd)
def _(input, *rest):
    return _rows(input), _rows(input, torch.float64), _rows(input, torch.bool)


@_register_fake(cross_entropy_score, linear_cross_entropy_score)
def _(input, *rest):
    return _rows(input), _rows(input, torch.bool), _rows(input)


@_register_fake(flow_weights)
def _(loss, target, temperature, cu_seqlens, *options):
    num_samples = loss.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    mean_loss = loss.new_empty(num_samples, dtype=accumulation_dtype(loss.dtype))
    return mean_loss, torch.empty_like(mean_loss)


@_register_fake(packed_attention_fwd)
def _(query, *rest):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))


@_register_fake(packed_attention_bwd)
def _(dout, *heads):
    return tuple(t.new_empty(t.shape) for t in heads[:3])


@_register_fake(cross_entropy_bwd)
def _(dloss, logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_register_fake(cross_entropy_fwd_bwd)
def _(logits, target, row_weight, *options):
    loss = _rows(logits)
    return loss.new_empty(()), loss, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_head_gradients(input, linear_weight, linear_bias, need_dinput, need_dlinear_weight, need_dlinear_bias):
    return (
        input.new_empty(input.shape if need_dinput else (0,)),
        linear_weight.new_empty(linear_weight.shape if need_dlinear_weight else (0,)),
        (input if linear_bias is None else linear_bias).new_empty(linear_weight.shape[0] if need_dlinear_bias else 0),
    )


@_register_fake(linear_cross_entropy_bwd)
def _(dloss, input, linear_weight, target, lse, linear_bias, *rest):
    return _fake_head_gradients(input, linear_weight, linear_bias, *rest[-5:-2])


@_register_fake(linear_cross_entropy_fwd_bwd)
def _(input, linear_weight, target, row_weight, linear_bias, *rest):
    loss = _rows(input)
    return loss.new_empty(()), loss, *_fake_head_gradients(input, linear_weight, linear_bias, *rest[-5:-2])


_SECOND_DERIVATIVES = "use torch.nn.functional.cross_entropy for second derivatives"


def _forbid_create_graph() -> None:
    """Raise where gradients of gradients are recorded: what was made in the forward pass would count as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"the gradients of flow_kernels' losses are not differentiable themselves (create_graph=True); {_SECOND_DERIVATIVES}"
        )


def _setup_cross_entropy_fwd(ctx, inputs, output):
    logits, target, class_weight, *ctx.options = inputs
    _, lse, correct = output
    ctx.mark_non_differentiable(lse, correct)
    ctx.save_for_backward(logits, target, lse, class_weight)


def _cross_entropy_fwd_backward(ctx, dloss, *_):
    logits, target, lse, class_weight = ctx.saved_tensors
    dlogits = cross_entropy_bwd(dloss, logits, target, lse, class_weight, *ctx.options)
    return dlogits, *[None] * 7


_register_autograd(cross_entropy_fwd, _setup_cross_entropy_fwd, _cross_entropy_fwd_backward)


def _is_plain(tensor) -> bool:
    functorch = torch._C._functorch  # vmap's batches, and those of is_grads_batched
    is_batch = functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is Tensor and not is_batch


def _scale(grad, dtotal, backend):
    """`grad * dtotal` of a gradient made in the forward pass: as it is where the factor can be seen to be 1, else in place.

    The copy of a large head's gradient is a tenth of a training step on a CPU, and its size again in memory. Only a
    plain CPU tensor is looked at: an accelerator would synchronise, a traced tensor has no value, and one that stands for
    a batch of upstream gradients has several, each of which wants its own product. On a GPU Triton's
    kernel looks there itself, also at what the CUDA kernels made: torch multiplies 16-bit values by an fp32 factor one
    by one, on an H100 in 2.1 ms a GiB, three times what a copy takes. Where the graph is retained the gradient stays
    here for another backward pass, so what is handed out, which may be written to, is a copy.
    """
    # torch's own, as its compiled backward passes ask; an older torch without it copies.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if torch.compiler.is_compiling() or not _is_plain(dtotal) or dtotal.requires_grad or keeps_graph():
        return grad * dtotal
    if dtotal.device.type == "cpu":
        return grad if dtotal.item() == 1 else grad.mul_(dtotal)
    by_triton = backend == "triton" or (backend == "cuda" and backends.status("triton", "cuda", grad.dtype).available)
    if by_triton and grad.is_contiguous():
        return backends.implementation("triton").scale_(grad, dtotal)
    return grad.mul_(dtotal)


def _setup_cross_entropy_fwd_bwd(ctx, inputs, output):
    # Or autograd would make zeros the size of every gradient among the outputs, to pass them to the backward below.
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[-1]
    _, loss, dlogits = output
    ctx.mark_non_differentiable(loss, dlogits)
    ctx.save_for_backward(loss, dlogits)


def _cross_entropy_fwd_bwd_backward(ctx, dtotal, *_):
    _forbid_create_graph()
    if dtotal is None:
        return (None,) * 9
    loss, dlogits = ctx.saved_tensors
    return _scale(dlogits, dtotal, ctx.backend), None, dtotal * loss, *[None] * 6


_register_autograd(cross_entropy_fwd_bwd, _setup_cross_entropy_fwd_bwd, _cross_entropy_fwd_bwd_backward)


def _setup_linear_fwd(ctx, inputs, output):
    input, linear_weight, target, linear_bias, class_weight, *ctx.options = inputs
    _, lse, correct = output
    ctx.mark_non_differentiable(lse, correct)
    ctx.save_for_backward(input, linear_weight, target, lse, linear_bias, class_weight)


def _linear_fwd_backward(ctx, dloss, *_):
    input, linear_weight, target, lse, linear_bias, class_weight = ctx.saved_tensors
    *options, grad_filter_eps, backend = ctx.options
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = linear_cross_entropy_bwd(
        dloss, input, linear_weight, target, lse, linear_bias, class_weight, *options, *needs, grad_filter_eps, backend
    )
    dinput, dlinear_weight, dlinear_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dinput, dlinear_weight, None, dlinear_bias, *[None] * 8


_register_autograd(linear_cross_entropy_fwd, _setup_linear_fwd, _linear_fwd_backward)


def _setup_linear_fwd_bwd(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[-1]
    _, loss, *grads = output
    ctx.mark_non_differentiable(loss, *grads)
    ctx.save_for_backward(loss, *grads)


def _linear_fwd_bwd_backward(ctx, dtotal, *_):
    _forbid_create_graph()
    if dtotal is None:
        return (None,) * 16
    loss, *grads = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    dinput, dlinear_weight, dlinear_bias = (
        _scale(g, dtotal, ctx.backend) if need else None for g, need in zip(grads, needs, strict=True)
    )
    return dinput, dlinear_weight, None, dtotal * loss, dlinear_bias, *[None] * 11


_register_autograd(linear_cross_entropy_fwd_bwd, _setup_linear_fwd_bwd, _linear_fwd_bwd_backward)


def _setup_attention(ctx, inputs, output):
    query, key, value, segments, *ctx.options = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, lse, segments)


def _attention_backward(ctx, dout, *_):
    return *packed_attention_bwd(dout, *ctx.saved_tensors, *ctx.options), *[None] * 4


_register_autograd(packed_attention_fwd, _setup_attention, _attention_backward)


def _setup_no_derivative(ctx, inputs, output):
    pass


def _no_derivative(ctx, *_):
    raise RuntimeError(f"this result of flow_kernels has no derivative; {_SECOND_DERIVATIVES}")


for _operator in (
    cross_entropy_bwd,
    linear_cross_entropy_bwd,
    cross_entropy_score,
    linear_cross_entropy_score,
    flow_weights,
    packed_attention_bwd,
):
    _register_autograd(_operator, _setup_no_derivative, _no_derivative)
