"""How the models of a language experiment are made: flow_finetune's pipeline, one part at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiment import Search
from flow_finetune import pipeline
from flow_finetune.config import DataConfig, MethodConfig, RunConfig, TaskConfig
from flow_finetune.data import read_rows
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import EVALUATION_FILE
from flow_finetune.methods import needs_scores
from flow_finetune.scores import read_metadata
from flow_finetune.storage import atomic_path, write_json
from records import locked


class LanguageLaboratory:
    """Works in one directory; what is there already is not made again, and two processes may share it.

    Args:
        setup: model, data, training and tasks, located on this machine.
        search: how learning rates are chosen.
        work: directory for models, scores and the validation file.
        tokens: keep the losses of tokens as well, for methods with token weights.
        check_start: raises where a training must not start from the model and data with these fingerprints.
    """

    def __init__(
        self,
        setup: RunConfig,
        search: Search | None,
        work: Path,
        *,
        tokens: bool,
        check_start: Callable[[dict[str, str]], None] = lambda fingerprints: None,
    ) -> None:
        self.setup, self.search, self.work, self.tokens, self.check_start = setup, search, work, tokens, check_start

    def make_pretrained(self, directory: Path) -> dict[str, float]:
        """Score the training data and evaluate the pre-trained model into `directory`; returns seconds."""
        _, _, seconds = self._scored(self.setup.data, "scores")
        base = self._base()
        pipeline.evaluate_saved(
            directory, base, self.setup.tasks, batch_tokens=self.setup.batch_tokens, source=base.source
        )
        return {"score": seconds}

    def train(self, method: MethodConfig, seed: int, directory: Path) -> None:
        """Train `method` on the whole training data into `directory`."""
        samples, scores, _ = self._scored(self.setup.data, "scores")
        self.check_start(read_metadata(scores)["fingerprints"])
        self._train(method, dataclasses.replace(self.setup.train, seed=seed), directory, samples, scores)

    def average(self, method: MethodConfig, finetuned: Path, directory: Path) -> None:
        """WiSE-FT of the model in `finetuned` into `directory`."""
        pipeline.average_into(directory, finetuned, self._base(), self.work / "pretrained", method)

    def evaluate(self, directory: Path) -> None:
        """Evaluate the model in `directory` into it."""
        pipeline.evaluate_saved(directory, self._base(), self.setup.tasks, batch_tokens=self.setup.batch_tokens)

    def try_out(self, method: MethodConfig, seed: int, directory: Path) -> float:
        """Train on the search's samples, and return the loss on its validation rows in nats per token."""
        search = self.search
        data = dataclasses.replace(self.setup.data, limit=search.num_samples)
        samples, scores, _ = self._scored(data, "scores-search")
        # Of fewer samples than the cells', so all but the data must agree.
        start = read_metadata(scores)["fingerprints"]
        self.check_start({kind: of for kind, of in start.items() if kind != "data"})
        config = dataclasses.replace(self.setup.train, seed=seed, epochs=search.epochs)
        self._train(method, config, directory, samples, scores)
        task = self._validation(data)
        pipeline.evaluate_saved(directory, self._base(), [task], batch_tokens=self.setup.batch_tokens)
        evaluation = json.loads((directory / EVALUATION_FILE).read_text())
        return evaluation["tasks"][0]["metrics"]["nats_per_token"]["value"]

    def _train(self, method, config, directory, samples, scores) -> None:
        used = scores if needs_scores(method) or method.online else None
        pipeline.train_into(directory, self._base(), samples, method, config, scores=used)

    def _base(self):
        with locked(self.work / "locks/model", wait=True):
            return pipeline.base_model(self.setup.model, self.work / "pretrained")

    def _scored(self, data: DataConfig, name: str):
        """Samples, their score file, and how many seconds the scoring took."""
        with locked(self.work / f"locks/{name}", wait=True):
            base = self._base()
            started = time.perf_counter()
            samples, path = pipeline.score_data(
                base,
                data,
                partial(score_file, self.work, name),
                batch_tokens=self.setup.batch_tokens,
                tokens=self.tokens,
            )
            timing = path.with_suffix(".json")
            if not timing.is_file():
                write_json(timing, {"seconds": time.perf_counter() - started})
        return samples, path, json.loads(timing.read_text())["seconds"]

    def _validation(self, data: DataConfig) -> TaskConfig:
        """The validation rows as a file and a task of their own."""
        first, count = self.search.validation_first, self.search.validation_samples
        path = self.work / f"validation-{first}-{count}.jsonl"
        rows = read_rows(data.source, data.split, first + count, data.subset)
        if len(rows) < first + count:
            raise InputError(f"{data.source} has {len(rows)} rows, too few for the validation rows")
        text = "".join(json.dumps(rows[i]) + "\n" for i in range(first, first + count))
        with locked(self.work / "locks/validation", wait=True):
            # One that is there may be of other data.
            if not path.is_file() or path.read_text() != text:
                with atomic_path(path) as temporary:
                    temporary.write_text(text)
        return TaskConfig(
            kind="qa", source=str(path), name="validation", role="target", num_generate=0, template=data.template,
            prompt_field=data.prompt_field, response_field=data.response_field, choices_field=data.choices_field,
            max_length=data.max_length,
        )  # fmt: skip


def score_file(work: Path, name: str, header: dict[str, dict]) -> Path:
    """Where the scores with this header are or will be.

    Scores of other data, or without the losses of tokens that a row added since needs, stay beside them.
    """
    # What an experiment's directory was begun with, when its name did not say what it holds.
    path = work / f"{name}.parquet"
    if path.is_file():
        found = read_metadata(path)
        if all(found.get(group, {}).get(key) == value for group in header for key, value in header[group].items()):
            return path
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"{name}-{digest}.parquet"


def token_losses_needed(methods: list[MethodConfig]) -> bool:
    """Whether any method weights by the losses of tokens."""
    return any(method.weights == "token" for method in methods)
