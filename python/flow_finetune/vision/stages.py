"""The three stages of fine-tuning a classifier, as functions of a model and arrays.

0. A new head is trained on the features of the frozen body, which are computed once (batch-norm in eval mode).
1. The whole network is trained with `mean(w * loss)`, the mean over the images of a step. The weights come from the
   losses of stage 0's model: scored once on un-augmented images, or online on the batch that is being trained.
2. The head alone is trained on with the plain loss, on the features of the tuned body, again computed once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

import flow_kernels
from flow_finetune.config import MethodConfig
from flow_finetune.errors import DivergedError, InputError
from flow_finetune.pretrained import averaging_steps, distance_steps, make_copy
from flow_finetune.progress import track
from flow_finetune.vision.config import ImageTrainConfig
from flow_finetune.vision.models import ImageClassifier

# `(normalised images [B, 3, S, S], indices of the images) -> [B] fp32 weights`
WeightsOf = Callable[[Tensor, list[int]], Tensor]
_EPOCH_SEED = 1_000_003


def step_plan(num_images: int, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """The image indices of every step: each epoch a seeded permutation, its last step possibly smaller.

    A last step of one image joins the step before it: batch-norm in train mode has no variance of one value.
    """
    steps = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * _EPOCH_SEED + epoch)
        order = torch.randperm(num_images, generator=generator).tolist()
        parts = [order[i : i + batch_size] for i in range(0, num_images, batch_size)]
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [parts[-2] + parts[-1]]
        steps += parts
    return steps


@torch.no_grad()
def extract_features(classifier: ImageClassifier, pixels: np.ndarray, size: int, batch_size: int) -> Tensor:
    """`[N, D]` fp32 head inputs of `[N, S, S, 3]` uint8 images in eval mode, on the CPU."""
    classifier.eval()
    parts = []
    with track("features", math.ceil(len(pixels) / batch_size)) as tracker:
        for first in range(0, len(pixels), batch_size):
            inputs = classifier.inputs(pixels[first : first + batch_size], size)
            parts.append(classifier.features(inputs).cpu())
            tracker.advance()
    return torch.cat(parts)


@torch.no_grad()
def losses_of(head: nn.Module, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` fp64 losses in nats and `[N]` predicted classes of features, on the CPU."""
    logits = head(features.to(head.weight.device))
    loss = flow_kernels.cross_entropy(logits, labels.to(logits.device), reduction="none")
    return loss.double().cpu(), logits.argmax(1).cpu()


def train_head(classifier: ImageClassifier, features: Tensor, labels: Tensor, config: ImageTrainConfig) -> float:
    """Train the head alone on `[N, D]` features with the plain loss (stages 0 and 2); returns the last epoch's loss.

    AdamW with a cosine schedule; the body is not run, so it stays as it is to the last bit.
    """
    head, device = classifier.head, classifier.device
    features, labels = features.to(device), labels.to(device)
    steps = step_plan(len(labels), config.head_epochs, config.head_batch_size, config.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.head_learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    total = 0.0
    per_epoch = len(steps) // config.head_epochs
    for step, indices in enumerate(steps):
        total = 0.0 if step % per_epoch == 0 else total
        loss = flow_kernels.cross_entropy(head(features[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += float(loss.detach()) * len(indices) / len(labels)
    if not math.isfinite(total):
        raise InputError(f"the head's loss is {total}; lower head_learning_rate")
    return total


def augment(inputs: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Images `[B, 3, S, S]`, half of them mirrored ("flip"), and shifted by up to S/8 with reflected edges too."""
    if kind == "none":
        return inputs
    flipped = torch.rand(len(inputs), generator=generator) < 0.5
    inputs = torch.where(flipped.view(-1, 1, 1, 1).to(inputs.device), inputs.flip(3), inputs)
    if kind == "crop_flip":
        side = inputs.shape[-1]
        border = side // 8
        padded = F.pad(inputs, (border,) * 4, mode="reflect")
        offsets = torch.randint(2 * border + 1, (len(inputs), 2), generator=generator).tolist()
        inputs = torch.stack(
            [image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, offsets, strict=True)]
        )
    return inputs.contiguous(memory_format=torch.channels_last)


def make_optimizer(classifier: ImageClassifier, config: ImageTrainConfig, learning_rate: float):
    """AdamW or SGD (momentum 0.9); weight decay on matrices and filters only."""
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999))


def stage_mode(classifier: ImageClassifier, batch_norm: str) -> None:
    """Train mode, with the batch-norms in eval mode where their statistics are to stay frozen."""
    classifier.train()
    if batch_norm == "eval":
        for norm in classifier.batch_norms().values():
            norm.eval()


class TrainingRecord(Protocol):
    """What `fine_tune` writes to and continues from: `vision.train._Directory`."""

    folder: Path

    def log(self, line: dict) -> None: ...

    def save_checkpoint(self, state: dict) -> None: ...

    def restore(self) -> dict | None: ...


class OnlineWeights:
    """Weights from the frozen model's losses on the very batch that is trained, augmented as it is."""

    def __init__(self, frozen: ImageClassifier, labels: Tensor, weigh: Callable[[Tensor], Tensor]) -> None:
        self._frozen, self._labels, self._weigh = frozen.eval(), labels, weigh
        self.made: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, inputs: Tensor, indices: list[int]) -> Tensor:
        loss = flow_kernels.cross_entropy(self._frozen(inputs), self._labels[indices], reduction="none")
        self.made.append(self._weigh(loss.double().cpu()))
        return self.made[-1].to(inputs.device)


def fine_tune(
    classifier: ImageClassifier, pixels: np.ndarray, labels: Tensor, size: int, weights_of: WeightsOf,
    method: MethodConfig, config: ImageTrainConfig, run: TrainingRecord,
) -> dict:  # fmt: skip
    """Stage 1: train the whole network with `mean(w * loss)`; returns the last log line.

    Args:
        classifier: stage 0's model, changed in place; it ends in eval mode.
        pixels: `[N, S, S, 3]` uint8.
        labels: `[N]` int64.
        size: pixels a side that the network sees.
        weights_of: the weights of a batch.
        method: its penalty, averaging and learning rate.
        run: gets a log line every `config.log_every` steps and a checkpoint every `config.checkpoint_every`, from which
            it continues with the same bits; its folder is for a copy of the weights, if the method asks for one.

    Raises:
        DivergedError: the loss is no finite number.
    """
    # Dropout and stochastic depth draw from the global generator.
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    device = classifier.device
    labels = labels.to(device)
    steps = step_plan(len(labels), config.epochs, config.batch_size, config.seed)
    optimizer = make_optimizer(classifier, config, method.learning_rate or config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * len(steps)), len(steps))
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    copy = make_copy(method, parameters, track_distance=config.track_distance, folder=run.folder)
    averages = averaging_steps(len(steps), method.average_every)
    measured = distance_steps(len(steps), config.log_every, copy, device)
    # Statistics go with the filters, as in WiSE-FT: averaged filters under the others' statistics are another network.
    statistics = [b for norm in classifier.batch_norms().values() for b in norm.buffers() if b.is_floating_point()]
    before = [buffer.clone() for buffer in statistics] if averages else []
    stage_mode(classifier, config.batch_norm)
    line: dict = {}
    num_lines, interval = 0, _Interval()
    # After the copies: what the model is before it is restored is what stage 0 made.
    state, first = run.restore(), 0
    if state is not None:
        classifier.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, line, num_lines = state["step"], state["line"], state["num_lines"]
        interval.losses, interval.weights = ([t.to(device) for t in state[name]] for name in ("losses", "weights"))
        if isinstance(weights_of, OnlineWeights):
            weights_of.made = state["made"]
        generator.set_state(state["augment"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
    with track(f"training {method.name}", len(steps)) as tracker:
        tracker.advance(first)
        for step, indices in enumerate(steps[first:], start=first + 1):
            inputs = augment(classifier.inputs(pixels[indices], size), config.augment, generator)
            weight = weights_of(inputs, indices)
            interval.add(_forward(classifier, inputs), labels[indices], weight)
            if method.penalty != "none":
                copy.add_penalty(method.penalty, method.penalty_strength)
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step in averages:
                copy.average(method.average_share)
                for buffer, start in zip(statistics, before, strict=True):
                    buffer.lerp_(start, method.average_share)
            if step % config.log_every == 0 or step == len(steps):
                line = {
                    "step": step, "epoch": step / len(steps) * config.epochs, **interval.line(step),
                    "grad_norm": float(grad_norm), "learning_rate": learning_rate,
                    "distance": copy.distance() if copy is not None and step in measured else None,
                }  # fmt: skip
                run.log(line)
                num_lines, interval = num_lines + 1, _Interval()
            if config.checkpoint_every and (step % config.checkpoint_every == 0 or step == len(steps)):
                run.save_checkpoint(
                    {
                        "step": step, "line": line, "num_lines": num_lines, "model": classifier.state_dict(),
                        "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                        "losses": interval.losses, "weights": interval.weights,
                        "made": getattr(weights_of, "made", []), "augment": generator.get_state(),
                        "rng": torch.get_rng_state(),
                        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                    }
                )  # fmt: skip
            tracker.advance(note=f"loss {line.get('loss', math.nan):.3f}")
    classifier.eval()
    return line


def _forward(classifier: ImageClassifier, inputs: Tensor) -> Tensor:
    try:
        return classifier(inputs)
    except ValueError as error:
        if len(inputs) > 1:
            raise
        raise InputError(
            f"a step of one image: {error}; use a batch_size of at least 2, or batch_norm: eval"
        ) from error


class _Interval:
    """Backward passes, and their losses and weights since the last log line."""

    def __init__(self) -> None:
        self.losses, self.weights = [], []

    def add(self, logits: Tensor, target: Tensor, weight: Tensor) -> None:
        # Equation: mean over the images of the step, not over the weights, so weights below 1 are a smaller step.
        flow_kernels.cross_entropy(logits, target, sample_weight=weight).backward()
        with torch.no_grad():
            self.losses.append(flow_kernels.cross_entropy(logits, target, reduction="none"))
        self.weights.append(weight)

    def line(self, step: int) -> dict:
        loss, weight = torch.cat(self.losses).double().cpu(), torch.cat(self.weights).double().cpu()
        mean, weighted = float(loss.mean()), float((weight * loss).mean())
        if not (math.isfinite(mean) and math.isfinite(weighted)):
            raise DivergedError(f"the loss is {mean} (weighted {weighted}) at step {step}; lower the learning rate")
        return {
            "loss": mean, "weighted_loss": weighted, "mean_weight": float(weight.mean()),
            "effective_sample_size": float(flow_kernels.effective_sample_size(weight)), "num_targets": len(loss),
        }  # fmt: skip


@contextlib.contextmanager
def source_model(classifier: ImageClassifier, head: nn.Module, batch_norm_state: dict[str, Tensor]):
    """Within the block, the original head and batch-norms stand in the tuned network, as the paper measures forgetting."""
    kept = classifier.head, classifier.batch_norm_state()
    classifier.head = head
    classifier.load_batch_norm_state(batch_norm_state)
    try:
        yield classifier.eval()
    finally:
        classifier.head = kept[0]
        classifier.load_batch_norm_state(kept[1])
