"""The lean training loop: weighted loss, whole-step normalisation, and a run that continues where it was killed.

One optimiser step minimises `sum_i w_i sum_t nll_it / (number of target tokens of the step)`, over all micro-batches
and processes, as in the FLOW paper; the count is known from the data before the first forward pass, so nothing is
synchronised for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from flow_finetune.adapters import prepare_parameters
from flow_finetune.batches import token_batches
from flow_finetune.checkpoint import TrainDirectory
from flow_finetune.config import MethodConfig, ModelConfig, TrainConfig
from flow_finetune.data import PAD_ID, Sample, SampleSet, collate
from flow_finetune.errors import DivergedError
from flow_finetune.methods import Weights, make_weights, needs_scores, temperature_of
from flow_finetune.models import CausalLM, autocast, save_model
from flow_finetune.online import FrozenModel, OnlineWeights
from flow_finetune.packing import packs_texts
from flow_finetune.pretrained import averaging_steps, distance_steps, make_copy
from flow_finetune.processes import make_accelerator
from flow_finetune.progress import say, track
from flow_finetune.scores import read_scores, scoring_fingerprints
from flow_finetune.storage import fingerprint
from flow_finetune.train_checks import (
    check_dtype,
    check_grad_filter,
    check_gradient_checkpointing,
    check_scores,
    check_train,
    warn_of_lost_updates,
)


def step_plan(num_samples: int, config: TrainConfig) -> list[list[int]]:
    """The sample indices of every optimiser step: each epoch a seeded permutation, its last step possibly smaller."""
    steps = []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(num_samples, generator=generator).tolist()
        steps += [order[i : i + config.batch_size] for i in range(0, num_samples, config.batch_size)]
    return steps


def micro_batches(
    indices: list[int], samples: list[Sample], rank: int, world_size: int, max_tokens: int, *, packed: bool = False
) -> list[list[int]]:
    """This process's share of a step, in `token_batches`; empty if there are more processes than samples."""
    share = indices[rank::world_size]
    lengths = [len(samples[i].input_ids) for i in share]
    return [[share[k] for k in group] for group in token_batches(lengths, max_tokens, packed=packed)]


class Meter:
    """Sums over the steps since the last log line, and the costs of the whole run."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of training, earlier parts of a continued run included
        self.tokens = 0
        self._started = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.loss_sum = self.weighted_sum = 0.0
        # Target tokens of the steps, and of this process's share those whose loss is known: their weight is not 0.
        self.num_targets = self.num_weighted = self.interval_tokens = 0
        self.weights: list[Tensor] = []
        self._interval_started = time.perf_counter()

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict:
        """What a continued run adds to; on the CPU, as other processes may get it, who have GPUs of their own."""
        return {
            "seconds": self.elapsed(), "tokens": self.tokens, "loss_sum": torch.as_tensor(self.loss_sum).cpu(),
            "weighted_sum": torch.as_tensor(self.weighted_sum).cpu(), "num_targets": self.num_targets,
            "num_weighted": self.num_weighted, "weights": self.weights,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """The counterpart of `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)

    def interval_rate(self) -> float:
        return self.interval_tokens / max(time.perf_counter() - self._interval_started, 1e-9)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU it trains on, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where nothing else keeps training from working

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_optimizer(lm: CausalLM, config: TrainConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) are not decayed."""
    parameters = [p for p in lm.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)


def train(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: SampleSet,
    output: Path,
    *,
    method: MethodConfig,
    config: TrainConfig,
    model_config: ModelConfig,
    scores: Path | None = None,
    overwrite: bool = False,
) -> dict:
    """Fine-tune `lm` with one method and save a directory that transformers loads; returns the summary it wrote.

    A directory that holds an unfinished run of the same configuration is continued from its last checkpoint and ends
    with the same weights as an undisturbed run; a finished one is left alone.

    Raises:
        InputError: the directory is used by something else, scores are missing or of another model or data set, the
            disk is too small, or (DivergedError) the loss becomes NaN.
    """
    check_train(config, method)
    lm.check_length(max(len(s.input_ids) for s in samples.samples), "a sample")
    accelerator = make_accelerator(lm.head.weight.device)
    fingerprints = scoring_fingerprints(lm, tokenizer, samples)
    check_scores(method, scores)
    check_dtype(method, model_config.dtype, model_config.precision)
    check_grad_filter(config, lm.backend, lm.head.weight.device.type)
    check_gradient_checkpointing(config, method, lm)
    found = None
    if needs_scores(method) or (method.online and scores is not None):
        found = read_scores(scores, samples, fingerprints, tokens=method.weights == "token")
    weights = make_weights(method, len(samples.samples), found)
    # Of online weights: the score file's temperature, where there is a file.
    asks_file = method.online and found is not None and method.temperature is None
    temperature = temperature_of(method, found.loss) if asks_file else None
    values = [] if not needs_scores(method) else weights.per_token or [weights.per_sample]
    identity = {
        "method": method,
        "train": config,
        # Scores of another precision, backend or batch have the same fingerprints and other weights.
        **({"scores": fingerprint(value.numpy().tobytes() for value in values)} if values else {}),
        **({"temperature": temperature} if temperature is not None else {}),
        "precision": {
            "dtype": model_config.dtype,
            "precision": model_config.precision,
            **({"compile": True} if model_config.compile else {}),
            **({} if model_config.packing else {"packing": False}),
        },
        "fingerprints": fingerprints,
    }
    directory = TrainDirectory(output, identity, accelerator)
    with contextlib.closing(directory):
        summary = directory.open(
            lm, overwrite=overwrite, source=model_config.source,
            checkpoint_bytes=_checkpoint_bytes(lm, method) if config.checkpoint_every else 0,
        )  # fmt: skip
        if summary is not None:
            say(f"{output} holds this run already, finished")
            return summary
        if needs_scores(method):
            num_weights = len(samples.samples) if weights.per_token is None else sum(map(len, weights.per_token))
            say(
                f"{method.name}: mean weight {weights.mean:.3f}, effective sample size {weights.effective_sample_size:,.1f} of "
                f"{num_weights:,}"
            )
        last, meter, weights = _optimise(
            lm, samples, weights, directory, accelerator, method, config, model_config, temperature
        )
        if accelerator.is_main_process:
            save_model(lm.model, tokenizer, directory.saved)
            summary = {
                **identity,
                "method": dataclasses.asdict(method),
                "train": dataclasses.asdict(config),
                "model": model_config.source,
                "num_steps": len(step_plan(len(samples.samples), config)),
                "num_samples": len(samples.samples),
                "temperature": weights.temperature,
                "mean_weight": weights.mean,
                "effective_sample_size": weights.effective_sample_size,
                "seconds": meter.elapsed(),
                "tokens_per_second": meter.tokens * accelerator.num_processes / max(meter.elapsed(), 1e-9),
                "final_loss": last.get("loss"),
            }
            directory.finish(summary)
        accelerator.wait_for_everyone()
        return directory.read_summary()


def _checkpoint_bytes(lm, method: MethodConfig) -> int:
    """Of what will be trained and two moments of each number; known before adapters are put in."""
    if method.train == "lora":
        linear = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear) and m is not lm.head]
        return 3 * 4 * method.lora_rank * sum(m.in_features + m.out_features for m in linear)
    parameters = lm.head.parameters() if method.train == "head" else lm.parameters()
    return 3 * sum(p.numel() * p.element_size() for p in parameters)


def _optimise(lm, samples, weights, directory, accelerator, method, config, model_config, temperature):
    """Every optimiser step from the last checkpoint on; returns the last log line, the meter and the weights."""
    device = accelerator.device
    lm.to(device).train()
    lm.grad_filter_eps = config.grad_filter_eps
    lm.shares_tied_gradient = True
    torch.manual_seed(config.seed)
    lora = prepare_parameters(lm, method)
    warn_of_lost_updates(lm, method.learning_rate or config.learning_rate)
    if config.gradient_checkpointing and method.train == "head":
        # It would make inputs ask for gradients, and with them the frozen body, forward and backward.
        say("gradient checkpointing is left out: no gradient passes the body where the head alone is trained")
    elif config.gradient_checkpointing:
        # Re-entrant checkpointing gives no gradients where the input has none, as below adapters.
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    tracks_distance = config.track_distance and accelerator.is_main_process
    # Before a checkpoint is loaded: what the model is now is what it was pre-trained to.
    pretrained = make_copy(
        method, [p for p in lm.parameters() if p.requires_grad],
        track_distance=tracks_distance and lora is None, folder=directory.path,
    )  # fmt: skip
    distance = (lora or pretrained).distance if tracks_distance else None
    if method.online:
        frozen = FrozenModel(lm, lora, method.online_copy, model_config.precision)
        weights = OnlineWeights(method, frozen, accelerator, temperature)
    steps = step_plan(len(samples.samples), config)
    averaged = averaging_steps(len(steps), method.average_every)
    measured = distance_steps(len(steps), config.log_every, pretrained, device)
    optimizer = make_optimizer(lm, config, method.learning_rate or config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * len(steps)), len(steps))
    meter = Meter()
    parts = {"optimizer": optimizer, "schedule": schedule, "meter": meter, "weights": weights}
    first = directory.restore(lm, parts)
    if first:
        say(f"continuing {directory.path} after step {first} of {len(steps)}")
    # Only DDP is asked of accelerate: autocast and the schedule stay visible here.
    module = accelerator.prepare(lm)
    last = directory.last_log_line()
    with track(f"training {method.name}", len(steps), visible=accelerator.is_main_process) as tracker:
        tracker.advance(first)
        for step, indices in enumerate(steps[first:], start=first + 1):
            extra = {}
            num_tokens = accumulate_gradients(
                module, samples.samples, indices, weights, accelerator, config, model_config, meter
            )
            if method.penalty != "none":
                extra["penalty"] = pretrained.add_penalty(method.penalty, method.penalty_strength)
            extra["grad_norm"] = torch.nn.utils.clip_grad_norm_(lm.parameters(), config.max_grad_norm or math.inf)
            extra["learning_rate"] = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step in averaged:
                pretrained.average(method.average_share)
            if step % config.log_every == 0 or step == len(steps):
                moved = distance if step in measured else None
                last = _log_line(step, len(steps), config, meter, accelerator, moved, extra)
                if accelerator.is_main_process:
                    directory.log(last)
                meter.reset()
            if config.checkpoint_every and step % config.checkpoint_every == 0 and step < len(steps):
                directory.save_checkpoint(step, lm, parts)
            tracker.advance(1, tokens=num_tokens, note=_loss_note(last))
    if lora is not None:
        lora.merge()
    return last, meter, weights


def accumulate_gradients(
    module, samples, indices, weights: Weights, accelerator, config, model_config, meter: Meter
) -> int:
    """Forward and backward of one optimiser step; returns the number of tokens this process went through."""
    device = accelerator.device
    groups = micro_batches(
        indices, samples, accelerator.process_index, accelerator.num_processes, config.micro_batch_tokens,
        packed=packs_texts(accelerator.unwrap_model(module)),
    )  # fmt: skip
    weights.prepare(samples, indices, groups)
    # A process without a share takes part with a sample of weight 0: the others wait for its gradients.
    is_stand_in = not groups
    groups = groups or [indices[:1]]
    num_targets = sum(samples[i].num_targets for i in indices)
    num_tokens = 0
    for k, group in enumerate(groups):
        batch = collate([samples[i] for i in group], PAD_ID).to(device)
        weight = weights.of(group) * (0.0 if is_stand_in else 1.0)
        meter.num_weighted += num_weighted_targets(weight, [samples[i].num_targets for i in group])
        weight = weight.to(device)
        # The loss is linear in the weights: their gradients are the samples' own losses, so the plain loss of the
        # step comes with the weighted one for free (a weight of exactly 0 skips its sample, and its loss).
        weight.requires_grad_()
        is_last = k == len(groups) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
            with autocast(device, model_config.precision):
                loss = module(batch, weight, num_targets)
            # DDP averages gradients over the processes; the sum over the step is wanted.
            accelerator.backward(loss * accelerator.num_processes)
        meter.weighted_sum = meter.weighted_sum + loss.detach() * num_targets
        meter.loss_sum = meter.loss_sum + weight.grad.sum() * (num_targets / accelerator.num_processes)
        num_tokens += sum(len(samples[i].input_ids) for i in group)
    meter.num_targets += num_targets
    meter.interval_tokens += num_tokens
    meter.tokens += num_tokens
    meter.weights.append(weights.of(indices))
    return num_tokens


def num_weighted_targets(weight: Tensor, num_targets: list[int]) -> int:
    """How many target tokens carry a weight other than 0; `weight` is one per sample, or one per target token."""
    counts = torch.tensor(num_targets) if len(weight) == len(num_targets) else torch.ones(len(weight), dtype=torch.long)
    return int(counts[weight != 0].sum())


def _loss_note(line: dict) -> str:
    loss = line.get("loss")
    return "loss -" if loss is None else f"loss {loss:.3f}"


def _log_line(step, num_steps, config, meter: Meter, accelerator, distance, extra: dict) -> dict:
    # fp32 counts whole numbers exactly up to 16 million, far above the tokens between two log lines.
    sums = [meter.loss_sum, meter.weighted_sum, meter.num_weighted]
    sums = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=accelerator.device) for s in sums])
    loss_sum, weighted_sum, num_weighted = accelerator.reduce(sums, "sum").tolist()
    # Where every sample has weight 0, nothing was computed: no loss, rather than one of 0.
    loss = loss_sum / num_weighted if num_weighted else None
    weighted_loss = weighted_sum / meter.num_targets
    if not math.isfinite(weighted_loss) or (loss is not None and not math.isfinite(loss)):
        raise DivergedError(
            f"the loss is {loss} (weighted {weighted_loss}) at step {step}; lower the learning rate or use "
            "--precision full"
        )
    batch_weights = torch.cat(meter.weights).double()
    square_sum = float(batch_weights.square().sum())
    return {
        "step": step,
        "epoch": step / num_steps * config.epochs,
        "loss": loss,
        "weighted_loss": weighted_loss,
        **{name: float(value) for name, value in extra.items()},
        "tokens_per_second": meter.interval_rate() * accelerator.num_processes,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "mean_weight": float(batch_weights.mean()),
        "effective_sample_size": float(batch_weights.sum()) ** 2 / square_sum if square_sum else 0.0,
        "distance": distance() if distance is not None else None,
        "num_targets": meter.num_targets,
    }
