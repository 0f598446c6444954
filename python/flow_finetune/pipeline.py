"""The whole path in one directory: score, train with each method, evaluate every model, report.

    DIR/run.json          what the run is; another one is refused here
    DIR/pretrained/       the pre-trained model's evaluation (and the model, where it came as GGUF)
    DIR/scores.parquet    its losses on the training samples
    DIR/<method>/         a fine-tuned model, its log and its evaluation
    DIR/report/report.md

A run that was killed continues: finished parts are not made again.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from collections import Counter
from pathlib import Path

from flow_finetune.config import MethodConfig, ModelConfig, RunConfig
from flow_finetune.data import SampleSet, load_samples
from flow_finetune.errors import InputError
from flow_finetune.evaluate import evaluate
from flow_finetune.methods import needs_scores
from flow_finetune.models import load_model, save_model
from flow_finetune.progress import say
from flow_finetune.report import write_report
from flow_finetune.scores import score
from flow_finetune.storage import write_json
from flow_finetune.tasks import prepare
from flow_finetune.train import train

_RESERVED = ("pretrained", "report")


def run(config: RunConfig, output: Path) -> Path:
    """Do everything `config` asks for in `output`; returns the path of the report.

    Raises:
        InputError: the directory holds another run, or any part's own reason.
    """
    _check(config)
    _claim(config, output)
    pretrained = output / "pretrained"
    base = _base_model(config.model, pretrained)
    samples = _score_and_evaluate(config, base, pretrained, output / "scores.parquet")
    for method in config.methods:
        say(f"method {method.name}")
        _train_and_evaluate(config, base, samples, method, output)
    return write_report(run_directories(config, output), output / "report", scores=_scores_path(config, output))


def run_directories(config: RunConfig, output: Path) -> list[Path]:
    """The directories that a report on this run is made from, the pre-trained model's first."""
    return [output / "pretrained", *(output / method.name for method in config.methods)]


def _scores_path(config: RunConfig, output: Path) -> Path | None:
    return output / "scores.parquet" if any(needs_scores(m) for m in config.methods) else None


def _check(config: RunConfig) -> None:
    if not config.tasks:
        raise InputError("a run needs at least one evaluation task, or its report would show nothing")
    for method in config.methods:
        if not re.fullmatch(r"[A-Za-z0-9._+-]+", method.name) or method.name in _RESERVED:
            raise InputError(f"method name {method.name!r} must be a plain directory name other than {_RESERVED}")
    for kind, names in (("method", [m.name for m in config.methods]), ("task", [t.name for t in config.tasks])):
        repeated = [name for name, count in Counter(names).items() if count > 1 and name is not None]
        if repeated:
            raise InputError(f"two {kind}s are named {repeated[0]!r}; give them different names")


def _claim(config: RunConfig, output: Path) -> None:
    identity = json.loads(json.dumps(dataclasses.asdict(config)))
    path = output / "run.json"
    if path.is_file():
        found = json.loads(path.read_text())
        different = [name for name in identity if found.get(name) != identity[name]]
        if different:
            raise InputError(
                f"{output} holds another run (its {', '.join(different)} differ); choose another directory"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is used by something else; choose an empty or new directory")
    else:
        write_json(path, identity)


def _base_model(config: ModelConfig, pretrained: Path) -> ModelConfig:
    """The model that everything starts from: a GGUF file is read once and kept as safetensors, which load in a second."""
    if not config.source.endswith(".gguf"):
        return config
    directory = pretrained / "model"
    if not directory.is_dir():
        say(f"reading {config.source}")
        lm, tokenizer = load_model(config)
        save_model(lm.model, tokenizer, directory)
    return dataclasses.replace(config, source=str(directory))


def _score_and_evaluate(config: RunConfig, base: ModelConfig, pretrained: Path, scores: Path) -> SampleSet:
    lm, tokenizer = load_model(base)
    samples = load_samples(config.data, tokenizer)
    # Before anything is trained: an evaluation file that cannot be used is found now.
    prepare(config.tasks, tokenizer)
    say(f"{config.data.source}: {samples.describe()}")
    if _scores_path(config, scores.parent) is not None:
        tokens = any(method.weights == "token" for method in config.methods)
        score(lm, tokenizer, samples, scores, model_config=base, batch_tokens=config.batch_tokens, tokens=tokens)
    if not (pretrained / "evaluation.json").is_file():
        _evaluate(config, lm, tokenizer, pretrained, base.source)
    return samples


def _train_and_evaluate(
    config: RunConfig, base: ModelConfig, samples: SampleSet, method: MethodConfig, output: Path
) -> None:
    directory = output / method.name
    lm, tokenizer = load_model(base)
    train(
        lm, tokenizer, samples, directory, method=method, config=config.train, model_config=base,
        scores=output / "scores.parquet" if needs_scores(method) else None,
    )  # fmt: skip
    # What is measured is what was saved, not what is still in memory.
    del lm
    gc.collect()
    if not (directory / "evaluation.json").is_file():
        lm, tokenizer = load_model(dataclasses.replace(base, source=str(directory)))
        _evaluate(config, lm, tokenizer, directory, str(directory))


def _evaluate(config: RunConfig, lm, tokenizer, directory: Path, source: str) -> None:
    evaluate(
        lm, tokenizer, config.tasks, directory,
        batch_tokens=config.batch_tokens, precision=config.model.precision, source=source,
    )  # fmt: skip
