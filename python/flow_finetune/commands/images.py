"""What `--task image` does in the commands that texts share: its options and its calls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.config import MethodConfig, choose
from flow_finetune.errors import InputError
from flow_finetune.progress import say

IMAGE_PANEL = "Images"

TaskKind = Annotated[
    str,
    typer.Option("--task", help="language, or image: classifiers and labelled images.", rich_help_panel=IMAGE_PANEL),
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="--task image: pixels a side; the model's own otherwise.", rich_help_panel=IMAGE_PANEL),
]
ImageCrop = Annotated[
    float | None,
    typer.Option(
        help="--task image: side of the central square that is seen, as a share of the short side; what the model's "
        "training saw, mostly 1, otherwise.",
        rich_help_panel=IMAGE_PANEL,
    ),
]
Optimizer = Annotated[
    str | None, typer.Option(help="--task image: adamw, or sgd with momentum 0.9.", rich_help_panel=IMAGE_PANEL)
]
Augment = Annotated[
    str | None,
    typer.Option(help="--task image: flip (when not given), crop_flip or none.", rich_help_panel=IMAGE_PANEL),
]
BatchNorm = Annotated[
    str | None,
    typer.Option(
        help="--task image: train (batch statistics; when not given), or eval (frozen ones).",
        rich_help_panel=IMAGE_PANEL,
    ),
]
ImageField = Annotated[
    str, typer.Option(help="--task image: column of the encoded bytes.", rich_help_panel=IMAGE_PANEL)
]
LabelField = Annotated[
    str, typer.Option(help="--task image: column of the class, a number or a name.", rich_help_panel=IMAGE_PANEL)
]
BadImages = Annotated[
    str,
    typer.Option(help="--task image: what does not decode: stop, or skip and say so.", rich_help_panel=IMAGE_PANEL),
]
MatchClasses = Annotated[
    str,
    typer.Option(
        help="--task image: the images' classes with the model's: by name, or number (names differ, one order).",
        rich_help_panel=IMAGE_PANEL,
    ),
]
_OF_IMAGES = {"size", "crop", "images", "source_images", "pretrained", "optimizer", "augment", "batch_norm",
              "image_field", "label_field", "bad_images", "match_classes"}  # fmt: skip
# Options of the shared commands that an image task has a use for.
_USED = _OF_IMAGES | {
    "task", "model", "data", "output", "limit", "split", "subset", "id_field", "revision", "precision", "device", "overwrite",
    "method", "scores", "weights", "temperature", "quantile", "clip_low", "clip_high", "normalize", "keep_easiest",
    "penalty_strength", "penalty_copy", "average_every", "average_share", "epochs", "batch_size", "learning_rate",
    "warmup", "weight_decay", "max_grad_norm", "seed", "log_every", "track_distance", "checkpoint_every",
}  # fmt: skip


def is_image(task: str, context: typer.Context) -> bool:
    """Whether the call is about images; an option that was given and belongs to the other task is refused."""
    image = choose("--task", task, ("language", "image")) == "image"
    for name in context.params:
        if is_given(context, name) and (name not in _USED if image else name in _OF_IMAGES):
            raise InputError(f"--{name.replace('_', '-')} has no meaning with --task {task}")
    return image


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the call names this option itself."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _reading(context: typer.Context) -> dict[str, str]:
    """How images are read: what all three commands take alike."""
    choose("--bad-images", context.params["bad_images"], ("stop", "skip"))
    # The option's default is that of texts.
    split = context.params["split"] if is_given(context, "split") else None
    return {"split": split, **{n: context.params[n] for n in ("image_field", "label_field", "bad_images", "subset")}}


def _run_config(context: typer.Context):
    """The `ImageRunConfig` of the model and the images that a call names."""
    from flow_finetune.vision.config import ImageDataConfig, ImageModelConfig, ImageRunConfig

    given = context.params
    shared = {name: given[name] for name in ("id_field", "size", "crop", "limit")}
    return ImageRunConfig(
        ImageModelConfig(given["model"], given["revision"], given["precision"], given["device"]),
        ImageDataConfig(given["data"], **_reading(context), **shared),
    )


def score_images(context: typer.Context, output: Path, overwrite: bool) -> None:
    """`score --task image`: stage 0's model and its losses, `output/pretrained/model` and `output/scores.parquet`."""
    from flow_finetune.scores import describe_weights, read_metadata
    from flow_finetune.storage import exclusive
    from flow_finetune.vision.pipeline import check_image_run, probe_and_score

    config = _run_config(context)
    check_image_run(config)
    with exclusive(output):
        prepared = probe_and_score(config, output, overwrite=overwrite)
    tau = read_metadata(prepared.scores)["temperature"]
    say(f"{prepared.scores}: median loss {tau:.4f} nats per image")
    say(describe_weights(prepared.scores))


def train_images(
    context: typer.Context, output: Path, scores: Path | None, method: MethodConfig, overwrite: bool
) -> None:
    """`train --task image`: stages 1 and 2 from the model that `score` probed, into `output/model`.

    How to optimise is what the call gives; the rest is `ImageTrainConfig`'s, and not the language task's.
    """
    from flow_finetune.vision.config import ImageTrainConfig
    from flow_finetune.vision.pipeline import PROBE_FILE, check_image_run, probe_and_score
    from flow_finetune.vision.train import check_image_method, train_method

    if scores is None:
        raise InputError("--task image trains from the model that score --task image -o DIR probed; give --scores DIR")
    names = {field.name for field in dataclasses.fields(ImageTrainConfig)} & context.params.keys()
    train = ImageTrainConfig(**{name: context.params[name] for name in sorted(names) if is_given(context, name)})
    config = _run_config(context)
    check_image_method(method)
    check_image_run(dataclasses.replace(config, train=train))
    if not all((scores / name).is_file() for name in (PROBE_FILE, "scores.parquet")):
        raise InputError(f"{scores} is no directory that score --task image -o {scores} has made; make it first")
    # The probe is the one that is there, whatever stage 1's options are: all methods and seeds start from one model.
    # Stage 2 trains the head as stage 0 did.
    probe = json.loads((scores / PROBE_FILE).read_text())
    head = dict(zip(("head_epochs", "head_batch_size", "head_learning_rate"), probe["head"], strict=True))
    config = dataclasses.replace(config, train=ImageTrainConfig(seed=probe["seed"], **head))
    train = dataclasses.replace(train, **head)
    summary = train_method(probe_and_score(config, scores), method, output, train, overwrite=overwrite)
    speed = f", {summary['images_per_second']:,.0f} images/s" if "images_per_second" in summary else ""
    say(
        f"{output / 'model'}: {summary['num_steps']} steps in {summary['seconds']:,.0f} s{speed}, "
        f"mean weight {summary['mean_weight']:.3f}, effective sample size {summary['effective_sample_size']:,.1f}"
    )


def evaluate_images(
    context: typer.Context, model, output: Path, images, source_images, pretrained, size, limit, revision, precision,
    device, overwrite,
) -> None:  # fmt: skip
    """`evaluate --task image`: accuracy and loss, of the pre-trained classes with their own head put back."""
    from flow_finetune.vision.config import ImageModelConfig, ImageTaskConfig, check_crop
    from flow_finetune.vision.data import is_here
    from flow_finetune.vision.evaluate import evaluate_saved

    if source_images and not pretrained:
        raise InputError("--source-images needs --pretrained, the model whose head is put back")
    reading = _reading(context)
    check_crop("--crop", context.params["crop"])
    match = choose("--match-classes", context.params["match_classes"], ("name", "number"))
    # One --split is for the hub's of the sources, where another is a folder here; a folder alone refuses it.
    both = [str(path) for path in (*(images or ()), *(source_images or ()))]
    of_the_hub = {"split": None, "subset": None} if len({is_here(path) for path in both}) > 1 else {}
    shared = {"limit": limit, "match_classes": match, "crop": context.params["crop"]}
    tasks = [
        ImageTaskConfig(str(path), role=role, **{**reading, **(of_the_hub if is_here(str(path)) else {})}, **shared)
        for role, paths in (("target", images), ("retained", source_images))
        for path in paths or []
    ]
    if not tasks:
        raise InputError("nothing to evaluate; give --images or --source-images")
    # A tuned model is a directory; the revision is then of the one that it was tuned from.
    is_tuned = pretrained is not None and Path(model).expanduser().is_dir()
    revisions = (None, revision) if is_tuned else (revision, None)
    result = evaluate_saved(
        ImageModelConfig(model, revisions[0], precision, device), tasks, output,
        pretrained=None if pretrained is None else ImageModelConfig(pretrained, revisions[1], precision, device),
        size=size, overwrite=overwrite,
    )  # fmt: skip
    for task in result["tasks"]:
        accuracy, nats = task["metrics"]["accuracy"], task["metrics"]["nats"]
        say(
            f"{task['name']}: accuracy {100 * accuracy['value']:.2f} ± {100 * (accuracy['standard_error'] or 0):.2f} %, "
            f"loss {nats['value']:.4f} nats"
        )
