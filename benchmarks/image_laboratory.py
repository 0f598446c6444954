"""How the models of an image experiment are made: flow_finetune.vision's pipeline, one part at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from experiment import ImageSearch
from flow_finetune.config import MethodConfig
from flow_finetune.evaluation_files import EVALUATION_FILE, ITEMS_FILE
from flow_finetune.storage import write_json
from flow_finetune.vision.config import ImageRunConfig, ImageTaskConfig, check_image_run
from flow_finetune.vision.data import is_here
from flow_finetune.vision.pipeline import Prepared, prepare, train_and_evaluate
from records import locked


class ImageLaboratory:
    """The twin of laboratory.LanguageLaboratory; what is called pre-trained is the model with its probed head.

    Vision's pipeline trains and evaluates in one call, so `evaluate` finds nothing left to do.

    Raises:
        InputError: a value of `setup` that is out of range, or validation images that are trained on.
    """

    def __init__(
        self,
        setup: ImageRunConfig,
        search: ImageSearch | None,
        work: Path,
        *,
        check_start: Callable[[dict[str, str]], None] = lambda fingerprints: None,
    ) -> None:
        # Before anything is made; which images are of one source can be seen once the sources are located.
        check_image_run(setup)
        self.setup, self.search, self.work, self.check_start = setup, search, work, check_start
        self._prepared: dict[str, Prepared] = {}

    def make_pretrained(self, directory: Path) -> dict[str, float]:
        """Probe, score and evaluate, with the evaluation copied into `directory`; returns seconds."""
        self._prepared.pop(str(self.work), None)
        prepared, seconds = self._prepare(self.setup, self.work)
        directory.mkdir(parents=True, exist_ok=True)
        for name in (ITEMS_FILE, EVALUATION_FILE):
            shutil.copyfile(prepared.output / "pretrained" / name, directory / name)
        return {"score": seconds}

    def train(self, method: MethodConfig, seed: int, directory: Path) -> None:
        """Train `method` on all training images into `directory`, and evaluate it."""
        prepared, _ = self._prepare(self.setup, self.work)
        self.check_start(prepared.fingerprints)
        train_and_evaluate(prepared, method, directory, dataclasses.replace(self.setup.train, seed=seed))

    def average(self, method: MethodConfig, finetuned: Path, directory: Path) -> None:
        """WiSE-FT of the model in `finetuned`, which stands beside `directory`, and its evaluation."""
        prepared, _ = self._prepare(self.setup, self.work)
        train_and_evaluate(prepared, dataclasses.replace(method, of=finetuned.name), directory)

    def evaluate(self, directory: Path) -> None:
        """Nothing: training and averaging have evaluated."""

    def try_out(self, method: MethodConfig, seed: int, directory: Path) -> float:
        """Train without the validation share of the training images; returns the loss on it, nats an image."""
        holdout, data = self.search.holdout, self.setup.data
        fields = {name: getattr(data, name) for name in ("source", "subset", "image_field", "label_field", "id_field",
                                                         "size", "crop", "limit", "bad_images")}  # fmt: skip
        # A task's own default is another split.
        split = None if is_here(data.source) else data.split or "train"
        task = ImageTaskConfig(
            **fields, split=split, name="validation", role="target", part="validation", holdout=holdout
        )
        train = dataclasses.replace(self.setup.train, epochs=self.search.epochs)
        data = dataclasses.replace(data, part="train", holdout=holdout)
        setup = dataclasses.replace(self.setup, data=data, train=train, tasks=(task,))
        prepared, _ = self._prepare(setup, self.work / "search-setup")
        train_and_evaluate(prepared, method, directory, dataclasses.replace(train, seed=seed))
        evaluation = json.loads((directory / EVALUATION_FILE).read_text())
        return evaluation["tasks"][0]["metrics"]["nats"]["value"]

    def _prepare(self, setup: ImageRunConfig, output: Path) -> tuple[Prepared, float]:
        """What all methods start from, and how many seconds it took: images, features, the probe and the scores."""
        timing = output / "prepared.json"
        with locked(output / "locks/prepare", wait=True):
            if str(output) not in self._prepared:
                started = time.perf_counter()
                self._prepared[str(output)] = prepare(setup, output)
                if not timing.is_file():
                    evaluation = json.loads((output / "pretrained" / EVALUATION_FILE).read_text())
                    evaluating = sum(task["seconds"] for task in evaluation["tasks"])
                    write_json(timing, {"seconds": time.perf_counter() - started - evaluating})
        return self._prepared[str(output)], json.loads(timing.read_text())["seconds"]
