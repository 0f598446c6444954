"""FLOW's weights as a column of a tokenised data set, for training programs that read one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import flow_kernels
from flow_finetune.errors import InputError
from flow_finetune.integrations.trainer import COLUMN
from flow_finetune.models import causal_lm_of, evaluating
from flow_finetune.progress import say, track


def add_sample_weights(
    dataset, model: PreTrainedModel, data_collator: Callable, *, batch_size: int = 8, backend: str = "auto", **options
):
    """The `datasets.Dataset` with a column `sample_weight`: FLOW's weight of every sample, `exp(-loss / median loss)`.

    Their mean, near 0.37, is printed: the loss becomes smaller by it, which AdamW ignores, and SGD and the clipping of
    gradients do not; `normalize="mean"` makes it 1.

    Args:
        dataset: tokenised, with `labels` or a collator that makes them.
        model: the pre-trained model, before any training, on the device to score on; of one in peft's wrapper the
            adapters are off.
        data_collator: from a list of rows to a padded batch, the one that trains.
        batch_size, backend: as in `sample_losses`.
        **options: `temperature`, `quantile`, `clip`, `normalize` as in `flow_kernels.flow_weights`.

    Raises:
        InputError: the column exists, a sample has no target, or the weights cannot be made of these losses.
    """
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__"):
        raise InputError(
            f"a {type(dataset).__name__} takes no new column; give a datasets.Dataset, or make weights of sample_losses"
        )
    if COLUMN in dataset.column_names:
        raise InputError(f"the data set has a column {COLUMN} already; remove it, or train with it as it is")
    losses = sample_losses(dataset, model, data_collator, batch_size=batch_size, backend=backend)
    try:
        weights = flow_kernels.flow_weights(losses, **options)
    except ValueError as error:
        raise InputError(str(error)) from error
    size = float(flow_kernels.effective_sample_size(weights))
    say(f"{COLUMN}: mean weight {float(weights.mean()):.3f}, effective sample size {size:,.1f} of {len(weights):,}")
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

    Under a launcher every process scores all samples: it waits for no other, wherever the call stands.

    Args:
        dataset: a `datasets.Dataset`, of which only the columns that the model takes are read, or a sequence of rows.
        model: a causal language model, or peft's wrapper of one, which is scored without its adapters; put the call
            under `torch.autocast` to score in less than its own precision.
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
    if not hasattr(dataset, "__len__"):
        raise InputError(
            f"a {type(dataset).__name__} has no length, and weights need the losses of all samples first; weigh "
            "each batch of a stream in a training step of your own, with flow_kernels.weigh_samples"
        )
    lm = causal_lm_of(model)
    names = inspect.signature(lm.model.forward).parameters
    taken = [name for name in getattr(dataset, "column_names", None) or () if name in names and name != COLUMN]
    # None: the collator tokenises, and reads columns that the model does not know.
    if taken:
        dataset = dataset.select_columns(taken)
    found = []
    adapters_off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    with evaluating(lm), adapters_off, track("scoring", len(dataset), visible=True) as tracker:
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
            hidden = lm.model.base_model(**{"use_cache": False, **body}).last_hidden_state
            found.append(
                flow_kernels.linear_score_samples(
                    lm.head_input(hidden), lm.head.weight, labels.to(device), linear_bias=lm.head.bias, softcap=lm.softcap, shift=True,
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
