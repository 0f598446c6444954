"""`flow-finetune run`: the whole path from one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.messages import messages
from flow_finetune.commands.processes import require_one_process
from flow_finetune.config import RunConfig, choose, from_mapping, parse_yaml, read_yaml
from flow_finetune.errors import InputError
from flow_finetune.progress import print_table, say


def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for everything.")],
    config: Annotated[Path | None, typer.Argument(help="YAML file; the options below take precedence.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub id, local directory or .gguf file.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Training data.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="Field that holds the prompt.")] = None,
    response_field: Annotated[str | None, typer.Option(help="Field that holds the response.")] = None,
    choices_field: Annotated[
        str | None, typer.Option(help="Field of the texts, where the response field holds an index.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="As in train --method; may be given again.")] = None,
    perplexity: Annotated[list[Path] | None, typer.Option(help="Text file, retained.")] = None,
    qa: Annotated[list[Path] | None, typer.Option(help="Question/answer file, the target.")] = None,
    multiple_choice: Annotated[
        list[Path] | None, typer.Option(help="File with context, choices, answer; retained.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the samples.")] = None,
    task: Annotated[
        str | None, typer.Option(help="language, or image: classifiers, with the same entry in the file.")
    ] = None,
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
    with messages():
        require_one_process("run")
        from flow_finetune.methods import named_method
        from flow_finetune.report import summary_table
        from flow_finetune.run_directory import run_directories

        mapping = {} if config is None else read_yaml(config)
        if task is not None:
            mapping["task"] = task
        fields = {"prompt_field": prompt_field, "response_field": response_field, "choices_field": choices_field}
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
            _set(mapping, name, parse_yaml(value, f"--set {name}"))
        where = str(config) if config else "the command line"
        if choose("task", mapping.get("task", "language"), ("language", "image")) == "image":
            from flow_finetune.vision.config import read_image_run
            from flow_finetune.vision.pipeline import run as run_pipeline

            run_config = read_image_run(mapping, where)
        else:
            from flow_finetune.pipeline import run as run_pipeline

            mapping.pop("task", None)
            run_config = from_mapping(RunConfig, mapping, where)
        own = [method.name for method in run_config.methods if method.learning_rate]
        if learning_rate is not None and own:
            raise InputError(
                f"--lr would not change {', '.join(own)}, which has a learning_rate of its own; change it there"
            )
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
