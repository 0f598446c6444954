"""Accuracy and loss of a classifier on the new classes, and on the pre-trained ones with their head put back."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flow_finetune.errors import DivergedError, InputError
from flow_finetune.evaluation_files import metric_record, require_unused, summary_of, told_apart, write_evaluation
from flow_finetune.statistics import Items
from flow_finetune.storage import fingerprint
from flow_finetune.vision.config import ImageModelConfig, ImageTaskConfig
from flow_finetune.vision.data import ImageSet, align_labels, load_images
from flow_finetune.vision.models import Description, ImageClassifier, classifier_fingerprint, load_classifier
from flow_finetune.vision.stages import extract_features, losses_of, source_model


@dataclass(frozen=True)
class Original:
    """What measuring the pre-trained classes needs of the pre-trained model: its head and its batch-norms."""

    head: nn.Module
    batch_norm_state: dict[str, Tensor]
    description: Description

    @staticmethod
    def of(classifier: ImageClassifier) -> Original:
        return Original(classifier.head, classifier.batch_norm_state(), classifier.description)


@dataclass(frozen=True)
class ImageTask:
    """An evaluation whose images are decoded."""

    config: ImageTaskConfig  # with its name
    images: ImageSet
    size: int

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def fingerprint(self) -> str:
        """Of what is measured: pixels, labels, ids, class names, how they are matched, and the size that is seen."""
        # Left out at its default, so that fingerprints stay what they were.
        match = [] if self.config.match_classes == "name" else [self.config.match_classes.encode()]
        return fingerprint([self.images.fingerprint.encode(), str(self.size).encode(), *match])

    def labels(self, class_names: tuple[str, ...] | None, num_classes: int) -> np.ndarray:
        """`align_labels` of its images, as its configuration says."""
        return align_labels(self.images, class_names, num_classes, self.config.match_classes)


def named_tasks(tasks: Sequence[ImageTaskConfig]) -> list[ImageTaskConfig]:
    """`tasks` with the names of those that have none: the source's stem, behind its folder's name where others have it.

    Raises:
        InputError: two tasks of one name.
    """
    names = told_apart([task.name or Path(task.source).stem for task in tasks], tasks)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(
            f"two tasks are named {repeated[0]!r}; give them different names (name: in a run's file), or evaluate them "
            "in two calls"
        )
    return [replace(task, name=name) for task, name in zip(tasks, names, strict=True)]


def prepare_tasks(tasks: Sequence[ImageTaskConfig], original: Description, size: int, crop: float) -> list[ImageTask]:
    """Decode the images of every task: target ones at training's `size` and `crop`, retained ones at the model's."""
    prepared = []
    for config in named_tasks(tasks):
        seen = (size, crop) if config.role == "target" else (original.size, original.crop)
        wanted = config.size or seen[0]
        prepared.append(ImageTask(config, load_images(config, wanted, seen[1]), wanted))
        if config.role == "retained":
            prepared[-1].labels(original.class_names, original.num_classes)
    return prepared


def evaluate_classifier(
    classifier: ImageClassifier,
    original: Original | None,
    tasks: Sequence[ImageTask],
    output: Path,
    *,
    batch_size: int,
    source: str,
    overwrite: bool = False,
    summary: dict | None = None,
) -> dict:
    """Measure every task in eval mode and write `evaluation.json` and `items.parquet`; returns what the former holds.

    Args:
        classifier: a tuned model with its new head; unchanged afterwards.
        original: of the pre-trained model, for retained tasks.
        output: directory.
        source: where the model came from, for the record.
        summary: of the training that made it, for a report of `output` alone.

    Raises:
        InputError: an output that holds an evaluation, a class that the head does not have, or a loss that is NaN.
    """
    output = Path(output)
    require_unused(output, overwrite)
    records, columns = [], []
    for task in tasks:
        start = time.perf_counter()
        items = _measure(classifier, original, task, batch_size)
        records.append(
            {
                "name": task.name, "kind": task.config.kind, "role": task.config.role, "source": task.config.source,
                "num_items": len(task.images.ids), "num_dropped": task.images.num_bad, "num_truncated": 0,
                "fingerprint": task.fingerprint, "settings": {"precision": classifier.precision}, "seconds": time.perf_counter() - start,
                "metrics": {name: metric_record(i) for name, i in items.items()},
            }
        )  # fmt: skip
        columns += [(task.name, name, i) for name, i in items.items()]
    fingerprints = {"model": classifier_fingerprint(classifier)}
    output.mkdir(parents=True, exist_ok=True)
    return write_evaluation(output, source, fingerprints, records, columns, summary=summary)


def _measure(classifier: ImageClassifier, original: Original | None, task: ImageTask, batch_size: int) -> dict:
    def run(description: Description) -> tuple[Tensor, Tensor, np.ndarray]:
        labels = task.labels(description.class_names, description.num_classes)
        features = extract_features(classifier, task.images.pixels, task.size, batch_size)
        return *losses_of(classifier.head, features, torch.from_numpy(labels)), labels

    if task.config.role == "retained":
        if original is None:
            raise InputError(f"{task.name} is a retained task, which needs the pre-trained model's head")
        with source_model(classifier, original.head, original.batch_norm_state):
            loss, predicted, labels = run(original.description)
    else:
        loss, predicted, labels = run(classifier.description)
    bad = [task.images.ids[i] for i in range(len(loss)) if not math.isfinite(float(loss[i]))]
    if bad:
        raise DivergedError(f"the model gives NaN or infinite losses in {task.name}, first for image {bad[0]}")
    weight = np.ones(len(labels))
    correct = (predicted.numpy() == labels).astype(np.float64)
    return {"accuracy": Items(task.images.ids, correct, weight), "nats": Items(task.images.ids, loss.numpy(), weight)}


def evaluate_saved(
    model: ImageModelConfig,
    tasks: Sequence[ImageTaskConfig],
    output: Path,
    *,
    pretrained: ImageModelConfig | None = None,
    size: int | None = None,
    batch_size: int = 64,
    overwrite: bool = False,
) -> dict:
    """Measure a saved or pre-trained classifier alone: `evaluate --task image`.

    Args:
        model: what to measure; for retained tasks without `pretrained` it stands for itself.
        pretrained: the model whose head and batch-norms are put back for retained tasks.
        size: pixels a side of target tasks; the model's own when not given.

    Raises:
        InputError: as `evaluate_classifier`, or a body that is not that of `pretrained`.
    """
    output = Path(output)
    require_unused(output, overwrite, model.source)
    if not tasks:
        raise InputError("there is nothing to evaluate: give at least one task")
    tasks = named_tasks(tasks)
    classifier = load_classifier(model)
    original = Original.of(classifier if pretrained is None else load_classifier(pretrained))
    shapes = [
        {name: t.shape for name, t in state.items()}
        for state in (original.batch_norm_state, classifier.batch_norm_state())
    ]
    if shapes[0] != shapes[1] or original.head.in_features != classifier.head.in_features:
        raise InputError(f"{model.source} is not a fine-tuned {pretrained.source}: their layers differ")
    own = classifier.description
    prepared = prepare_tasks(tasks, original.description, size or own.size, own.crop)
    return evaluate_classifier(
        classifier, original, prepared, output,
        batch_size=batch_size, source=model.source, overwrite=overwrite, summary=summary_of(model.source),
    )  # fmt: skip
