"""Weights per sample and the fused loss under `transformers.Trainer`, or any loop that calls `model(**batch).loss`.

    dataset = add_sample_weights(dataset, model, data_collator)    # once, with the pre-trained model
    use_weighted_loss(model)
    Trainer(model=model, train_dataset=dataset, data_collator=data_collator, ...).train()

The model's own `forward` takes the column `sample_weight` and gives the loss, so the trainer, its gradient accumulation and
DDP stay as they are: `Trainer` keeps the columns that `forward` names, and hands it the target count of the whole
optimiser step. A weight that is lost on the way (by a collator, by column removal) is an error, not plain fine-tuning.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import flow_kernels
from flow_finetune.errors import InputError
from flow_finetune.models import CausalLM
from flow_finetune.progress import track
from flow_kernels import backends

COLUMN = "sample_weight"
# Of the loss, or of the form of the output; a model's body knows none of them.
_NOT_OF_THE_BODY = ("logits_to_keep", "return_dict")


def use_weighted_loss(
    model: PreTrainedModel,
    *,
    require_weights: bool = True,
    logits_in_eval: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_filter_eps: float = 0.0,
    backend: str = "auto",
) -> PreTrainedModel:
    """Make `model(input_ids=..., labels=..., sample_weight=...)` return the weighted loss, without making logits.

        loss = (sample_weight * nll).sum() / num_items_in_batch    # the batch's target count where none is given

    Only this instance changes (`del model.forward` undoes it); without labels it does what it did, so `generate` works.
    Call it before training, on the model or on peft's wrapper of it.

    Args:
        model: a causal language model whose head is a plain `torch.nn.Linear`.
        require_weights: whether training without `sample_weight` is an error. Evaluation never needs weights.
        logits_in_eval: whether outputs in eval mode have their logits, which `compute_metrics` needs.
        label_smoothing, z_loss, grad_filter_eps, backend: as in `flow_kernels.linear_cross_entropy`.

    Returns:
        The same model. Its `forward` takes, beside its own arguments, `sample_weight`: `[B]`, one per sequence, or in
        the shape of the labels, one per label; floating. `loss` is 0-d fp32, in nats per target token.

    Raises:
        InputError: a head or a change of the logits that the fused loss does not know, or a model that has the loss
            already. While training: `sample_weight` or `labels` did not arrive.
        flow_kernels.BackendUnavailable: the named backend cannot serve the model's device.
    """
    model = _unwrap(model)
    if "sample_weight" in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} takes {COLUMN} already; use_weighted_loss is called once a model")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            f"{type(model).__name__} adds a loss of its routers, which the fused loss does not; set "
            "output_router_logits=False in its configuration"
        )
    lm = _language_model(model)
    # Now, not in the first step. A backend by name is checked where the model is: move it to its device first.
    backends.resolve(backend, lm.head.weight.device.type, operator="linear_cross_entropy_fwd_bwd")
    options = {
        "label_smoothing": label_smoothing, "z_loss": z_loss, "grad_filter_eps": grad_filter_eps, "backend": backend
    }  # fmt: skip
    forward = _with_loss(lm, model.forward, options, require_weights, logits_in_eval)
    model.forward = types.MethodType(forward, model)
    return model


def _with_loss(
    lm: CausalLM, original: Callable, options: dict, require_weights: bool, logits_in_eval: bool
) -> Callable:
    """`original`, a model's forward, as a function that makes the weighted loss where there are labels."""
    signature = inspect.signature(original)

    def forward(self, *args, sample_weight=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        inputs = _arguments(signature, args, kwargs)
        labels = inputs.pop("labels", None)
        if labels is None and shift_labels is None:
            if sample_weight is not None:
                raise InputError(
                    f"{COLUMN} arrived without labels: the trainer takes them out for label_smoothing_factor or "
                    "compute_loss_func; leave both away and give label_smoothing to use_weighted_loss"
                )
            return original(**inputs)
        if self.training and require_weights and sample_weight is None:
            raise InputError(
                f"no {COLUMN} reached the model: the data set needs that column (add_sample_weights makes it), and the "
                "collator must keep it; for plain fine-tuning call use_weighted_loss(model, require_weights=False)"
            )
        body = {name: value for name, value in inputs.items() if name not in _NOT_OF_THE_BODY}
        hidden = self.base_model(**{"use_cache": False, **body}).last_hidden_state
        head = lm.head
        loss = flow_kernels.linear_cross_entropy(
            hidden, head.weight, labels if shift_labels is None else shift_labels, linear_bias=head.bias,
            sample_weight=sample_weight, normalizer="targets" if num_items_in_batch is None else num_items_in_batch,
            softcap=lm.softcap, shift=shift_labels is None, **options,
        )  # fmt: skip
        logits = lm.logits(hidden) if logits_in_eval and not self.training else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        return output.to_tuple() if inputs.get("return_dict") is False else output

    forward.__doc__ = original.__doc__
    forward.__signature__ = _with_weights(signature)
    return forward


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


def add_sample_weights(
    dataset, model: PreTrainedModel, data_collator: Callable, *, batch_size: int = 8, backend: str = "auto", **options
):
    """The `datasets.Dataset` with a column `sample_weight`: FLOW's weight of every sample, `exp(-loss / median loss)`.

    Args:
        dataset: tokenised, with `labels` or a collator that makes them.
        model: the pre-trained model, before any training.
        data_collator: from a list of rows to a padded batch, the one that trains.
        batch_size, backend: as in `sample_losses`.
        **options: `temperature`, `quantile`, `clip`, `normalize` as in `flow_kernels.flow_weights`.

    Raises:
        InputError: the column exists, a sample has no target, or the weights cannot be made of these losses.
    """
    if COLUMN in dataset.column_names:
        raise InputError(f"the data set has a column {COLUMN} already; remove it, or train with it as it is")
    losses = sample_losses(dataset, model, data_collator, batch_size=batch_size, backend=backend)
    try:
        weights = flow_kernels.flow_weights(losses, **options)
    except ValueError as error:
        raise InputError(str(error)) from error
    return dataset.add_column(COLUMN, weights.numpy())


@torch.no_grad()
def sample_losses(
    dataset: Sequence[dict],
    model: PreTrainedModel,
    data_collator: Callable,
    *,
    batch_size: int = 8,
    backend: str = "auto",
) -> Tensor:
    """Mean loss of every sample over its target tokens, in eval mode, without making logits.

    Args:
        dataset: a `datasets.Dataset`, of which only the columns that the model takes are read, or a sequence of rows.
        model: a causal language model; put the call under `torch.autocast` to score in less than its own precision.
        data_collator: from a list of rows to a batch with one row per sample and `labels`, -100 where there is no
            target. Batches are made in order.
        batch_size: samples of one forward pass.
        backend: as in `flow_kernels.linear_cross_entropy`.

    Returns:
        `[len(dataset)]` fp32 on the CPU, nats per target token.

    Raises:
        InputError: a collator that packs samples into one row or makes no labels, or samples without a target.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    model = _unwrap(model)
    lm = _language_model(model)
    names = inspect.signature(model.forward).parameters
    if hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns([name for name in dataset.column_names if name in names and name != COLUMN])
    found = []
    with _evaluating(model), track("scoring", len(dataset), visible=True) as tracker:
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = data_collator(rows)
            labels = batch.get("labels")
            if labels is None:
                raise InputError("the data collator makes no labels; give one that does, or a data set that has them")
            if labels.shape[0] != len(rows):
                raise InputError(
                    f"the data collator made {labels.shape[0]} rows of {len(rows)} samples; a packed batch has no loss "
                    "of its own for each sample, so score with a collator that pads"
                )
            device = lm.head.weight.device
            body = {name: value.to(device) for name, value in batch.items() if name in names and name != "labels"}
            hidden = model.base_model(**body).last_hidden_state
            found.append(
                flow_kernels.linear_score_samples(
                    hidden, lm.head.weight, labels.to(device), linear_bias=lm.head.bias, softcap=lm.softcap, shift=True,
                    backend=backend,
                )
            )  # fmt: skip
            tracker.advance(len(rows), tokens=labels.numel())
    if not found:
        raise InputError("the data set is empty")
    loss_sum, num_targets = (torch.cat([getattr(s, name) for s in found]).cpu() for name in ("loss_sum", "num_targets"))
    without = (num_targets == 0).nonzero().flatten().tolist()
    if without:
        raise InputError(
            f"{len(without)} samples have no target token, the first are {without[:5]}; filter them out before weighting"
        )
    return loss_sum / num_targets


def _unwrap(model) -> PreTrainedModel:
    """The transformers model below peft's wrapper."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} is no causal language model of transformers")
    return model


def _language_model(model: PreTrainedModel) -> CausalLM:
    lm = CausalLM(model)
    with _evaluating(model):
        lm.check_head()
    return lm


@contextmanager
def _evaluating(model: PreTrainedModel):
    """Eval mode, and afterwards the mode of every module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """What a call gives `forward`, all by name."""
    bound = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return dict(bound)
