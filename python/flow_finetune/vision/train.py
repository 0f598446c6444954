"""One method from the probed model to a saved one: stage 1, stage 2, log and summary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import flow_kernels
from flow_finetune.config import MethodConfig, non_defaults
from flow_finetune.errors import DivergedError, InputError
from flow_finetune.methods import make_weights, needs_scores, temperature_of, weigh
from flow_finetune.progress import say
from flow_finetune.storage import (
    SUMMARY_FILE,
    DirectoryLock,
    atomic_path,
    behind_link,
    differences,
    disk_space_errors,
    is_used,
    refuse_own_source,
    require_disk_space,
    require_same_run,
    used_error,
    write_json,
)
from flow_finetune.vision.config import ImageTrainConfig
from flow_finetune.vision.models import ImageClassifier, save_classifier
from flow_finetune.vision.scores import read_scores
from flow_finetune.vision.stages import OnlineWeights, extract_features, fine_tune, losses_of, train_head

if TYPE_CHECKING:
    from flow_finetune.vision.pipeline import Prepared


def check_image_method(method: MethodConfig) -> None:
    """Raise `InputError` for what has no meaning with images."""
    if method.weights == "token":
        raise InputError(f"method {method.name}: an image has one loss; use weights: sequence (one weight per image)")
    if method.online_copy != "same":
        raise InputError(
            f"method {method.name}: the frozen model of an image run is kept in full; leave out online_copy"
        )
    if method.train == "lora":
        raise InputError(f"method {method.name}: LoRA is for language models; use train: all or head with task: image")
    if method.train == "head":
        used = [n for n in ("weights", "keep_easiest", "penalty", "average_every", "learning_rate")
                if getattr(method, n) not in (None, "none")]  # fmt: skip
        if used:
            raise InputError(
                f"method {method.name}: the linear probe of an image run is stage 0 with the plain loss, so "
                f"{', '.join(used)} would have no effect; use weights: none and train: head alone"
            )


class _Directory:
    """DIR/model, DIR/train/{identity,summary}.json, DIR/train/log.jsonl and DIR/train/checkpoint.pt of one method.

    No other process works in DIR from `open` to `close`.
    """

    def __init__(self, path: Path, identity: dict) -> None:
        self.path, self._identity = behind_link(Path(path)), json.loads(json.dumps(identity))
        self._train = self.path / "train"
        self._lock = DirectoryLock()
        self._started, self._earlier = time.perf_counter(), 0.0

    def open(self, source: str, *, overwrite: bool = False) -> dict | None:
        """Claim the directory; returns the summary if it is finished already, else leaves only a checkpoint of it.

        `overwrite` leaves nothing of a finished or another training either; an unfinished one is continued. `source` is
        the model that the training starts from.
        """
        identity = self._train / "identity.json"
        if self.path.is_dir():
            self._lock.take(self.path)
        if is_used(self.path):
            if not identity.is_file():
                raise used_error(self.path)
            found, is_finished = json.loads(identity.read_text()), (self._train / "summary.json").is_file()
            if not overwrite:
                require_same_run(self.path, found, self._identity)
                if is_finished:
                    say(f"{self.path} holds this run already, finished")
                    self._checkpoint.unlink(missing_ok=True)  # of a call that was killed before it removed it
                    return json.loads((self._train / "summary.json").read_text())
            # The same command made again continues, also one with --overwrite that was killed.
            is_replaced = overwrite and (is_finished or differences(found, self._identity))
            if is_replaced:
                refuse_own_source(self.path, source)
            if is_replaced or not self._checkpoint.is_file():
                shutil.rmtree(self.path)
        self._train.mkdir(parents=True, exist_ok=True)
        self._lock.take(self.path)  # a new one, where there was none or the old one was removed
        write_json(identity, self._identity)
        return None

    def seconds(self) -> float:
        """Spent on this training, by the calls before a checkpoint too."""
        return self._earlier + time.perf_counter() - self._started

    def close(self) -> None:
        """Let other processes work in the directory."""
        self._lock.release()

    @property
    def folder(self) -> Path:
        """For what training keeps on disk."""
        return self._train

    @property
    def _checkpoint(self) -> Path:
        return self._train / "checkpoint.pt"

    def save_checkpoint(self, state: dict) -> None:
        """Replace the checkpoint by this one of fine-tuning."""
        require_disk_space(self._train, sum(t.nbytes for t in state["model"].values()) * 3)
        with atomic_path(self._checkpoint) as temporary:
            torch.save({**state, "seconds": self.seconds()}, temporary)

    def restore(self) -> dict | None:
        """The checkpoint of an earlier try, to which the log is cut back; None without one."""
        if not self._checkpoint.is_file():
            return None
        # weights_only: a checkpoint cannot run code.
        state = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
        self._earlier, self._started = state["seconds"], time.perf_counter()
        path = self._train / "log.jsonl"
        lines = path.read_text().splitlines()[: state["num_lines"]] if path.is_file() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines))
        say(f"continuing {self.path} after step {state['step']}")
        return state

    def log(self, line: dict) -> None:
        with disk_space_errors(self.path), open(self._train / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, classifier: ImageClassifier, summary: dict) -> dict:
        save_classifier(classifier, self.path / "model")
        write_json(self._train / "summary.json", summary)
        self._checkpoint.unlink(missing_ok=True)
        return summary


def train_method(
    prepared: Prepared, method: MethodConfig, directory: Path, config: ImageTrainConfig, *, overwrite: bool = False
) -> dict:
    """Train `method` from the probed model into `directory/model`; returns the summary, also in `train/summary.json`.

    `train: head` is the linear probe: stage 0's model as it is. `overwrite` replaces another training in `directory`.

    Raises:
        InputError: `directory` holds another training, or (DivergedError) a loss is NaN or infinite.
    """
    identity = {
        "method": non_defaults(method), "train": non_defaults(config), "size": prepared.size,
        "precision": prepared.config.model.precision, "fingerprints": prepared.fingerprints,
    }  # fmt: skip
    run = _Directory(directory, identity)
    # Before the directory is claimed: a method without weights leaves nothing behind.
    check_weights(prepared, method)
    with contextlib.closing(run):
        summary = run.open(prepared.config.model.source, overwrite=overwrite)
        if summary is not None:
            return summary
        classifier = prepared.load(prepared.probed)
        summary = {
            **identity, "method": dataclasses.asdict(method), "train": dataclasses.asdict(config),
            "model": prepared.config.model.source, "num_samples": len(prepared.images.ids), "num_steps": 0,
            "temperature": None, "mean_weight": 1.0, "effective_sample_size": float(len(prepared.images.ids)),
            "final_loss": None,
        }  # fmt: skip
        if method.train == "all":
            summary |= _stages_1_and_2(prepared, method, config, classifier, run)
        summary["seconds"] = run.seconds()
        return run.finish(classifier, summary)


def _stages_1_and_2(
    prepared: Prepared, method: MethodConfig, config: ImageTrainConfig, classifier: ImageClassifier, run: _Directory
) -> dict:
    images, size, labels = prepared.images, prepared.size, torch.from_numpy(prepared.labels)
    weights_of, describe = _weights(prepared, method, labels)
    start = run.seconds()
    last = fine_tune(classifier, images.pixels, labels, size, weights_of, method, config, run)
    rate = len(labels) * config.epochs / (run.seconds() - start)
    features = extract_features(classifier, images.pixels, size, prepared.config.batch_size)
    # The loss that was logged last is of before the last step.
    if not bool(torch.isfinite(losses_of(classifier.head, features, labels)[0]).all()):
        raise DivergedError("the tuned network's losses are NaN or infinite; lower the learning rate")
    head_loss = train_head(classifier, features, labels, config)
    return {
        **describe(), "num_steps": last["step"], "final_loss": last["loss"], "head_loss": head_loss,
        "images_per_second": rate,
    }  # fmt: skip


def check_weights(prepared: Prepared, method: MethodConfig) -> None:
    """Raise `InputError` where the scores give `method` no temperature or no weights."""
    if needs_scores(method) or method.online:
        scores = read_scores(prepared.scores, prepared.images, prepared.fingerprints)
        if method.online and method.temperature is None:
            temperature_of(method, scores.loss)
        make_weights(method, len(prepared.labels), scores)


def _weights(prepared: Prepared, method: MethodConfig, labels: Tensor) -> tuple[Callable, Callable[[], dict]]:
    """The weights of a batch, and after training what the summary says of them."""
    scores = None
    if needs_scores(method) or method.online:
        scores = read_scores(prepared.scores, prepared.images, prepared.fingerprints)
    if method.online:
        tau = method.temperature
        if tau is None:
            tau = temperature_of(method, scores.loss)
        frozen = prepared.load(prepared.probed)
        online = OnlineWeights(frozen, labels.to(frozen.device), lambda losses: weigh(method, losses, tau)[0])

        def describe() -> dict:
            made = torch.cat(online.made).double()
            # Each image was weighted once an epoch: the size is that of one epoch.
            share = float(flow_kernels.effective_sample_size(made)) / len(made)
            return {"temperature": tau, "mean_weight": float(made.mean()), "effective_sample_size": share * len(labels)}

        return online, describe
    weights = make_weights(method, len(labels), scores)
    return lambda inputs, indices: weights.of(indices).to(inputs.device), lambda: {
        "temperature": weights.temperature, "mean_weight": weights.mean,
        "effective_sample_size": weights.effective_sample_size,
    }  # fmt: skip


def wise_ft_method(prepared: Prepared, method: MethodConfig, directory: Path) -> dict:
    """WiSE-FT of the probed model and the finished row `directory.parent / method.of`; returns the summary.

        theta = (1 - alpha) * probed + alpha * fine-tuned      # every parameter and running statistic, the head's too

    Raises:
        InputError: that row is not finished.
    """
    tuned = directory.parent / method.of
    if not (tuned / SUMMARY_FILE).is_file():
        raise InputError(f"method {method.name}: {tuned} is not a finished run; train {method.of} first")
    of = json.loads((tuned / SUMMARY_FILE).read_text())
    identity = {"method": non_defaults(method), "of": of["method"], "train": of["train"],
                "fingerprints": prepared.fingerprints}  # fmt: skip
    run = _Directory(directory, identity)
    with contextlib.closing(run):
        summary = run.open(prepared.config.model.source)
        if summary is not None:
            return summary
        classifier = prepared.load(prepared.probed)
        average_state(classifier, prepared.load(tuned / "model").state_dict(), method.wise_ft)
        summary = {
            **of, **identity, "method": dataclasses.asdict(method), "num_steps": 0, "mean_weight": None,
            "effective_sample_size": None, "temperature": None, "final_loss": None, "head_loss": None,
            "seconds": run.seconds(),
        }  # fmt: skip
        return run.finish(classifier, summary)


@torch.no_grad()
def average_state(classifier: ImageClassifier, tuned: dict[str, Tensor], alpha: float) -> None:
    """Replace every floating entry of the state by `(1 - alpha) * itself + alpha * tuned`; counters become tuned's."""
    for name, tensor in classifier.state_dict().items():
        if tensor.shape != tuned[name].shape:
            raise InputError(
                f"{name} has shapes {tuple(tensor.shape)} and {tuple(tuned[name].shape)}; nothing to average"
            )
        if tensor.is_floating_point():
            tensor.mul_(1.0 - alpha).add_(tuned[name], alpha=alpha)
        else:
            tensor.copy_(tuned[name])
