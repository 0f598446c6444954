"""The command line: score, train, evaluate, report, run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.markup import escape

from flow_finetune.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    from_mapping,
    read_yaml,
)
from flow_finetune.errors import InputError
from flow_finetune.options import (
    OPTIMISATION_PANEL,
    WEIGHTING_PANEL,
    Backend,
    BatchSize,
    BatchTokens,
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
from flow_finetune.progress import console, print_table, say
from flow_kernels import BackendUnavailable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fine-tune a language model so that it keeps what it could do: weight every sample by how well the "
    "pre-trained model knows it (FLOW, arXiv 2502.02797).",
)


@contextmanager
def _messages() -> Iterator[None]:
    """What the user can mend becomes a message and exit code 2."""
    try:
        yield
    except (InputError, BackendUnavailable) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@app.command()
def score(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    id_field: IdField = None,
    template: Template = "alpaca",
    max_length: MaxLength = 1024,
    limit: Limit = None,
    split: Split = "train",
    tokens: Annotated[bool, typer.Option("--tokens", help="Keep the loss of every target token as well.")] = False,
    batch_tokens: BatchTokens = 4096,
    revision: Revision = None,
    dtype: Dtype = "float32",
    precision: Precision = "bf16",
    device: Device = "auto",
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Losses of the pre-trained model on every sample of a data set.

    A killed call continues when it is made again, and ends with the same file.

    **Example**

        flow-finetune score -m ./gemma -d train.jsonl --prompt-field question --response-field answer -o scores.parquet
    """
    with _messages():
        from flow_finetune import data as data_module
        from flow_finetune import models, scores

        model_config = ModelConfig(model, revision, dtype, precision, device, backend, trust_remote_code)
        data_config = DataConfig(data, split, prompt_field, response_field, id_field, template, max_length, limit)
        lm, tokenizer = models.load_model(model_config)
        samples = data_module.load_samples(data_config, tokenizer)
        say(f"{data}: {samples.describe()}")
        rate = scores.score(
            lm, tokenizer, samples, output,
            model_config=model_config, batch_tokens=batch_tokens, tokens=tokens, overwrite=overwrite,
        )  # fmt: skip
        tau = scores.read_metadata(output)["temperature"]
        speed = f"{rate:,.0f} tokens/s" if rate else "complete already"
        say(f"{output}: median loss {tau:.4f} nats/token, {speed}")


@app.command()
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
    with _messages():
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


@app.command()
def evaluate(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write evaluation.json and items.parquet to.")
    ],
    perplexity: Annotated[list[Path] | None, typer.Option(help="Text file; may be given again.")] = None,
    qa: Annotated[list[Path] | None, typer.Option(help="Question/answer file: target loss and exact match.")] = None,
    multiple_choice: Annotated[list[Path] | None, typer.Option(help="File with context, choices, answer.")] = None,
    limit: Limit = None,
    num_generate: Annotated[int | None, typer.Option(min=0, help="How many questions are answered in full.")] = None,
    answer_pattern: Annotated[
        str, typer.Option(help="Regular expression; the first group of its last match is the answer.")
    ] = TaskConfig.answer_pattern,
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    template: Template = "alpaca",
    max_length: MaxLength = 1024,
    batch_tokens: BatchTokens = 4096,
    revision: Revision = None,
    dtype: Dtype = "float32",
    precision: Precision = "bf16",
    device: Device = "auto",
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """What a model can do: perplexity, target loss and exact match, multiple-choice accuracy, with standard errors.

    **Example**

        flow-finetune evaluate -m flow --perplexity wikitext.txt --multiple-choice arc_easy.jsonl.gz -o flow-eval
    """
    with _messages():
        from flow_finetune import models
        from flow_finetune.evaluate import evaluate as run_evaluation

        model_config = ModelConfig(model, revision, dtype, precision, device, backend, trust_remote_code)
        common = {"limit": limit, "prompt_field": prompt_field, "response_field": response_field,
                  "template": template, "max_length": max_length, "num_generate": num_generate, "answer_pattern": answer_pattern}  # fmt: skip
        tasks = [
            TaskConfig(kind, str(path), role=role, **common)
            for kind, role, paths in (
                ("perplexity", "retained", perplexity), ("qa", "target", qa),
                ("multiple_choice", "retained", multiple_choice),
            )
            for path in paths or []
        ]  # fmt: skip
        if not tasks:
            raise InputError("nothing to evaluate; give --perplexity, --qa or --multiple-choice")
        lm, tokenizer = models.load_model(model_config)
        result = run_evaluation(
            lm, tokenizer, tasks, output,
            batch_tokens=batch_tokens, precision=precision, source=model, overwrite=overwrite,
        )  # fmt: skip
        for task in result["tasks"]:
            for metric, found in task["metrics"].items():
                say(f"{task['name']} {metric}: {found['value']:.4f} ± {found['standard_error']:.4f}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of evaluated models, the pre-trained one among them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write report.md and its plots to.")],
    scores: Annotated[Path | None, typer.Option(help="Score file, for the histogram and the extreme samples.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run that others are compared with; the standard one otherwise.")
    ] = None,
) -> None:
    """One Markdown page with plots: what was learned against what was kept.

    **Example**

        flow-finetune report runs/pretrained runs/standard runs/flow --scores runs/scores.parquet -o runs/report
    """
    with _messages():
        from flow_finetune.report import write_report

        say(f"report: {write_report(runs, output, scores=scores, baseline=baseline)}")


@app.command()
def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for everything.")],
    config: Annotated[Path | None, typer.Argument(help="YAML file; the options below take precedence.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub id, local directory or .gguf file.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Training data.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="Field that holds the prompt.")] = None,
    response_field: Annotated[str | None, typer.Option(help="Field that holds the response.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="standard, flow or flow-token; may be given again.")] = None,
    perplexity: Annotated[list[Path] | None, typer.Option(help="Text file, retained.")] = None,
    qa: Annotated[list[Path] | None, typer.Option(help="Question/answer file, the target.")] = None,
    multiple_choice: Annotated[
        list[Path] | None, typer.Option(help="File with context, choices, answer; retained.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the samples.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any entry of the file, as in --set train.batch_size=32.")
    ] = None,
) -> None:
    """Score, train with each method, evaluate, report: all of it, from one file or from options.

    A killed call continues when it is made again.

    **Examples**

        flow-finetune run experiment.yaml -o runs/experiment

        flow-finetune run -m ./gemma -d train.jsonl --method standard --method flow --perplexity wiki.txt -o runs/a
    """
    with _messages():
        from flow_finetune.methods import named_method
        from flow_finetune.pipeline import run as run_pipeline
        from flow_finetune.pipeline import run_directories
        from flow_finetune.report import summary_table

        mapping = {} if config is None else read_yaml(config)
        fields = {"prompt_field": prompt_field, "response_field": response_field}
        for name, value in (
            ("model.source", model), ("data.source", data), ("train.learning_rate", learning_rate),
            ("train.epochs", epochs), ("train.seed", seed), *((f"data.{k}", v) for k, v in fields.items()),
        ):  # fmt: skip
            if value is not None:
                _set(mapping, name, value)
        if method:
            mapping["methods"] = [dataclasses.asdict(named_method(name)) for name in method]
        given = {k: v for k, v in fields.items() if v is not None}
        tasks = [
            {"kind": kind, "source": str(path), "role": role, **(given if kind == "qa" else {})}
            for kind, role, paths in (
                ("perplexity", "retained", perplexity), ("qa", "target", qa),
                ("multiple_choice", "retained", multiple_choice),
            )
            for path in paths or []
        ]  # fmt: skip
        if tasks:
            mapping["tasks"] = tasks
        for assignment in set_ or []:
            name, equals, value = assignment.partition("=")
            if not equals:
                raise InputError(f"--set takes name=value, got {assignment!r}")
            _set(mapping, name, yaml.safe_load(value))
        run_config = from_mapping(RunConfig, mapping, str(config) if config else "the command line")
        path = run_pipeline(run_config, output)
        print_table(summary_table(run_directories(run_config, output)))
        say(f"report: {path}")


def _set(mapping: dict, dotted: str, value: object) -> None:
    *parents, name = dotted.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise InputError(f"{dotted}: {parent} is not a mapping")
    mapping[name] = value


def main() -> None:
    """Entry point of `flow-finetune`."""
    app()


if __name__ == "__main__":
    main()
