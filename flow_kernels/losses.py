"""Weighted cross-entropy of given logits and of a linear head: the functions, and the same as modules."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor, nn

from flow_kernels import backends, ops
from flow_kernels.autocast import cast_for_autocast, stays_wide
from flow_kernels.reference import accumulation_dtype
from flow_kernels.rows import (
    Rows,
    check_floating,
    check_no_tangent,
    check_same_device,
    drop_rows,
    flatten,
    row_weights,
    spread_sample_weight,
)

Normalizer = str | float | Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Normalizer = "targets",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of logits with one weight per sample.

    With the defaults this is `F.cross_entropy(input.float(), target)`; with `sample_weight` per row it is

        nll = F.cross_entropy(input.float(), target, reduction="none")
        loss = (sample_weight * nll).sum() / (target != ignore_index).sum()

    Args:
        input: logits, `[..., V]`, any floating dtype. Never modified.
        target: class indices, `[...]`, integer; `ignore_index` where there is nothing to predict.
        weight: class weights, `[V]`, as in torch.
        sample_weight: one weight per row (`[...]`, the shape of `target`), per leading index (`[B]` for a target
            `[B, ...]`), or per sequence of `cu_seqlens` (which is meant where there are as many as rows). Zero and negative weights are legal; a row of weight 0 is
            left out as if its target were ignored, and the weight of a row without a target is not read.
        cu_seqlens: `[num_sequences + 1]` row offsets of packed sequences, from 0 to the number of rows.
        ignore_index: target value of rows that do not count.
        reduction: "mean", "sum" or "none" (weighted row losses in the shape of `target`).
        normalizer: what "mean" divides by. "targets": the number of targets, with class weights torch's sum of
            `weight[target]`; rows of weight 0 count (the FLOW paper). "weights": the same, each times its sample
            weight. Or a number or 0-d tensor, for example the target count of all micro-batches and ranks; multiply
            the loss by what the training framework then divides by: DDP by the number of processes, accelerate's
            `backward` by `gradient_accumulation_steps`.
        label_smoothing: in [0, 1], as in torch.
        softcap: logits are `softcap * tanh(input / softcap)`.
        z_loss: adds `z_loss * logsumexp(logits)^2` to every row loss, before the sample weight.
        shift: row t is paired with target t + 1 of the same sequence (along the last dimension, or within
            `cu_seqlens`); row weights move with the targets.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `flow_kernels.backends`.

    Returns:
        Loss in nats, fp32 (fp64 for fp64 input): 0-d, or the shape of `target` for "none". If nothing counts it is 0
        with zero gradients.

    Gradients flow to `input` (in its dtype) and to `sample_weight`: the row's loss over what "mean" divides by (with
    `normalizer="weights"` its difference from the loss returned), summed over the rows that share a weight, but 0 where
    the weight is 0 and the loss of the row therefore unknown; `(w * cross_entropy(..., reduction="none")).sum()` has it
    there too. They are not differentiable themselves, there is no forward mode, and the transforms of `torch.func` that
    differentiate do not apply.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, by name.
        IndexError: a target outside [0, V), with its row. The Triton and CUDA kernels, to which "auto" leaves an NVIDIA
            GPU's tensors, would have to wait for it to look: the loss of such a row is NaN, and so that of its batch;
            the row's gradient is 0, or NaN by "cuda" on given logits. `backend="reference"` names the row there.
        flow_kernels.BackendUnavailable: the named backend cannot serve the call.
        RuntimeError: a second derivative. NotImplementedError: forward mode.

    Source: equation 2 of "Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting" (arXiv 2502.02797).
    """
    rows = flatten(input, target, cu_seqlens, ignore_index, shift)
    weight = check_options(rows, input.shape[-1], weight, label_smoothing, softcap, z_loss)
    row_weight = spread_sample_weight(sample_weight, rows, cu_seqlens, shift)
    kept, row_weight = drop_rows(rows, row_weight)
    options = (weight, ignore_index, float(label_smoothing), float(softcap or 0.0), float(z_loss))
    check_no_tangent("cross_entropy", input, sample_weight)
    needs_grad = torch.is_grad_enabled() and rows.input.requires_grad
    kind = _kind(needs_grad, reduction, rows.input)
    backend = backends.resolve(backend, input.device.type, input.dtype, f"cross_entropy_{kind}", softcap is not None)

    if reduction == "none":
        _no_normalizer(normalizer)
        loss, _, _ = ops.cross_entropy_fwd(rows.input, kept, *options, backend)
        return (loss if row_weight is None else row_weight * loss).reshape(rows.shape)
    row_weight = row_weights(rows, row_weight, weight, reduction, normalizer)
    if kind == "fwd_bwd":
        total, _, _ = ops.cross_entropy_fwd_bwd(rows.input, kept, row_weight, *options, backend)
        return total
    loss, _, _ = ops.cross_entropy_fwd(rows.input, kept, *options, backend)
    return (row_weight * loss).sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Normalizer = "targets",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: bool = False,
    chunk_size: int | None = None,
    grad_filter_eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """`cross_entropy` of a linear head, without ever holding the logits of all rows.

        loss = cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)

    Rows that are ignored or have weight 0 are left out (before the matrix product, but for "triton" and "cuda"); a frozen head
    computes no `linear_weight` gradient and a frozen input no `input` gradient; gradients are accumulated in fp32 and
    rounded once, to the dtype of what they are of. For "mean" and "sum" they are made in the forward pass (three matrix
    products, not four; "cpu" makes again, by a fourth, what does not fit in the memory that it keeps: of 262,144 classes
    and D 640 what is beyond some 2,100 rows), but in fp16, where a loss scale must reach them before they are rounded.

    Args:
        input: hidden states, `[..., D]`. Under autocast it and `linear_bias` are cast as `F.linear` casts them.
        linear_weight: `[V, D]`, the dtype of `input`; under autocast fp32 as well. Its gradient is then fp32 that has not
            been rounded, and for the products it is rounded to the autocast dtype (by "cpu" while it is read; kernels
            that multiply in fp32, as those of fp16 and of CPUs without bf16 products, take it as it is). Until the
            backward pass it must stay as it was, where `reduction="none"` or fp16 needs it again. The whole head: an
            adapter around it, a bias, a scale or a soft-cap of the model's logits is not in it.
        target: class indices, `[...]`.
        linear_bias: `[V]`.
        chunk_size: rows of logits held at a time (for "cpu", of exponentials kept); each backend has a default.
        grad_filter_eps: permission to leave a class out of the gradients of `input` and `linear_weight` where
            `|d loss_i / d (input_i · linear_weight_j)|`, before row weights, is below this for every row i of a block (of
            up to 1024), as exactly as the backend holds it. 0 leaves out nothing. "cpu" makes use of it, which on a trained model saves much of two of the three products: of Gemma
            3's 262,144 classes, 2^-20 keeps a quarter at no measurable error; the others compute everything.
            benchmarks/results/grad_filter.md has errors and times.

    The other arguments, the result and the errors are those of `cross_entropy`. Gradients flow to `input`,
    `linear_weight`, `linear_bias` and `sample_weight`.
    """
    input, linear_weight, linear_bias = cast_for_autocast(input, linear_weight, linear_bias)
    rows = flatten(input, target, cu_seqlens, ignore_index, shift)
    check_head(input, linear_weight, linear_bias)
    weight = check_options(rows, linear_weight.shape[0], weight, label_smoothing, softcap, z_loss)
    row_weight = spread_sample_weight(sample_weight, rows, cu_seqlens, shift)
    kept, row_weight = drop_rows(rows, row_weight)
    options = (
        weight, ignore_index, float(label_smoothing), float(softcap or 0.0), float(z_loss), check_chunk_size(chunk_size),
    )  # fmt: skip
    grad_filter_eps = check_grad_filter_eps(grad_filter_eps, label_smoothing)
    check_no_tangent("cross_entropy", input, linear_weight, linear_bias, sample_weight)
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows.input, linear_weight, linear_bias)
    ]
    kind = _kind(any(needs), reduction, rows.input)
    of = (softcap is not None, linear_bias is not None)
    backend = backends.resolve(backend, input.device.type, input.dtype, f"linear_cross_entropy_{kind}", *of)

    if reduction == "none":
        _no_normalizer(normalizer)
        loss, _, _ = ops.linear_cross_entropy_fwd(
            rows.input, linear_weight, kept, linear_bias, *options, grad_filter_eps, backend
        )
        return (loss if row_weight is None else row_weight * loss).reshape(rows.shape)
    row_weight = row_weights(rows, row_weight, weight, reduction, normalizer)
    if kind == "fwd_bwd":
        total, *_ = ops.linear_cross_entropy_fwd_bwd(
            rows.input, linear_weight, kept, row_weight, linear_bias, *options, *needs, grad_filter_eps, backend
        )
        return total
    loss, _, _ = ops.linear_cross_entropy_fwd(
        rows.input, linear_weight, kept, linear_bias, *options, grad_filter_eps, backend
    )
    return (row_weight * loss).sum()


def check_options(
    rows: Rows, num_classes: int, weight: Tensor | None, label_smoothing: float, softcap: float | None, z_loss: float
) -> Tensor | None:
    """Check the options of a loss; returns the class weights in the accumulation dtype."""
    cap = 0.0 if softcap is None else softcap
    for name, value in {"label_smoothing": label_smoothing, "softcap": cap, "z_loss": z_loss}.items():
        # A 0-d tensor or array is as good as its number.
        if not isinstance(value, Real) and getattr(value, "shape", None) != ():
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    in_fp32 = accumulation_dtype(rows.input.dtype) == torch.float32
    if softcap is not None and in_fp32 and not 2.0**-126 <= softcap <= 2.0**126:
        raise ValueError(f"softcap={softcap} and its inverse are not both fp32 numbers, in which logits are capped")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if num_classes == 0 and rows.target.numel():
        raise ValueError("input has no classes: its vocabulary dimension is 0")
    if weight is None:
        return None
    check_floating("weight", weight)
    check_same_device(rows.input, weight=weight)
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight holds one weight per class, shape ({num_classes},), got {tuple(weight.shape)}; "
            "weights per sample are sample_weight"
        )
    if weight.requires_grad:
        raise ValueError("weight (per class) gets no gradient, but it requires one; detach it")
    return weight.to(accumulation_dtype(rows.input.dtype))


def check_head(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Check a linear head against its input."""
    for name, tensor, shape in (
        ("linear_weight", linear_weight, ("V", input.shape[-1])),
        (
            "linear_bias",
            linear_bias,
            (linear_weight.shape[0] if isinstance(linear_weight, Tensor) and linear_weight.dim() else "V",),
        ),
    ):
        if tensor is None and name == "linear_bias":
            continue
        check_floating(name, tensor)
        check_same_device(input, **{name: tensor})
        if tensor.dim() != len(shape) or tensor.shape[-1] != shape[-1]:
            # DeepSpeed's ZeRO-3 leaves an empty tensor where the parameter is not gathered.
            hint = "; it is empty, so gather it first if it is sharded over processes" if tensor.shape == (0,) else ""
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}{hint}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor; call the loss inside the sharded module or pass {name}.full_tensor()"
            )
        if tensor.dtype != input.dtype and not (name == "linear_weight" and stays_wide(tensor, input)):
            raise TypeError(f"{name} is {tensor.dtype} but input is {input.dtype}; cast one, or use torch.autocast")


def check_chunk_size(chunk_size: int | None) -> int:
    """The operators' form of `chunk_size`: 0 stands for the backend's default."""
    if chunk_size is None:
        return 0
    if not isinstance(chunk_size, Integral) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of rows or None, got {chunk_size!r}")
    return int(chunk_size)


def check_grad_filter_eps(grad_filter_eps: float, label_smoothing: float) -> float:
    """Check the permission to leave out small gradients against what would be lost."""
    if not 0.0 <= grad_filter_eps < 1.0:
        raise ValueError(f"grad_filter_eps must be in [0, 1), got {grad_filter_eps}")
    if grad_filter_eps > 0.0 and label_smoothing > 0.0:
        raise ValueError(
            "grad_filter_eps would leave out what label_smoothing gives to every class (label_smoothing / V each); "
            "use one of them"
        )
    return float(grad_filter_eps)


def _kind(needs_grad: bool, reduction: str, input: Tensor) -> str:
    """Which operator a call needs in the end: "fwd" alone, "bwd" after it, or "fwd_bwd" in one pass."""
    if not needs_grad:
        return "fwd"
    # fp16 gradients of p / N underflow unless a loss scale reaches them before they are rounded, and that scale is the
    # upstream gradient, which a one-pass operator does not know yet: fp16 takes the two-pass operators.
    return "bwd" if reduction == "none" or input.dtype == torch.float16 else "fwd_bwd"


def _no_normalizer(normalizer: Normalizer) -> None:
    if not (isinstance(normalizer, str) and normalizer == "targets"):
        raise ValueError("normalizer goes with reduction='mean'; reduction='none' divides by nothing")


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module; the constructor takes its options, the call its tensors.

    A drop-in for `torch.nn.CrossEntropyLoss` on `[N, V]` logits and class indices: `CrossEntropyLoss()(input, target)`,
    plus `sample_weight`, `cu_seqlens` and, for one call, another `normalizer` by keyword.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalizer: Normalizer = "targets",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        shift: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.options = {
            "ignore_index": ignore_index, "reduction": reduction, "normalizer": normalizer,
            "label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss, "shift": shift, "backend": backend,
        }  # fmt: skip

    def _options_with(self, normalizer: Normalizer | None) -> dict:
        return self.options if normalizer is None else {**self.options, "normalizer": normalizer}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        normalizer: Normalizer | None = None,
    ) -> Tensor:
        return cross_entropy(
            input, target, weight=self.weight, sample_weight=sample_weight, cu_seqlens=cu_seqlens,
            **self._options_with(normalizer),
        )  # fmt: skip


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """`linear_cross_entropy` as a module; the head stays where it is and is passed to each call.

    Example: `LinearCrossEntropyLoss(softcap=30.0)(hidden, model.lm_head.weight, labels, sample_weight=w)`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        chunk_size: int | None = None,
        grad_filter_eps: float = 0.0,
        **options,
    ) -> None:
        super().__init__(weight, **options)
        self.options.update(chunk_size=chunk_size, grad_filter_eps=grad_filter_eps)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        sample_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        normalizer: Normalizer | None = None,
    ) -> Tensor:
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, sample_weight=sample_weight,
            cu_seqlens=cu_seqlens, **self._options_with(normalizer),
        )  # fmt: skip
