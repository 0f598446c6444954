"""What an image run is made of: the twin of `flow_finetune.config` for `task: image`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flow_finetune.config import MethodConfig, choose, from_mapping
from flow_finetune.errors import InputError


@dataclass(frozen=True)
class ImageModelConfig:
    """Which pre-trained classifier, and in which precision its body runs. Parameters are fp32."""

    source: str  # efficientnet-lite0, timm:NAME, a transformers hub id, or a directory that a run saved
    revision: str | None = None  # of a hub id
    precision: str = "bf16"  # "bf16": convolutions and matrix products under bf16 autocast; "full": fp32
    device: str = "auto"  # "auto": cuda, then cpu


def _holdout_of_a_part(entries: dict, where: str) -> dict:
    """`entries`; without a part, a holdout would be read and hold nothing out."""
    if "holdout" in entries and entries.get("part", "all") == "all":
        raise InputError(
            f"{where}: holdout has no effect without a part; give part: train (without that share of the images) or "
            "part: validation (that share alone)"
        )
    return entries


@dataclass(frozen=True)
class ImageDataConfig:
    """Which labelled images, and at which size the model sees them."""

    source: str  # folder with a folder per class, .parquet with encoded bytes, or hub id
    split: str | None = None  # of a hub id; "train" when not given
    subset: str | None = None  # of a hub id that has several
    image_field: str = "image"
    label_field: str = "label"
    id_field: str | None = None  # row numbers (paths in a folder) when not given
    size: int | None = None  # pixels a side that training and the target task see; the model's own when not given
    crop: float | None = None  # side of the central square seen, as a share of the short side; the model's, mostly 1
    part: str = "all"  # "train" or "validation": without or only a random share of the images, always the same
    holdout: float = 0.1  # that share
    limit: int | None = None  # the first so many images; of a folder from all classes alike
    bad_images: str = "stop"  # an image that does not decode: "stop", or "skip" it and say so
    cache: str | None = None  # directory for memory-mapped decoded pixels; held in memory when not given

    complete = staticmethod(_holdout_of_a_part)


@dataclass(frozen=True)
class ImageTrainConfig:
    """The three stages, the same for every method unless a method says otherwise."""

    epochs: int = 2  # stage 1, the whole network
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.03  # share of all steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 for no clipping
    optimizer: str = "adamw"  # "adamw", or "sgd" with momentum 0.9
    batch_norm: str = "train"  # stage 1: "train" (batch statistics, running ones follow) or "eval" (frozen statistics)
    augment: str = (
        "flip"  # "none", "flip" (half of the images, left to right) or "crop_flip" (shifted by up to 1/8 too)
    )
    head_epochs: int = 20  # stages 0 and 2, the head alone on features that are computed once
    head_batch_size: int = 128
    head_learning_rate: float = 1e-3
    seed: int = 0
    log_every: int = 10  # optimiser steps
    checkpoint_every: int = 0  # optimiser steps of stage 1; 0 for none: a killed training starts again
    track_distance: bool = True  # distance from where stage 1 started, at the price of a copy of the parameters


@dataclass(frozen=True)
class ImageTaskConfig:
    """One evaluation: the new classes (target), or the pre-trained ones with the original head (retained)."""

    source: str
    name: str | None = None  # the file's stem when not given
    role: str = "target"  # "target": the new head; "retained": the original head and batch-norms are put back
    split: str | None = None  # "test" when not given
    subset: str | None = None
    image_field: str = "image"
    label_field: str = "label"
    id_field: str | None = None
    size: int | None = None  # target: the training's; retained: the model's own
    crop: float | None = None  # target: the training's; retained: the model's own, mostly 1
    part: str = "all"
    holdout: float = 0.1
    limit: int | None = None
    bad_images: str = "stop"
    cache: str | None = None
    kind: str = "classification"
    match_classes: str = "name"  # with those of the head; "number" where names differ and stand in one order

    complete = staticmethod(_holdout_of_a_part)


@dataclass(frozen=True)
class ImageRunConfig:
    """The whole path for images: probe and score, train with each method, evaluate, report."""

    model: ImageModelConfig
    data: ImageDataConfig
    task: str = "image"
    methods: tuple[MethodConfig, ...] = (
        MethodConfig(name="standard", weights="none"),
        MethodConfig(name="flow"),
    )
    train: ImageTrainConfig = field(default_factory=ImageTrainConfig)
    tasks: tuple[ImageTaskConfig, ...] = ()
    batch_size: int = 64  # images of one forward pass when scoring and evaluating


def read_image_run(mapping: dict, where: str) -> ImageRunConfig:
    """The `ImageRunConfig` of a mapping with `task: image`, checked.

    Raises:
        InputError: an unknown or missing entry, or a value out of range, with its place.
    """
    config = from_mapping(ImageRunConfig, mapping, where)
    check_image_run(config)
    return config


def check_image_run(config: ImageRunConfig) -> None:
    """Raise `InputError` for a value out of range."""
    train = config.train
    choose("task", config.task, ("image",))
    choose("model: precision", config.model.precision, ("bf16", "full"))
    choose("train: optimizer", train.optimizer, ("adamw", "sgd"))
    choose("train: batch_norm", train.batch_norm, ("train", "eval"))
    choose("train: augment", train.augment, ("none", "flip", "crop_flip"))
    for task in config.tasks:
        choose(f"task {task.source}: role", task.role, ("target", "retained"))
        choose(f"task {task.source}: kind", task.kind, ("classification",))
        choose(f"task {task.source}: match_classes", task.match_classes, ("name", "number"))
    for place in (config.data, *config.tasks):
        choose(f"{place.source}: bad_images", place.bad_images, ("stop", "skip"))
        choose(f"{place.source}: part", place.part, ("all", "train", "validation"))
        if not 0.0 < place.holdout < 1.0:
            raise InputError(f"{place.source}: holdout is a share of the images, in (0, 1), got {place.holdout}")
        if place.size is not None and place.size < 1:
            raise InputError(f"{place.source}: size is a number of pixels, at least 1, got {place.size}")
        if place.limit is not None and place.limit < 1:
            raise InputError(f"{place.source}: limit is a number of images, at least 1, got {place.limit}")
        check_crop(f"{place.source}: crop", place.crop)
    for task in config.tasks:
        _check_held_out(config.data, task)
    counts = {"train: epochs": train.epochs, "train: batch_size": train.batch_size, "batch_size": config.batch_size,
              "train: head_epochs": train.head_epochs, "train: head_batch_size": train.head_batch_size,
              "train: log_every": train.log_every}  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    for name, value in (("learning_rate", train.learning_rate), ("head_learning_rate", train.head_learning_rate)):
        if not value > 0:
            raise InputError(f"train: {name} must be positive, got {value}")
    for name, value in (("weight_decay", train.weight_decay), ("max_grad_norm", train.max_grad_norm),
                        ("checkpoint_every", train.checkpoint_every)):  # fmt: skip
        # A negative norm to clip to would turn every step around.
        if not value >= 0:
            raise InputError(f"train: {name} must be at least 0 (0 for none), got {value}")
    if not 0 <= train.seed < 2**32:
        raise InputError(f"train: seed must be between 0 and 2^32 - 1, got {train.seed}")
    if not 0.0 <= train.warmup <= 1.0:
        raise InputError(f"train: warmup is a share of all steps, in [0, 1], got {train.warmup}")


def check_crop(name: str, crop: float | None) -> None:
    """Raise `InputError` for a crop that is no share."""
    if crop is not None and not 0.0 < crop <= 1.0:
        raise InputError(f"{name} is a share of the short side, in (0, 1], got {crop}")


def _check_held_out(data: ImageDataConfig, task: ImageTaskConfig) -> None:
    """Refuse validation images of the training's own source that are trained on."""
    if task.part != "validation" or _origin(task, "test") != _origin(data, "train"):
        return
    if data.part != "train":
        raise InputError(
            f"task {task.source}: its validation part would be of images that are trained on; give data part: train, "
            f"and holdout: {task.holdout:g}"
        )
    # Both are the beginning of one permutation: the smaller share is a part of the larger.
    if task.holdout > data.holdout:
        raise InputError(
            f"task {task.source}: of its holdout {task.holdout:g} only {data.holdout:g} is held out of the training; "
            "give task and data one holdout"
        )


def _origin(place: ImageDataConfig | ImageTaskConfig, split: str) -> tuple:
    path = Path(place.source).expanduser()
    return (path.resolve(),) if path.exists() else (place.source, place.subset, place.split or split)
