"""Weights beside a batch that a collator made without them: packed rows, or one weight per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from flow_finetune.errors import InputError
from flow_finetune.integrations.trainer import COLUMN


class KeepWeights:
    """A data collator that carries the column `sample_weight` around another, which knows nothing of it.

        Trainer(..., data_collator=KeepWeights(DataCollatorWithFlattening()))    # samples end to end, without padding

    A collator that pads keeps one weight per sample by itself, as any column of numbers. This is for those that put all
    samples of a batch into one row, where the weight of a sample becomes that of each of its labels, and for weights
    that are a list, one per token, which nothing pads.

    Args:
        data_collator: from a list of rows to a batch with `labels`. Packed rows need position ids that start again with
            each sample, a label of -100 at its first token, and a model that reads both (as
            `transformers.DataCollatorWithFlattening` makes them).

    The batch gets `sample_weight`, fp32: `[B]` where rows stay rows and have a number each, else in the shape of its
    labels, 0 where it was padded. Rows without the column, those of an evaluation, get none.

    Raises:
        InputError: some rows have no weight, or their labels are not those of whole samples, one after another or one
            in each row.
    """

    def __init__(self, data_collator: Callable) -> None:
        self.data_collator = data_collator
        if hasattr(data_collator, "tokenizer"):
            # Trainer looks for it here, to save it beside the model.
            self.tokenizer = data_collator.tokenizer

    def __call__(self, features: Sequence[dict], **options):
        # None: of rows that had no such column when data sets were joined.
        weights = [row[COLUMN] for row in features if row.get(COLUMN) is not None]
        batch = self.data_collator([{k: v for k, v in row.items() if k != COLUMN} for row in features], **options)
        if not weights:
            return batch
        if len(weights) != len(features):
            raise InputError(f"{len(features) - len(weights)} of {len(features)} rows have no {COLUMN}")
        labels = batch["labels"]
        rows_stay = labels.shape[0] == len(features)
        if rows_stay and all(isinstance(w, Real) or (isinstance(w, Tensor) and not w.dim()) for w in weights):
            batch[COLUMN] = torch.tensor([float(w) for w in weights])
            return batch
        untokenised = next((i for i, row in enumerate(features) if "input_ids" not in row), None)
        if untokenised is not None:
            raise InputError(f"row {untokenised} has no input_ids; tokenise rows before weights are carried to tokens")
        lengths = [len(row["input_ids"]) for row in features]
        per_label = [_per_label(w, length, row) for row, (w, length) in enumerate(zip(weights, lengths, strict=True))]
        if rows_stay:
            batch[COLUMN] = _padded(per_label, labels, batch.get("attention_mask"))
        elif labels.shape[0] == 1 and labels.numel() == sum(lengths):
            batch[COLUMN] = torch.cat(per_label).view(1, -1)
        else:
            raise InputError(
                f"the data collator made labels of shape {tuple(labels.shape)} of {len(features)} samples with "
                f"{sum(lengths)} tokens; weights can follow samples that stay whole, one a row or all in one row"
            )
        return batch


def _per_label(weight, length: int, row: int) -> Tensor:
    values = torch.as_tensor(weight, dtype=torch.float32).reshape(-1)
    if values.numel() == 1:
        return values.expand(length)
    if values.numel() != length:
        raise InputError(f"row {row} has {values.numel()} weights for {length} tokens; give one, or one per token")
    return values


def _padded(per_label: list[Tensor], labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`[B, T]`, on the side of each row on which its tokens are."""
    found = torch.zeros(labels.shape, dtype=torch.float32)
    for row, values in enumerate(per_label):
        present = torch.arange(labels.shape[1]) < len(values)
        if attention_mask is not None:
            present = attention_mask[row] != 0
        elif len(values) < labels.shape[1]:
            raise InputError("the batch has no attention_mask, which says on which side its rows were padded")
        if int(present.sum()) != len(values):
            raise InputError(
                f"row {row} has {len(values)} weights, and its batch {int(present.sum())} tokens; cut both to one length "
                "before they are collated"
            )
        found[row, present] = values
    return found
