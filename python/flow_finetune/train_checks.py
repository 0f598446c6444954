"""What is refused, or said, before a training begins."""

from __future__ import annotations

from pathlib import Path

import torch

from flow_finetune.config import MethodConfig, TrainConfig
from flow_finetune.errors import InputError
from flow_finetune.methods import check_method, needs_scores
from flow_finetune.models import CausalLM
from flow_finetune.progress import say
from flow_finetune.scores import read_metadata
from flow_kernels import backends


def check_train(config: TrainConfig, method: MethodConfig) -> None:
    """Raise `InputError` for a method that is not trained, or an option out of range."""
    check_method(method)
    if method.of is not None:
        raise InputError(f"method {method.name} averages what {method.of} gave and trains nothing; use wise_ft.wise_ft")
    for name, value in (("epochs", config.epochs), ("batch_size", config.batch_size),
                        ("micro_batch_tokens", config.micro_batch_tokens), ("log_every", config.log_every)):  # fmt: skip
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed must be between 0 and 2^32 - 1, got {config.seed}")
    if config.checkpoint_every < 0:
        raise InputError(f"checkpoint_every must be at least 0 (0 for none), got {config.checkpoint_every}")
    if not 0.0 <= config.warmup <= 1.0:
        raise InputError(f"warmup is a share of all steps, in [0, 1], got {config.warmup}")
    for name, value in (("weight_decay", config.weight_decay), ("max_grad_norm", config.max_grad_norm)):
        # A negative norm to clip to would turn every step around.
        if not value >= 0:
            raise InputError(f"{name} must be at least 0 (0 for none), got {value}")
    if not 0 <= config.grad_filter_eps < 1:
        raise InputError(f"grad_filter_eps must be in [0, 1), got {config.grad_filter_eps}")
    learning_rate = method.learning_rate or config.learning_rate
    if not learning_rate > 0:
        raise InputError(f"learning_rate must be positive, got {learning_rate}")


def check_scores(method: MethodConfig, scores: Path | None) -> None:
    """Raise `InputError` where a score file is needed and missing, or no score file, before anything is loaded."""
    if needs_scores(method) and scores is None:
        raise InputError(
            f"method {method.name} needs the pre-trained model's scores: make them with flow-finetune score and give them "
            "as --scores"
        )
    if scores is not None and (needs_scores(method) or method.online):
        read_metadata(scores)


def check_dtype(method: MethodConfig, dtype: str, precision: str) -> None:
    """Raise `InputError` for fp16 where it loses gradients: AdamW's squares of small ones, and small ones themselves."""
    if dtype == "float16" and precision == "full":
        raise InputError(
            "products in float16 lose the gradients of confident samples, as losses are not scaled; use precision bf16, or "
            "dtype bfloat16 or float32"
        )
    if dtype == "float16" and method.train != "lora":
        raise InputError(
            "parameters in float16 cannot be trained; use dtype float32 (matrix products are in bf16 all the same, unless "
            "precision is full), or LoRA, whose adapters are float32"
        )


@torch.no_grad()
def warn_of_lost_updates(lm: CausalLM, learning_rate: float) -> None:
    """Say which share of bf16 parameters is too large for an update of the size of the learning rate, AdamW's, to count."""
    trained = [p for p in lm.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    if not trained:
        return
    # Half a unit in the last place of a number is at least 2^-9 of it.
    share = sum(int((p.abs() * 2**-9 > learning_rate).sum()) for p in trained) / sum(p.numel() for p in trained)
    if share > 0.01:
        say(
            f"{share:.0%} of the parameters are in bfloat16 and too large for updates of {learning_rate:.1e}, which are "
            "rounded away; use dtype float32 to train them"
        )


def check_gradient_checkpointing(config: TrainConfig, method: MethodConfig, lm: CausalLM) -> None:
    """Raise `InputError` where gradient checkpointing was asked for, would be done, and the model has none."""
    if config.gradient_checkpointing and method.train != "head" and not lm.model.supports_gradient_checkpointing:
        raise InputError(f"{type(lm.model).__name__} does not do gradient checkpointing; leave it out")


def check_grad_filter(config: TrainConfig, backend: str, device_type: str) -> None:
    """Raise `InputError` where leaving small gradients out was asked for and would save nothing."""
    if not config.grad_filter_eps:
        return
    try:
        found = backends.resolve(backend, device_type, operator="linear_cross_entropy_fwd_bwd")
    except ValueError as error:
        raise InputError(str(error)) from error
    if found != "cpu":
        raise InputError(
            f"grad_filter_eps saves nothing with backend {found!r}: only the compiled CPU kernels leave classes out"
        )
