"""`flow-finetune score`: losses of the pre-trained model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.images import (
    BadImages,
    ImageCrop,
    ImageField,
    ImageSize,
    LabelField,
    TaskKind,
    is_image,
    score_images,
)
from flow_finetune.commands.messages import messages
from flow_finetune.commands.options import (
    Backend,
    BatchTokens,
    ChoicesField,
    Compile,
    Data,
    Device,
    Dtype,
    IdField,
    Limit,
    MaxLength,
    Model,
    Overwrite,
    Packing,
    Precision,
    PromptField,
    ResponseField,
    Revision,
    Split,
    Subset,
    Template,
    TrustRemoteCode,
)
from flow_finetune.commands.processes import require_one_process
from flow_finetune.config import DataConfig, ModelConfig
from flow_finetune.progress import say


def score(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write; a directory of --task image.")],
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    choices_field: ChoicesField = None,
    id_field: IdField = None,
    template: Template = "alpaca",
    max_length: MaxLength = 1024,
    limit: Limit = None,
    split: Split = "train",
    subset: Subset = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Keep the loss of every target token as well.")] = False,
    batch_tokens: BatchTokens = 4096,
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
    image_field: ImageField = "image",
    label_field: LabelField = "label",
    bad_images: BadImages = "stop",
) -> None:
    """Losses of the pre-trained model on every sample of a data set.

    A killed call continues when it is made again, and ends with the same file. Several processes, which share a file
    system: put `torchrun --nproc-per-node N --no-python` or `accelerate launch --no_python` in front.

    **Example**

        flow-finetune score -m ./gemma -d train.jsonl --prompt-field question --response-field answer -o scores.parquet
    """
    with messages():
        if is_image(task, context):
            require_one_process("score --task image")
            score_images(context, output, overwrite)
            return
        from flow_finetune import data as data_module
        from flow_finetune import models, scores

        model_config = ModelConfig(
            model, revision, dtype, precision, device, backend, trust_remote_code, compile, packing
        )
        data_config = DataConfig(
            data, split, prompt_field, response_field, id_field, template, max_length, limit, subset, choices_field
        )
        lm, tokenizer = models.load_model(model_config)
        samples = data_module.load_samples(data_config, tokenizer)
        say(f"{data}: {samples.describe()}")
        rate = scores.score(
            lm, tokenizer, samples, output,
            model_config=model_config, batch_tokens=batch_tokens, tokens=tokens, overwrite=overwrite,
        )  # fmt: skip
        if os.environ.get("RANK", "0") != "0":
            return  # only the main process has written the file
        tau = scores.read_metadata(output)["temperature"]
        speed = f"{rate:,.0f} tokens/s" if rate else "complete already"
        say(f"{output}: median loss {tau:.4f} nats/token, {speed}")
        say(scores.describe_weights(output))
