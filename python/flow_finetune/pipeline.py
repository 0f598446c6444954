"""The whole path in one directory: score, train with each method, evaluate every model, report.

    DIR/run.json          what the run is; another one is refused here
    DIR/pretrained/       the pre-trained model's evaluation (and the model, where it came as GGUF)
    DIR/scores.parquet    its losses on the training samples
    DIR/<method>/         a fine-tuned model, its log and its evaluation
    DIR/report/report.md

A run that was killed continues: finished parts are not made again. The parts can be called alone, for one model of an
experiment at a time (benchmarks/paper.py): `base_model`, `score_data`, `train_into`, `average_into`, `evaluate_saved`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from flow_finetune.batches import check_batch_tokens
from flow_finetune.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from flow_finetune.data import SampleSet, check_data, load_samples
from flow_finetune.errors import InputError
from flow_finetune.evaluate import evaluate
from flow_finetune.evaluation_files import EVALUATION_FILE, forget_other_evaluation
from flow_finetune.journal import unfinished_header
from flow_finetune.methods import needs_scores
from flow_finetune.models import CausalLM, load_model, resolve_device, save_model
from flow_finetune.plots import require_matplotlib
from flow_finetune.progress import say
from flow_finetune.report import write_report
from flow_finetune.run_directory import check_rows, claim, run_directories
from flow_finetune.scores import read_metadata, score, score_header
from flow_finetune.storage import describe_file, exclusive, is_described, write_json
from flow_finetune.tasks import check_task, prepare
from flow_finetune.train import train
from flow_finetune.train_checks import check_dtype, check_grad_filter, check_gradient_checkpointing, check_train
from flow_finetune.wise_ft import read_headers, wise_ft


def run(config: RunConfig, output: Path) -> Path:
    """Do everything `config` asks for in `output`; returns the path of the report.

    Raises:
        InputError: the directory holds another run, or any part's own reason.
    """
    require_matplotlib()
    config = _with_template(config)
    check_rows(config, [task.name for task in config.tasks])
    check_data(config.data)
    check_batch_tokens(config.batch_tokens)
    for task in config.tasks:
        check_task(task)
    # WiSE-FT rows average a trained row, wherever that stands.
    methods = sorted(config.methods, key=lambda method: method.of is not None)
    for method in methods:
        if method.of is None:
            check_train(config.train, method)
            check_dtype(method, config.model.dtype, config.model.precision)
    check_grad_filter(config.train, config.model.backend, resolve_device(config.model.device).type)
    with exclusive(output):
        claim(config, output)
        pretrained, scores = output / "pretrained", _scores_path(config, output)
        base = base_model(config.model, pretrained)
        samples = _score_and_evaluate(config, base, pretrained, scores)
        for method in methods:
            say(f"method {method.name}")
            directory = output / method.name
            if method.of is not None:
                average_into(directory, output / method.of, base, pretrained, method)
            else:
                # Online weights take their temperature from the scores, whatever other rows there are.
                used = scores if needs_scores(method) or method.online else None
                train_into(directory, base, samples, method, config.train, scores=used)
            evaluate_saved(directory, base, config.tasks, batch_tokens=config.batch_tokens)
        return write_report(run_directories(config, output), output / "report", scores=scores)


def _with_template(config: RunConfig) -> RunConfig:
    """The same with questions of the target asked as they are in training, where their task does not say how."""
    tasks = [
        dataclasses.replace(task, template=config.data.template)
        if (task.kind, task.role) == ("qa", "target") and not (task.template or task.num_shots)
        and config.data.template != DataConfig.template
        else task
        for task in config.tasks
    ]  # fmt: skip
    return dataclasses.replace(config, tasks=tuple(tasks))


def base_model(config: ModelConfig, directory: Path) -> ModelConfig:
    """The model that everything starts from: a GGUF file is read once and kept as safetensors, which load in a second.

    Args:
        config: the model; anything but a GGUF file is returned as it is.
        directory: where `model/` is kept.
    """
    return _saved_model(config, directory) if config.source.endswith(".gguf") else config


def score_data(
    base: ModelConfig,
    data: DataConfig,
    place: Callable[[dict], Path],
    *,
    batch_tokens: int = 4096,
    tokens: bool = False,
) -> tuple[SampleSet, Path]:
    """Score `data` into the `place` for its `score_header`, unless that is done; returns its samples and the file."""
    lm, tokenizer = load_model(base)
    samples = load_samples(data, tokenizer)
    say(f"{data.source}: {samples.describe()}")
    path = place(score_header(lm, tokenizer, samples, base, batch_tokens, tokens))
    score(lm, tokenizer, samples, path, model_config=base, batch_tokens=batch_tokens, tokens=tokens)
    return samples, path


def train_into(
    directory: Path,
    base: ModelConfig,
    samples: SampleSet,
    method: MethodConfig,
    config: TrainConfig,
    *,
    scores: Path | None = None,
) -> dict:
    """Train one method from `base` into `directory`, unless that is done; returns its summary."""
    lm, tokenizer = load_model(base)
    return train(lm, tokenizer, samples, directory, method=method, config=config, model_config=base, scores=scores)


def average_into(directory: Path, finetuned: Path, base: ModelConfig, pretrained: Path, method: MethodConfig) -> None:
    """WiSE-FT: average the model saved in `finetuned` with `base` into `directory`, unless that is done.

    Args:
        pretrained: where `model/` is kept if `base` is not a local directory with tensors named as in `finetuned`.
    """
    source = Path(base.source).expanduser()
    # A directory may name its tensors otherwise than the one that training saved, a tied head twice for example.
    if not source.is_dir() or read_headers(source).keys() != read_headers(finetuned).keys():
        source = Path(_saved_model(base, pretrained).source)
    wise_ft(source, finetuned, method.wise_ft, directory, name=method.name, of=method.of)


def evaluate_saved(
    directory: Path,
    base: ModelConfig,
    tasks: Sequence[TaskConfig],
    *,
    batch_tokens: int = 4096,
    source: str | None = None,
) -> None:
    """Evaluate a saved model into `directory`, unless that is done.

    Args:
        base: in which precision and where the model is run.
        source: the model; the one saved in `directory` when not given.
    """
    # What is measured is what was saved; a model that was trained a moment ago is not to be held beside it.
    gc.collect()
    if (directory / EVALUATION_FILE).is_file():
        return
    # A revision is the base's, on its hub.
    model = _at(base, directory) if source is None else dataclasses.replace(base, source=source)
    lm, tokenizer = load_model(model)
    evaluate(lm, tokenizer, tasks, directory, batch_tokens=batch_tokens, precision=base.precision, source=model.source)


def _check_average(method: MethodConfig, methods: Sequence[MethodConfig], lm: CausalLM) -> None:
    """Raise `InputError` for an average with a model that gets a matrix which the pre-trained one does not have."""
    of = next(m for m in methods if m.name == method.of)
    if of.train == "head" and lm.head.weight is lm.model.get_input_embeddings().weight:
        raise InputError(
            f"method {method.name}: the head of this model is its embeddings' matrix, and {of.name} gives it one of its own, "
            "for which there is none to average with; average another row"
        )


def _scores_path(config: RunConfig, output: Path) -> Path | None:
    """The score file, where a method takes its weights or the temperature of online ones from it."""
    used = [needs_scores(m) or (m.online and m.temperature is None) for m in config.methods]
    return output / "scores.parquet" if any(used) else None


def _saved_model(config: ModelConfig, pretrained: Path) -> ModelConfig:
    directory, mark = pretrained / "model", pretrained / "source.json"
    path = Path(config.source).expanduser()
    if path == directory:
        return config
    if not directory.is_dir():
        say(f"reading {config.source}")
        lm, tokenizer = load_model(config)
        write_json(mark, {"source": path.name, **({"file": describe_file(path)} if path.is_file() else {})})
        save_model(lm.model, tokenizer, directory)
    elif mark.is_file() and not _is_marked(path, json.loads(mark.read_text())):
        raise InputError(f"{directory} was made of another file than {config.source}; choose another directory")
    return _at(config, directory)


def _is_marked(path: Path, mark: dict) -> bool:
    """Whether `mark`, beside a saved model, is of `path`, a file or a hub id."""
    if "file" in mark:
        return path.is_file() and is_described(path, mark["file"])
    # Those of before had a file's size and not its content.
    return mark == {"source": path.name, **({"bytes": path.stat().st_size} if path.is_file() else {})}


def _at(config: ModelConfig, directory: Path) -> ModelConfig:
    """The model in a local directory, held and run as `config` says."""
    return dataclasses.replace(config, source=str(directory), revision=None)


def _score_and_evaluate(config: RunConfig, base: ModelConfig, pretrained: Path, scores: Path | None) -> SampleSet:
    lm, tokenizer = load_model(base)
    for method in config.methods:
        if method.of is None:
            check_gradient_checkpointing(config.train, method, lm)
        else:
            _check_average(method, config.methods, lm)
    samples = load_samples(config.data, tokenizer)
    # Before anything is trained: an evaluation file that cannot be used is found now.
    prepared = prepare(config.tasks, tokenizer)
    say(f"{config.data.source}: {samples.describe()}")
    if scores is not None:
        found = read_metadata(scores) if scores.is_file() else unfinished_header(scores)
        has_tokens = found is not None and found["settings"]["tokens"]
        needs_tokens = any(method.weights == "token" for method in config.methods)
        options = {"model_config": base, "batch_tokens": config.batch_tokens}
        # A method with token weights may have been added to a run since, or taken away.
        if found is not None and needs_tokens and not has_tokens:
            say(f"{scores} has no losses of tokens; scoring again")
            # What was begun is finished: a file of other losses is refused, and nothing that is not of this run is removed.
            score(lm, tokenizer, samples, scores, tokens=False, **options)
            scores.unlink()
        score(lm, tokenizer, samples, scores, tokens=has_tokens or needs_tokens, **options)
    wanted = {task.name: task.fingerprint() for task in prepared}
    for directory in run_directories(config, pretrained.parent):
        forget_other_evaluation(directory, wanted)
    if not (pretrained / EVALUATION_FILE).is_file():
        evaluate(
            lm, tokenizer, config.tasks, pretrained, batch_tokens=config.batch_tokens,
            precision=config.model.precision, source=base.source, prepared=prepared,
        )  # fmt: skip
    return samples
