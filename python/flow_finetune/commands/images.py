"""What `--task image` does in the commands that texts share: its options and its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.config import choose
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
# Options of the shared commands that an image task has a use for.
_USED = {
    "task", "model", "data", "output", "limit", "split", "id_field", "size", "revision", "precision", "device",
    "overwrite", "images", "source_images", "pretrained",
}  # fmt: skip
_OF_IMAGES = {"size", "images", "source_images", "pretrained"}


def is_image(task: str, context: typer.Context) -> bool:
    """Whether the call is about images; an option that was given and belongs to the other task is refused."""
    image = choose("--task", task, ("language", "image")) == "image"
    for name in context.params:
        source = context.get_parameter_source(name)
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and (name not in _USED if image else name in _OF_IMAGES):
            raise InputError(f"--{name.replace('_', '-')} has no meaning with --task {task}")
    return image


def score_images(model, data, output: Path, size, id_field, limit, split, revision, precision, device) -> None:
    """`score --task image`: stage 0's model and its losses, `output/pretrained/model` and `output/scores.parquet`."""
    from flow_finetune.scores import read_metadata
    from flow_finetune.vision.config import ImageDataConfig, ImageModelConfig, ImageRunConfig
    from flow_finetune.vision.pipeline import check_image_run, probe_and_score

    config = ImageRunConfig(
        ImageModelConfig(model, revision, precision, device),
        ImageDataConfig(data, split, id_field=id_field, size=size, limit=limit),
    )
    check_image_run(config)
    prepared = probe_and_score(config, output)
    tau = read_metadata(prepared.scores)["temperature"]
    say(f"{prepared.scores}: median loss {tau:.4f} nats per image")


def evaluate_images(
    model, output: Path, images, source_images, pretrained, size, limit, revision, precision, device, overwrite
) -> None:
    """`evaluate --task image`: accuracy and loss, of the pre-trained classes with their own head put back."""
    from flow_finetune.vision.config import ImageModelConfig, ImageTaskConfig
    from flow_finetune.vision.evaluate import evaluate_saved

    if source_images and not pretrained:
        raise InputError("--source-images needs --pretrained, the model whose head is put back")
    tasks = [
        ImageTaskConfig(str(path), role=role, limit=limit)
        for role, paths in (("target", images), ("retained", source_images))
        for path in paths or []
    ]
    if not tasks:
        raise InputError("nothing to evaluate; give --images or --source-images")
    result = evaluate_saved(
        ImageModelConfig(model, revision, precision, device), tasks, output,
        pretrained=None if pretrained is None else ImageModelConfig(pretrained, None, precision, device),
        size=size, overwrite=overwrite,
    )  # fmt: skip
    for task in result["tasks"]:
        accuracy, nats = task["metrics"]["accuracy"], task["metrics"]["nats"]
        say(
            f"{task['name']}: accuracy {100 * accuracy['value']:.2f} ± {100 * (accuracy['standard_error'] or 0):.2f} %, "
            f"loss {nats['value']:.4f} nats"
        )
