"""The weighted fused loss under `transformers.Trainer`, or any loop that calls `model(**batch).loss`.

    dataset = add_sample_weights(dataset, model, data_collator)    # once, with the pre-trained model
    Trainer(model=use_weighted_loss(model), train_dataset=dataset, data_collator=data_collator, ...).train()

The model's own `forward` takes the column `sample_weight` and gives the loss, so the trainer, its gradient accumulation and
DDP stay as they are (in a loop of one's own, `num_items_in_batch` is the target count of the whole step, and what averages
over processes or accumulated batches has to be multiplied back): `Trainer` keeps the columns that `forward` names, and hands it the target count of the whole
optimiser step. A weight that is lost on the way (by a collator, by column removal) is an error, not plain fine-tuning.
"""

from __future__ import annotations

import inspect
import math
import types

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import flow_kernels
from flow_finetune.errors import InputError
from flow_finetune.models import CausalLM, causal_lm_of
from flow_finetune.modes import evaluating
from flow_kernels import backends

COLUMN = "sample_weight"
# Of the loss, or of the form of the output; a model's body knows none of them.
_NOT_OF_THE_BODY = ("logits_to_keep", "return_dict")


def use_weighted_loss(
    model: PreTrainedModel,
    *,
    require_weights: bool = True,
    weights_in_eval: bool = False,
    logits_in_eval: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_filter_eps: float = 0.0,
    backend: str = "auto",
) -> PreTrainedModel:
    """Make `model(input_ids=..., labels=..., sample_weight=...)` return the weighted loss, without making logits.

        loss = (sample_weight * nll).sum() / num_items_in_batch    # the batch's target count where none is given

    Only this instance (and deep copies of it) changes; without labels it does what it did, so `generate` works. Call it on
    the model or on peft's wrapper of it, before a trainer or accelerate has it.

    Args:
        model: a causal language model whose head is a plain `torch.nn.Linear`.
        require_weights: whether training without `sample_weight` is an error.
        weights_in_eval: whether the loss of an evaluation (eval mode, and no gradients recorded) is weighted where its
            data set has weights; by default it is the plain one, which compares between runs and is what early stopping and `load_best_model_at_end` should see.
        logits_in_eval: whether outputs in eval mode have their logits, which `compute_metrics`,
            `preprocess_logits_for_metrics` and `predict` need; without, they get the empty tuple `()`.
        label_smoothing, z_loss, grad_filter_eps, backend: as in `flow_kernels.linear_cross_entropy`.

    Returns:
        The same model, or the wrapper. Its `forward` takes, beside its own arguments, `sample_weight`: `[B]`, one per
        sequence, or in the shape of the labels, one per label (in the order of `shift_labels` where those are given, and
        so also for packed rows); floating. `loss` is 0-d fp32, in nats per target token.

    A label outside the vocabulary is an IndexError, but on an NVIDIA GPU, where nobody looks, it makes the loss NaN, which
    Trainer leaves out of its log unless `logging_nan_inf_filter=False`.

    Raises:
        InputError: a model whose own loss is not the one described, for weights of 1, or that has the weighted loss
            already. While training: weights or labels did not arrive.
        ValueError: an option out of range.
        flow_kernels.BackendUnavailable: the named backend cannot serve the model's device.
    """
    wrapper, lm = model, causal_lm_of(model)
    model = lm.model
    if COLUMN in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} takes {COLUMN} already; use_weighted_loss is called once a model")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise InputError(f"this {type(model).__name__} is spread over several devices, which the loss cannot follow")
    device = lm.head.weight.device.type
    # Now, not in the first step or the first evaluation.
    try:
        for operator in ("linear_cross_entropy_fwd", "linear_cross_entropy_fwd_bwd"):
            backends.resolve(backend, device, operator=operator)
    except backends.BackendUnavailable as error:
        if device != "cpu" or backend not in ("triton", "cuda"):
            raise
        raise backends.BackendUnavailable(f"{error}; the model is on the CPU, so move it to its GPU first") from error
    options = {
        "label_smoothing": label_smoothing, "z_loss": z_loss, "grad_filter_eps": grad_filter_eps, "backend": backend
    }  # fmt: skip
    _check_own_loss(lm, options)
    # A plain function where it is one, so that a deep copy runs itself and not the model it was copied from.
    bound = getattr(model.forward, "__self__", None) is model
    original = model.forward.__func__ if bound else lambda self, **inputs: wrapped(**inputs)
    wrapped = model.forward
    signature = inspect.signature(wrapped)

    def forward(self, *args, sample_weight=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        inputs = _arguments(signature, args, kwargs)
        labels = inputs.pop("labels", None)
        has_labels = labels is not None or shift_labels is not None
        needs_weights = require_weights and self.training
        _check_arrived(has_labels, sample_weight, num_items_in_batch, needs_weights)
        if not self.training and not torch.is_grad_enabled() and not weights_in_eval:
            sample_weight = None
        if not has_labels:
            return original(self, **inputs)
        _refuse_router_loss(self, inputs)
        lm = CausalLM(self)
        body = {name: value for name, value in inputs.items() if name not in _NOT_OF_THE_BODY}
        hidden = self.base_model(**{"use_cache": False, **body}).last_hidden_state
        loss = _loss(
            lm, hidden, labels if shift_labels is None else shift_labels, sample_weight=sample_weight,
            normalizer="targets" if num_items_in_batch is None else num_items_in_batch, shift=shift_labels is None,
            **options,
        )  # fmt: skip
        logits = lm.logits(hidden) if logits_in_eval and not self.training else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        return output.to_tuple() if inputs.get("return_dict") is False else output

    forward.__doc__ = wrapped.__doc__
    forward.__signature__ = _with_weights(signature)
    # A method is pickled by its name, and would come back as the class's forward: nothing has this name.
    forward.__name__ = "forward_with_weighted_loss"
    model.forward = types.MethodType(forward, model)
    # For models of which Trainer would otherwise average micro-batches, whatever their numbers of targets.
    model.accepts_loss_kwargs = True
    # Trainer counts the targets as a shifted loss does of these only; that this one shifts has been checked.
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"
    model.register_forward_pre_hook(_check_not_replaced)
    return wrapper


def _loss(lm: CausalLM, hidden: Tensor, labels: Tensor, **options) -> Tensor:
    return flow_kernels.linear_cross_entropy(
        lm.head_input(hidden), lm.head.weight, labels, linear_bias=lm.head.bias, softcap=lm.softcap, **options
    )


def _check_arrived(has_labels: bool, sample_weight, num_items_in_batch, needs_weights: bool) -> None:
    """Raise `InputError` for a call in which weights, labels or the target count were lost or changed on the way."""
    # Trainer gives the count also where it takes the labels out, for a loss of its own.
    if needs_weights and sample_weight is None and (has_labels or num_items_in_batch is not None):
        raise InputError(
            f"no {COLUMN} reached the model: the data set needs that column (add_sample_weights makes it), the collator "
            "must keep it, and neither a transform nor the trainer may take it away (remove_unused_columns, or a list of "
            "columns of its own); rows without a weight of their own need one, such as 1.0; for "
            "plain fine-tuning call use_weighted_loss(model, require_weights=False)"
        )
    if sample_weight is not None and not has_labels:
        raise InputError(
            f"{COLUMN} arrived without labels: the trainer takes them out for label_smoothing_factor or "
            "compute_loss_func; leave both away and give label_smoothing to use_weighted_loss"
        )
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim():
        raise InputError(
            "DataParallel, which Trainer takes when one process sees several GPUs, is not served; start one process a "
            "GPU with torchrun, or show the process one GPU with CUDA_VISIBLE_DEVICES"
        )


def _check_not_replaced(model: torch.nn.Module, _) -> None:
    """Refuse to train where something put another forward in place of the weighted one, such as Liger's."""
    if model.training and COLUMN not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"the forward of {type(model).__name__} was replaced after use_weighted_loss, and the weights would be lost; "
            "leave patches of the loss away, or of use_liger_kernel its loss: liger_kernel_config="
            '{"fused_linear_cross_entropy": False, "cross_entropy": False}'
        )


def _refuse_router_loss(model: PreTrainedModel, inputs: dict) -> None:
    if inputs.get("output_router_logits", getattr(model.config.get_text_config(), "output_router_logits", False)):
        raise InputError(
            f"{type(model).__name__} adds a loss of its routers, which the fused loss does not; set "
            "output_router_logits=False in its configuration"
        )


@torch.no_grad()
def _check_own_loss(lm: CausalLM, options: dict) -> None:
    """Raise `InputError` unless the model's loss on a few tokens is the mean over shifted labels."""
    model = lm.model
    _refuse_router_loss(model, {})
    if model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__} is an encoder-decoder; the fused loss serves decoders alone")
    ids = torch.arange(8, device=lm.head.weight.device)[None] % lm.head.weight.shape[0]
    with evaluating(model):
        theirs = model(input_ids=ids, labels=ids, use_cache=False).loss
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = _loss(lm, hidden, ids, shift=True)
    _loss(lm, hidden, ids, shift=True, **options)  # an option out of range is named now
    # Theirs may be of logits in 16 bits.
    limit = 1e-4 if hidden.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type) else 3e-2
    theirs = math.nan if theirs is None else float(theirs)
    if not abs(theirs - float(ours)) <= limit * max(1.0, float(ours)):
        raise InputError(
            f"the loss of {type(model).__name__} is {theirs:.6} where the mean over shifted labels is {float(ours):.6}: it "
            "does not shift the labels, or adds something of its own"
        )


def _with_weights(signature: inspect.Signature) -> inspect.Signature:
    """What Trainer looks at: the columns of the data set to keep, and whether a target count is welcome."""
    parameters = {"self": inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), **signature.parameters}
    rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (COLUMN, "shift_labels", "num_items_in_batch")
        if name not in parameters
    ]
    named = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*named, *added, *(rest or [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])])


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """What a call gives `forward`, all by name."""
    bound = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return dict(bound)
