"""The probed model's losses on the un-augmented training images: made once, kept as Parquet, checked before use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from flow_finetune.errors import InputError
from flow_finetune.scores import METADATA_KEY, NUM_EXTREMES, Scores, read_metadata
from flow_finetune.storage import atomic_path
from flow_finetune.vision.data import ImageSet

_MAX_NAMED = 20


def write_scores(
    path: Path, images: ImageSet, labels: np.ndarray, loss: Tensor, predicted: Tensor, fingerprints: dict[str, str]
) -> None:
    """Write one row per image: id, label, predicted class and loss in nats.

    Raises:
        InputError: a loss is NaN or infinite (ids listed).
    """
    bad = [images.ids[i] for i in (~torch.isfinite(loss)).nonzero().flatten().tolist()]
    if bad:
        raise InputError(f"the loss of {len(bad)} images is NaN or infinite, ids {', '.join(bad[:_MAX_NAMED])}")
    values = loss.double().numpy()
    metadata = {
        "fingerprints": fingerprints,
        "temperature": float(np.median(values)),
        "num_read": len(images.ids) + images.num_bad,
        "dropped": {"does not decode": images.num_bad},
        "extremes": _extremes(images, labels, values, predicted),
    }
    table = pa.table(
        {
            "id": images.ids, "label": labels, "predicted": predicted.numpy(), "loss": values,
        }
    )  # fmt: skip
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _extremes(images: ImageSet, labels: np.ndarray, loss: np.ndarray, predicted: Tensor) -> dict[str, list[dict]]:
    names = images.class_names
    order = np.argsort(loss, kind="stable")

    def describe(indices) -> list[dict]:
        def name(number: int) -> str:
            return names[number] if names and number < len(names) else f"class {number}"

        return [
            {
                "id": images.ids[i], "loss": float(loss[i]), "prompt": f"image of {name(int(labels[i]))}",
                "response": f"predicted {name(int(predicted[i]))}",
            }
            for i in indices
        ]  # fmt: skip

    return {"easiest": describe(order[:NUM_EXTREMES]), "hardest": describe(order[::-1][:NUM_EXTREMES])}


def read_scores(path: Path, images: ImageSet, fingerprints: dict[str, str]) -> Scores:
    """The losses of `images`, in their order.

    Raises:
        InputError: no such file, or scores of another model, other images or another size (it says which).
    """
    metadata = read_metadata(path)
    different = [name for name, value in fingerprints.items() if metadata["fingerprints"].get(name) != value]
    table = pq.read_table(path)
    if different or table["id"].to_pylist() != images.ids:
        raise InputError(
            f"{path} does not belong to this training: its {', '.join(different) or 'ids'} differ; remove it and run "
            "again"
        )
    return Scores(torch.from_numpy(table["loss"].to_numpy().copy()), None, metadata)
