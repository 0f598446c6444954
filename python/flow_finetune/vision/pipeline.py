"""The whole path for images in one directory: probe, score, train with each method, evaluate every model, report.

    DIR/run.json            what the run is; another one is refused here
    DIR/pretrained/model/   the pre-trained body with its new head (stage 0)
    DIR/pretrained/         its evaluation: the new classes, and the pre-trained ones with the original head
    DIR/scores.parquet      its losses on the training images
    DIR/<method>/           a fine-tuned model, its log and its evaluation
    DIR/report/report.md

A run that was killed continues: finished parts are not made again, an unfinished one is started again, or
from `checkpoint_every`'s last checkpoint. The parts can be called alone: `prepare` once, then `train_and_evaluate` for one method and seed at a time.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flow_finetune.config import MethodConfig
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import EVALUATION_FILE, forget_other_evaluation
from flow_finetune.plots import require_matplotlib
from flow_finetune.progress import say
from flow_finetune.report import write_report
from flow_finetune.run_directory import check_rows, claim, run_directories
from flow_finetune.storage import exclusive, is_used, used_error, write_json
from flow_finetune.vision.config import ImageRunConfig, ImageTrainConfig, check_image_run
from flow_finetune.vision.data import ImageSet, align_labels, load_images
from flow_finetune.vision.evaluate import ImageTask, Original, evaluate_classifier, named_tasks, prepare_tasks
from flow_finetune.vision.models import ImageClassifier, classifier_fingerprint, load_classifier, save_classifier
from flow_finetune.vision.scores import write_scores
from flow_finetune.vision.stages import extract_features, losses_of, train_head
from flow_finetune.vision.train import check_image_method, train_method, wise_ft_method

# Says whose probe a directory holds, or is about to.
PROBE_FILE = Path("pretrained") / "probe.json"
# Numbers of classes above which most must have images.
_MAX_ABSENT = 10_000


@dataclass(frozen=True)
class Prepared:
    """What every method of a run starts from."""

    config: ImageRunConfig
    output: Path
    images: ImageSet
    labels: np.ndarray  # [N] int64
    size: int
    crop: float
    tasks: list[ImageTask]
    original: Original
    fingerprints: dict[str, str]

    @property
    def probed(self) -> Path:
        """The directory of stage 0's model."""
        return self.output / "pretrained" / "model"

    @property
    def scores(self) -> Path:
        return self.output / "scores.parquet"

    def load(self, directory: Path) -> ImageClassifier:
        """A model that this run saved."""
        return load_classifier(dataclasses.replace(self.config.model, source=str(directory), revision=None))


def run(config: ImageRunConfig, output: Path) -> Path:
    """Do everything `config` asks for in `output`; returns the path of the report.

    Raises:
        InputError: the directory holds another run, or any part's own reason.
    """
    require_matplotlib()
    check_run(config)
    output = Path(output)
    with exclusive(output):
        claim(config, output)
        prepared = prepare(config, output)
        # WiSE-FT rows average a trained row, wherever that stands.
        for method in sorted(config.methods, key=lambda m: m.of is not None):
            say(f"method {method.name}")
            train_and_evaluate(prepared, method, output / method.name)
        return write_report(run_directories(config, output), output / "report", scores=prepared.scores)


def check_run(config: ImageRunConfig) -> None:
    """Raise `InputError` for anything that can be seen to be wrong before a model is loaded."""
    check_image_run(config)
    check_rows(config, [])
    named_tasks(config.tasks)
    for method in config.methods:
        check_image_method(method)


def prepare(config: ImageRunConfig, output: Path) -> Prepared:
    """`probe_and_score`, and the evaluation of its model.

    What `output` holds already is not made again; it must be of the same model, images and training options.
    """
    prepared = probe_and_score(config, output)
    pretrained = prepared.output / "pretrained"
    _evaluate_saved(prepared, prepared.probed, pretrained)
    return prepared


def probe_and_score(config: ImageRunConfig, output: Path, *, overwrite: bool = False) -> Prepared:
    """Read all images, train the new head on the frozen body (stage 0) and score the training images.

    `overwrite` makes another probe and other scores in place of those that `output` holds.

    Raises:
        InputError: data, tasks or a model that cannot be used, or `output` holds another model's or data's probe.
    """
    output = Path(output)
    classifier = load_classifier(config.model)
    original = Original.of(classifier)
    size = config.data.size or classifier.description.size
    crop = classifier.description.crop if config.data.crop is None else config.data.crop
    images = load_images(config.data, size, crop)
    if len(np.unique(images.labels)) < 2:
        raise InputError(f"{config.data.source}: all images read are of one class; a classifier needs at least 2")
    present = len(np.unique(images.labels))
    if images.num_classes > max(_MAX_ABSENT, 100 * present):
        raise InputError(
            f"{config.data.source}: the largest label is {images.num_classes - 1:,}, of {present} classes with images; number "
            "them from 0, or give their names"
        )
    if present < images.num_classes:
        say(f"{config.data.source}: {images.num_classes - present} of {images.num_classes} classes have no image")
    _check_size(classifier, images, size, config.model.source)
    labels = align_labels(images, images.class_names, images.num_classes)
    # Before anything is trained: an evaluation file that cannot be used is found now.
    tasks = prepare_tasks(config.tasks, original.description, size, crop)
    for task in tasks:
        if task.config.role == "target":
            task.labels(images.class_names, images.num_classes)
    say(f"{config.data.source}: {len(images.ids):,} images of {images.num_classes} classes, {images.num_bad} left out")
    fingerprints = {"images": images.fingerprint}
    prepared = Prepared(config, output, images, labels, size, crop, tasks, original, fingerprints)
    _probe(prepared, classifier, overwrite)
    prepared.fingerprints["model"] = classifier_fingerprint(prepared.load(prepared.probed))
    return prepared


@torch.no_grad()
def _check_size(classifier: ImageClassifier, images: ImageSet, size: int, source: str) -> None:
    try:
        classifier(classifier.inputs(images.pixels[:1], size))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{source} does not run on images of {size} pixels a side: {str(error).partition(chr(10))[0]}; leave out size, "
            f"or give the model's {classifier.description.size}"
        ) from error


def _probe(prepared: Prepared, classifier: ImageClassifier, overwrite: bool) -> None:
    """Stage 0, its model and its scores, unless they are there.

    Whose probe it is, is written first, the scores last: a mark without scores is of a call that was killed.
    """
    train = prepared.config.train
    identity = {
        "images": prepared.images.fingerprint, "size": prepared.size, "crop": prepared.crop,
        "precision": prepared.config.model.precision,
        "model": classifier_fingerprint(classifier), "seed": train.seed,
        "head": [train.head_epochs, train.head_batch_size, train.head_learning_rate],
    }  # fmt: skip
    mark = prepared.output / PROBE_FILE
    if not overwrite and not mark.is_file() and any(is_used(path) for path in (prepared.scores, prepared.probed)):
        raise used_error(prepared.output)
    if not overwrite and mark.is_file() and prepared.scores.is_file():
        # A mark of before does not say the crop; the images' fingerprint is of what was cropped.
        found = {"crop": prepared.crop, **json.loads(mark.read_text())}
        if found == identity:
            return
        differs = ", ".join(name for name in identity if found.get(name) != identity[name])
        raise InputError(
            f"{prepared.output} holds another probe (it differs in {differs}); give the same options, choose another "
            "directory, or score again with --overwrite"
        )
    prepared.scores.unlink(missing_ok=True)
    (mark.parent / EVALUATION_FILE).unlink(missing_ok=True)
    write_json(mark, identity)
    classifier.new_head(prepared.images.num_classes, prepared.images.class_names, train.seed)
    labels = torch.from_numpy(prepared.labels)
    features = extract_features(classifier, prepared.images.pixels, prepared.size, prepared.config.batch_size)
    train_head(classifier, features, labels, train)
    # What is evaluated alone later sees what training saw.
    classifier.description = dataclasses.replace(classifier.description, size=prepared.size, crop=prepared.crop)
    save_classifier(classifier, prepared.probed)
    loss, predicted = losses_of(classifier.head, features, labels)
    fingerprints = {"images": prepared.images.fingerprint, "model": classifier_fingerprint(classifier)}
    write_scores(prepared.scores, prepared.images, prepared.labels, loss, predicted, fingerprints)
    accuracy = float((predicted == labels).double().mean())
    say(f"stage 0: median loss {float(np.median(loss.numpy())):.4f} nats, training accuracy {100 * accuracy:.2f} %")


def train_and_evaluate(
    prepared: Prepared, method: MethodConfig, directory: Path, train: ImageTrainConfig | None = None
) -> dict:
    """Train one method into `directory` and evaluate what was saved; returns the training's summary.

    Args:
        prepared: what `prepare` returned.
        method: a method, or a WiSE-FT row whose `of` names a finished sibling of `directory`.
        directory: a finished one of the same configuration is left alone, an unfinished one is continued.
        train: in place of the run's, for another seed or learning rate.
    """
    train = train or prepared.config.train
    check_image_method(method)
    if method.of is not None:
        summary = wise_ft_method(prepared, method, directory)
    else:
        summary = train_method(prepared, method, directory, train)
    _evaluate_saved(prepared, directory / "model", directory)
    return summary


def _evaluate_saved(prepared: Prepared, model: Path, directory: Path) -> None:
    """Evaluate into `directory` what was saved, not what is still in memory, unless that is done on the same images."""
    wanted = {task.name: task.fingerprint for task in prepared.tasks}
    forget_other_evaluation(directory, wanted, {task.name: task.config.role for task in prepared.tasks})
    if (directory / EVALUATION_FILE).is_file():
        return
    result = evaluate_classifier(
        prepared.load(model), prepared.original, prepared.tasks, directory,
        batch_size=prepared.config.batch_size, source=prepared.config.model.source,
    )  # fmt: skip
    for task in result["tasks"]:
        say(f"{directory.name}: {task['name']} accuracy {100 * task['metrics']['accuracy']['value']:.2f} %")
