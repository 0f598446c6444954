"""`flow-finetune train`: one fine-tuning run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.images import (
    Augment,
    BadImages,
    BatchNorm,
    ImageCrop,
    ImageField,
    ImageSize,
    LabelField,
    Optimizer,
    TaskKind,
    is_image,
    train_images,
)
from flow_finetune.commands.messages import messages
from flow_finetune.commands.options import (
    OPTIMISATION_PANEL,
    AverageEvery,
    AverageShare,
    Backend,
    BatchSize,
    ChoicesField,
    ClipHigh,
    ClipLow,
    Compile,
    Data,
    Device,
    Dtype,
    Epochs,
    IdField,
    KeepEasiest,
    Learning,
    Limit,
    LoraAlpha,
    LoraRank,
    MaxLength,
    Method,
    Model,
    Normalize,
    OnlineCopy,
    Overwrite,
    Packing,
    PenaltyCopy,
    PenaltyStrength,
    Precision,
    PromptField,
    Quantile,
    ResponseField,
    Revision,
    Scores,
    Seed,
    Split,
    Subset,
    Temperature,
    Template,
    TrustRemoteCode,
    Weights,
)
from flow_finetune.commands.processes import require_one_process
from flow_finetune.config import DataConfig, MethodConfig, ModelConfig, TrainConfig
from flow_finetune.progress import say


def train(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to save the model to.")],
    method: Method = None,
    scores: Scores = None,
    weights: Weights = None,
    temperature: Temperature = None,
    quantile: Quantile = None,
    clip_low: ClipLow = None,
    clip_high: ClipHigh = None,
    normalize: Normalize = None,
    keep_easiest: KeepEasiest = None,
    online_copy: OnlineCopy = None,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    penalty_strength: PenaltyStrength = None,
    penalty_copy: PenaltyCopy = None,
    average_every: AverageEvery = None,
    average_share: AverageShare = None,
    epochs: Epochs = 2,
    batch_size: BatchSize = 16,
    micro_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Padded tokens of one forward pass.", rich_help_panel=OPTIMISATION_PANEL)
    ] = 4096,
    learning_rate: Learning = 1e-5,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of all steps.", rich_help_panel=OPTIMISATION_PANEL)
    ] = 0.03,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="AdamW's, of matrices.", rich_help_panel=OPTIMISATION_PANEL)
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(min=0, help="Clipping; 0 for none.", rich_help_panel=OPTIMISATION_PANEL)
    ] = 1.0,
    seed: Seed = 0,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps; 0 for no checkpoints.", rich_help_panel=OPTIMISATION_PANEL)
    ] = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps.", rich_help_panel=OPTIMISATION_PANEL)] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=OPTIMISATION_PANEL),
    ] = False,
    track_distance: Annotated[
        bool,
        typer.Option(
            help="Log the distance from the pre-trained weights (keeps a copy).", rich_help_panel=OPTIMISATION_PANEL
        ),
    ] = True,
    grad_filter_eps: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            rich_help_panel=OPTIMISATION_PANEL,
            help="Compiled CPU kernels: leave out of the head's gradients classes below this in all of 1024 rows.",
        ),
    ] = 0.0,
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    choices_field: ChoicesField = None,
    id_field: IdField = None,
    template: Template = "alpaca",
    max_length: MaxLength = 1024,
    limit: Limit = None,
    split: Split = "train",
    subset: Subset = None,
    revision: Revision = None,
    dtype: Dtype = "float32",
    precision: Precision = "bf16",
    device: Device = "auto",
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
    compile: Compile = False,
    packing: Packing = True,
    overwrite: Overwrite = False,
    task: TaskKind = "language",
    size: ImageSize = None,
    crop: ImageCrop = None,
    optimizer: Optimizer = None,
    augment: Augment = None,
    batch_norm: BatchNorm = None,
    image_field: ImageField = "image",
    label_field: LabelField = "label",
    bad_images: BadImages = "stop",
) -> None:
    """Fine-tune with FLOW or another method, into a directory that transformers loads.

    With checkpoints, a killed call continues when it is made again. Several processes: put
    `accelerate launch --no_python` or `torchrun --nproc-per-node N --no-python` in front.
    With `--task image` what is not given has other defaults than those below: `--lr 1e-4 --batch-size 32 --log-every 10`.

    **Examples**

        flow-finetune train -m ./gemma -d train.jsonl --prompt-field question --response-field answer
            --scores scores.parquet --method flow+l2 --lr 1e-5 --checkpoint-every 100 -o flow

        flow-finetune train --task image -m efficientnet-lite0 -d images --scores scored --lr 1e-4 -o flow
    """
    with messages():
        image = is_image(task, context)
        if image:
            require_one_process("train --task image")
        details = {
            "weights": weights, "temperature": temperature, "quantile": quantile, "clip_low": clip_low,
            "clip_high": clip_high, "normalize": normalize, "keep_easiest": keep_easiest, "online_copy": online_copy,
            "lora_rank": lora_rank, "lora_alpha": lora_alpha, "penalty_strength": penalty_strength,
            "penalty_copy": penalty_copy, "average_every": average_every, "average_share": average_share,
        }  # fmt: skip
        method_config = _method_config(method, {k: v for k, v in details.items() if v is not None})
        if image:
            train_images(context, output, scores, method_config, overwrite)
            return
        from flow_finetune import data as data_module
        from flow_finetune import models
        from flow_finetune import train as train_module
        from flow_finetune.methods import needs_scores
        from flow_finetune.train_checks import check_dtype, check_scores, check_train

        model_config = ModelConfig(
            model, revision, dtype, precision, device, backend, trust_remote_code, compile, packing
        )
        data_config = DataConfig(
            data, split, prompt_field, response_field, id_field, template, max_length, limit, subset, choices_field
        )
        config = TrainConfig(
            epochs, batch_size, micro_batch_tokens, learning_rate, warmup, weight_decay, max_grad_norm, seed,
            checkpoint_every, log_every, gradient_checkpointing, track_distance, grad_filter_eps,
        )  # fmt: skip
        check_train(config, method_config)
        check_scores(method_config, scores)
        check_dtype(method_config, dtype, precision)
        if scores is not None and not (needs_scores(method_config) or method_config.online):
            say(f"--scores is not used: method {method_config.name} weights nothing")
        lm, tokenizer = models.load_model(model_config)
        samples = data_module.load_samples(data_config, tokenizer)
        say(f"{data}: {samples.describe()}")
        summary = train_module.train(
            lm, tokenizer, samples, output,
            method=method_config, config=config, model_config=model_config, scores=scores, overwrite=overwrite,
        )  # fmt: skip
        last = "none" if summary["final_loss"] is None else f"{summary['final_loss']:.4f} nats/token"
        say(
            f"{output}: {summary['num_steps']} steps in {summary['seconds']:,.0f} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s, last loss {last}, "
            f"mean weight {summary['mean_weight']:.3f}, effective sample size {summary['effective_sample_size']:,.1f}"
        )


def _method_config(name: str | None, details: dict) -> MethodConfig:
    """The named method with the details given; FLOW, or what the weights alone say, without a name."""
    from flow_finetune.methods import check_method, check_name, named_method

    if name is None:
        weights = details.get("weights", "sequence")
        found = MethodConfig({"none": "standard", "sequence": "flow"}.get(weights, f"flow-{weights}"))
    else:
        found = named_method(name)
    found = dataclasses.replace(found, **details)
    check_method(found)
    if name is not None:
        check_name(found)
    return found
