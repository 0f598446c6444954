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
from flow_finetune.models import causal_lm_of
from flow_finetune.modes import evaluating
from flow_finetune.progress import say, track

# How peft may initialise adapters so that the model without them is not the pre-trained one: a part of its matrices is
# moved into them, or rounded away.
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def add_sample_weights(
    dataset,
    model: PreTrainedModel,
    data_collator: Callable,
    *,
    batch_size: int = 8,
    remove_unused_columns: bool = True,
    backend: str = "auto",
    **options,
):
    """The `datasets.Dataset` with a column `sample_weight`: FLOW's weight of every sample, `exp(-loss / median loss)`.

    Their mean, near 0.37, is printed: the loss becomes smaller by it, which AdamW ignores, and SGD and the clipping of
    gradients do not; `normalize="mean"` makes it 1.

    Args:
        dataset: tokenised, with `labels` or a collator that makes them.
        model: the pre-trained model, before any training, on the device to score on; of one in peft's wrapper the
            adapters are off.
        data_collator: from a list of rows to a padded batch, the one that trains.
        batch_size, remove_unused_columns, backend: as in `sample_losses`.
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
    losses = sample_losses(
        dataset, model, data_collator, batch_size=batch_size, remove_unused_columns=remove_unused_columns,
        backend=backend,
    )  # fmt: skip
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
    remove_unused_columns: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Mean loss of every sample over its target tokens, in eval mode, without making logits.

    Under a launcher every process scores all samples: it waits for no other, wherever the call stands. For large data call
    it once, in a process of its own, and keep the data set with its column (`save_to_disk`).

    Args:
        dataset: a `datasets.Dataset` or a sequence of rows.
        model: a causal language model on the device to score on (a trainer moves it there only later), or peft's wrapper
            of one, which is scored without its adapters; put the call under `torch.autocast` to score in less than its
            own precision.
        data_collator: from a list of rows to a batch with one row per sample and `labels`, -100 where there is no
            target. Batches are made in order.
        batch_size: samples of one forward pass.
        remove_unused_columns: hide the columns of a `datasets.Dataset` that the model does not take from the collator, as
            `TrainingArguments.remove_unused_columns` does; give both the same value.
        backend: as in `flow_kernels.linear_cross_entropy`.

    Returns:
        `[len(dataset)]` fp32 on the CPU, nats per target token.

    Raises:
        InputError: a collator that packs samples into one row or makes no labels, samples without a target, or adapters
            whose initialisation changed the model below them.
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
    if taken and remove_unused_columns:
        dataset = dataset.select_columns(taken)
    if lm.head.weight.device.type == "cpu" and torch.cuda.is_available():
        say("scoring on the CPU, where the model is; move it to a GPU first for speed")
    found = []
    with evaluating(lm), _without_adapters(model), track("scoring", len(dataset), visible=True) as tracker:
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


@contextlib.contextmanager
def _without_adapters(model: PreTrainedModel):
    """The pre-trained model below peft's adapters, if there are any, while the block runs."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    for config in model.peft_config.values():
        made = str(getattr(config, "init_lora_weights", None)).lower()
        if made.startswith(_MOVES_WEIGHTS):
            raise InputError(
                f"init_lora_weights={made!r} changes the matrices below the adapters, so without them this is not the "
                "pre-trained model; make the weights before get_peft_model"
            )
    # peft's context makes all adapters trainable on its way out.
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
