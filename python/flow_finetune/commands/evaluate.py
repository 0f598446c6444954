"""`flow-finetune evaluate`: what a model can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flow_finetune.commands.images import (
    IMAGE_PANEL,
    BadImages,
    ImageCrop,
    ImageField,
    ImageSize,
    LabelField,
    MatchClasses,
    TaskKind,
    evaluate_images,
    is_given,
    is_image,
)
from flow_finetune.commands.messages import messages
from flow_finetune.commands.options import (
    DATA_PANEL,
    Backend,
    BatchTokens,
    ChoicesField,
    Compile,
    Device,
    Dtype,
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
    TrustRemoteCode,
)
from flow_finetune.commands.processes import require_one_process
from flow_finetune.config import ModelConfig, TaskConfig
from flow_finetune.errors import InputError
from flow_finetune.progress import say


def evaluate(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write evaluation.json and items.parquet to.")
    ],
    perplexity: Annotated[list[Path] | None, typer.Option(help="Text file; may be given again.")] = None,
    qa: Annotated[list[Path] | None, typer.Option(help="Question/answer file: target loss and exact match.")] = None,
    multiple_choice: Annotated[list[Path] | None, typer.Option(help="File with context, choices, answer.")] = None,
    completion: Annotated[
        list[Path] | None, typer.Option(help="File of texts and what follows: loss per byte, all tokens right.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", help="Task of lm-evaluation-harness, by name; may be given again.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory with lm-eval YAML tasks of your own.")] = None,
    run_model_code: Annotated[
        bool,
        typer.Option(
            "--run-model-code", help="Allow lm-eval tasks that run what the model writes (MBPP); use a container."
        ),
    ] = False,
    num_shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved items before each of --qa, --multiple-choice (see --shots) and --lm-eval."),
    ] = None,
    shots: Annotated[
        Path | None, typer.Option(help="File whose first items, of a question's own subject, are the shots.")
    ] = None,
    limit: Limit = None,
    num_generate: Annotated[int | None, typer.Option(min=0, help="How many questions are answered in full.")] = None,
    answer_pattern: Annotated[
        str, typer.Option(help="Regular expression; the first group of its last match is the answer.")
    ] = TaskConfig.answer_pattern,
    prompt_field: PromptField = "prompt",
    response_field: ResponseField = "response",
    choices_field: ChoicesField = None,
    completion_prompt_field: Annotated[
        str, typer.Option(help="Field that holds the text before a completion.", rich_help_panel=DATA_PANEL)
    ] = "prompt",
    completion_response_field: Annotated[
        str, typer.Option(help="Field that holds the completion.", rich_help_panel=DATA_PANEL)
    ] = "response",
    template: Annotated[
        str | None,
        typer.Option(
            help="Of --qa: alpaca, chat (the tokenizer's own) or a text with {prompt}; alpaca without shots, with them "
            "$'Question: {prompt}\\nAnswer:' (in bash, where $'' makes a line break of \\n).",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    max_length: MaxLength = 1024,
    split: Split = "train",
    subset: Subset = None,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens of a window of --perplexity.", rich_help_panel=DATA_PANEL)
    ] = TaskConfig.window,
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
    images: Annotated[
        list[Path] | None,
        typer.Option(help="--task image: labelled images of the new classes.", rich_help_panel=IMAGE_PANEL),
    ] = None,
    source_images: Annotated[
        list[Path] | None,
        typer.Option(help="--task image: of the pre-trained classes, retained.", rich_help_panel=IMAGE_PANEL),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="--task image: the model whose head and batch-norms are put back for --source-images.",
            rich_help_panel=IMAGE_PANEL,
        ),
    ] = None,
    size: ImageSize = None,
    crop: ImageCrop = None,
    image_field: ImageField = "image",
    label_field: LabelField = "label",
    bad_images: BadImages = "stop",
    match_classes: MatchClasses = "name",
) -> None:
    """What a model can do: perplexity, target loss and exact match, multiple-choice accuracy, with standard errors.

    **Examples**

        flow-finetune evaluate -m flow --perplexity wikitext.txt --multiple-choice arc_easy.jsonl.gz -o flow-eval

        flow-finetune evaluate -m flow --multiple-choice mmlu.jsonl.gz --num-shots 5 --shots mmlu_dev.jsonl.gz -o mmlu

        flow-finetune evaluate -m flow --completion mbpp.jsonl.gz --completion-response-field code -o code
    """
    with messages():
        require_one_process("evaluate")
        if is_image(task, context):
            evaluate_images(
                context, model, output, images, source_images, pretrained, size, limit, revision, precision, device,
                overwrite,
            )  # fmt: skip
            return
        from flow_finetune import models
        from flow_finetune.evaluate import evaluate as run_evaluation
        from flow_finetune.evaluation_files import summary_of
        from flow_finetune.tasks import task_names

        model_config = ModelConfig(
            model, revision, dtype, precision, device, backend, trust_remote_code, compile, packing
        )
        longest = {"max_length": max_length}
        chosen = {"split": split, "subset": subset}
        shots_source = None if shots is None else str(shots)
        solved = {"num_shots": num_shots or None, "shots_source": shots_source, **longest}
        answers = {"prompt_field": prompt_field, "response_field": response_field,
                   "choices_field": choices_field, "template": template, **chosen, "num_generate": num_generate,
                   "answer_pattern": answer_pattern, **solved}  # fmt: skip
        completed = {"prompt_field": completion_prompt_field, "response_field": completion_response_field, **chosen,
                     **longest}  # fmt: skip
        harness = {
            "num_shots": num_shots,
            "include_path": None if include_path is None else str(include_path),
            "run_model_code": run_model_code,
            **longest,
        }
        tasks = [
            TaskConfig(kind, str(source), role=role, limit=limit, **options)
            for kind, role, sources, options in (
                ("perplexity", "retained", perplexity, {"window": window}), ("qa", "target", qa, answers),
                ("multiple_choice", "retained", multiple_choice, {**chosen, **solved}),
                ("completion", "retained", completion, completed), ("lm_eval", "retained", lm_eval, harness),
            )
            for source in sources or []
        ]  # fmt: skip
        if not tasks:
            raise InputError(
                "nothing to evaluate; give --perplexity, --qa, --multiple-choice, --completion or --lm-eval"
            )
        _refuse_unused(context, {task.kind for task in tasks})
        task_names(tasks)  # two of one name are met before the model is read
        lm, tokenizer = models.load_model(model_config)
        result = run_evaluation(
            lm, tokenizer, tasks, output,
            batch_tokens=batch_tokens, precision=precision, source=model, overwrite=overwrite,
            summary=summary_of(model),
        )  # fmt: skip
        for task in result["tasks"]:
            for metric, found in task["metrics"].items():
                error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"
                say(f"{task['name']} {metric}: {found['value']:.4f}{error}")


# Options that have another name than those of a task in a file, or that are of one of the kinds that read it.
_KINDS = {
    **dict.fromkeys(("prompt_field", "response_field", "choices_field", "template"), ("qa",)),
    **dict.fromkeys(("completion_prompt_field", "completion_response_field"), ("completion",)),
}
_NAMES = {"shots": "shots_source"}


def _refuse_unused(context: typer.Context, kinds: set[str]) -> None:
    """Raise `InputError` for an option that no task of the call reads: it would change nothing in silence."""
    from flow_finetune.tasks import OPTIONS

    known = set().union(*OPTIONS.values())
    for name in context.params:
        if name in _KINDS:
            used_by = _KINDS[name]
        elif (option := _NAMES.get(name, name)) in known:
            used_by = [kind for kind, options in OPTIONS.items() if option in options]
        else:
            continue
        if is_given(context, name) and kinds.isdisjoint(used_by):
            wanted = " or ".join(f"--{kind.replace('_', '-')}" for kind in used_by)
            raise InputError(f"--{name.replace('_', '-')} has no effect without {wanted}")
