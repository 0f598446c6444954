"""`flow-finetune train`: one fine-tuning run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.messages import messages
from flow_finetune.commands.options import (
    OPTIMISATION_PANEL,
    WEIGHTING_PANEL,
    Backend,
    BatchSize,
    Data,
    Device,
    Dtype,
    Epochs,
    IdField,
    Learning,
    Limit,
    MaxLength,
    Model,
    Overwrite,
    Precision,
    PromptField,
    ResponseField,
    Revision,
    Seed,
    Split,
    Template,
    TrustRemoteCode,
)
from flow_finetune.config import DataConfig, MethodConfig, ModelConfig, TrainConfig
from flow_finetune.progress import say


def train(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to save the model to.")],
    scores: Annotated[
        Path | None, typer.Option(help="Score file of the same model and data.", rich_help_panel=WEIGHTING_PANEL)
    ] = None,
    weights: Annotated[
        str, typer.Option(help="sequence or token (FLOW), or none (standard).", rich_help_panel=WEIGHTING_PANEL)
    ] = "sequence",
    temperature: Annotated[
        float | None,
        typer.Option(help="In nats; the quantile of the losses otherwise.", rich_help_panel=WEIGHTING_PANEL),
    ] = None,
    quantile: Annotated[
        float, typer.Option(min=0, max=1, help="Of the losses; 0.5 is the median.", rich_help_panel=WEIGHTING_PANEL)
    ] = 0.5,
    clip_low: Annotated[float | None, typer.Option(help="Lowest weight.", rich_help_panel=WEIGHTING_PANEL)] = None,
    clip_high: Annotated[float | None, typer.Option(help="Highest weight.", rich_help_panel=WEIGHTING_PANEL)] = None,
    normalize: Annotated[
        str, typer.Option(help="none, mean (weights average 1) or simplex.", rich_help_panel=WEIGHTING_PANEL)
    ] = "none",
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
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    id_field: IdField = None,
    template: Template = "alpaca",
    max_length: MaxLength = 1024,
    limit: Limit = None,
    split: Split = "train",
    revision: Revision = None,
    dtype: Dtype = "float32",
    precision: Precision = "bf16",
    device: Device = "auto",
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Full fine-tuning, standard or FLOW, into a directory that transformers loads.

    With checkpoints, a killed call continues when it is made again. Several processes: put `accelerate launch` or
    `torchrun --nproc-per-node N --no-python` in front.

    **Example**

        flow-finetune train -m ./gemma -d train.jsonl --prompt-field question --response-field answer
            --scores scores.parquet --lr 1e-5 --checkpoint-every 100 -o flow
    """
    with messages():
        from flow_finetune import data as data_module
        from flow_finetune import models
        from flow_finetune import train as train_module

        model_config = ModelConfig(model, revision, dtype, precision, device, backend, trust_remote_code)
        data_config = DataConfig(data, split, prompt_field, response_field, id_field, template, max_length, limit)
        method = MethodConfig(
            "standard" if weights == "none" else f"flow-{weights}",
            weights, temperature, quantile, clip_low, clip_high, normalize,
        )  # fmt: skip
        config = TrainConfig(
            epochs, batch_size, micro_batch_tokens, learning_rate, warmup, weight_decay, max_grad_norm, seed,
            checkpoint_every, log_every, gradient_checkpointing, track_distance,
        )  # fmt: skip
        lm, tokenizer = models.load_model(model_config)
        samples = data_module.load_samples(data_config, tokenizer)
        say(f"{data}: {samples.describe()}")
        summary = train_module.train(
            lm, tokenizer, samples, output,
            method=method, config=config, model_config=model_config, scores=scores, overwrite=overwrite,
        )  # fmt: skip
        say(
            f"{output}: {summary['num_steps']} steps in {summary['seconds']:,.0f} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s, last loss {summary['final_loss']:.4f} nats/token, "
            f"mean weight {summary['mean_weight']:.3f}, effective sample size {summary['effective_sample_size']:,.1f}"
        )
