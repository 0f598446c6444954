"""From an evaluation's file to tokenised samples and the items its metrics are counted over.

Every kind of evaluation is a list of samples whose target tokens are scored; an item owns one sample, or one for each
of its choices.
"""

from __future__ import annotations

import gzip
import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from flow_finetune.config import DataConfig, TaskConfig, choose, non_defaults
from flow_finetune.data import Sample, describe_rows, load_samples, starts_with_bos
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import told_apart
from flow_finetune.generate import compile_answer_pattern, extract_answer
from flow_finetune.harness import HarnessTasks, load_harness
from flow_finetune.progress import say
from flow_finetune.questions import Question, choice_samples, completions, read_questions, task_rows
from flow_finetune.shots import answers_after_shots, check_shots, questions_after_shots, stop_texts
from flow_finetune.storage import fingerprint

_ROWS = {"split", "subset"}
_TEXTS = {*_ROWS, "prompt_field", "response_field", "choices_field", "template", "max_length"}
_SHOTS = {"num_shots", "shots_source", "max_length"}
# What each kind of evaluation reads beside its source, name, role and limit.
OPTIONS = {
    "perplexity": {"window"},
    "qa": {*_TEXTS, *_SHOTS, "max_new_tokens", "num_generate", "answer_pattern"},
    "multiple_choice": {*_ROWS, *_SHOTS},
    "completion": _TEXTS,
    "lm_eval": {"num_shots", "max_length", "include_path", "run_model_code"},
}
KINDS = tuple(OPTIONS)
_OF_ALL = {"kind", "source", "name", "role", "limit"}


@dataclass(frozen=True)
class Task:
    """An evaluation that is ready to be run."""

    name: str
    config: TaskConfig
    samples: list[Sample]
    questions: list[Question] = field(default_factory=list)  # of a multiple-choice task
    num_dropped: int = 0  # samples of a question/answer file that have no target token
    answers: list[str] = field(default_factory=list)  # of the first questions of a qa task: those answered in full
    harness: HarnessTasks | None = None  # of an lm_eval task, which has no samples here

    @property
    def num_items(self) -> int:
        return self.harness.num_items if self.harness else len(self.questions) or len(self.samples)

    @property
    def num_truncated(self) -> int:
        return self.harness.num_truncated if self.harness else sum(s.truncated for s in self.samples)

    def settings(self) -> dict[str, object]:
        """What else decides a metric, and no token that is scored shows: two models are compared only where it agrees."""
        config = self.config
        if self.answers:
            generated = {"answer_pattern": config.answer_pattern, "max_new_tokens": config.max_new_tokens,
                         "num_generate": len(self.answers)}  # fmt: skip
            return {**generated, "until": stop_texts(config)}
        return {"max_length": config.max_length} if config.kind == "lm_eval" else {}

    def groups(self) -> list[list[Sample]]:
        """The samples of each item."""
        first = (
            np.cumsum([0, *(len(q.num_bytes) for q in self.questions)])
            if self.questions
            else range(len(self.samples) + 1)
        )
        return [self.samples[start:end] for start, end in itertools.pairwise(first)]

    def fingerprint(self) -> str:
        """Fingerprint of every token that is scored: two models are compared only where it agrees."""
        if self.harness:
            return fingerprint([self.config.kind.encode(), *self.harness.requests])
        kept = (np.asarray([s.start], np.int32).tobytes() + s.input_ids.tobytes() for s in self.samples)
        answers = [f"{q.answer} {q.num_bytes}".encode() for q in self.questions]
        return fingerprint([self.config.kind.encode(), *answers, *kept])


def task_name(config: TaskConfig) -> str:
    """The name given, or the file's name without its endings."""
    return config.name or Path(config.source).name.split(".")[0] or config.kind


def task_names(configs: Sequence[TaskConfig]) -> list[str]:
    """A name for each task; files of one name have their directory's in front.

    Raises:
        InputError: two tasks of one name all the same.
    """
    plain = [task_name(config) for config in configs]
    names = told_apart(plain, configs)
    for name, given in zip(names, plain, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{names.count(name)} evaluations are named {given!r}; give each its own name")
    return names


def prepare(configs: Sequence[TaskConfig], tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """Read and tokenise every task, so that bad input is met before any model is run.

    Raises:
        InputError: a file, field or row that cannot be used, or two tasks of one name.
    """
    names = task_names(configs)
    tasks = [_prepare(config, name, tokenizer) for config, name in zip(configs, names, strict=True)]
    for task in tasks:
        _say_what_is_lost(task)
    return tasks


def check_task(config: TaskConfig) -> None:
    """Raise `InputError` for an option out of range, or one that this kind of task does not read; nothing is read for it."""
    name = task_name(config)
    choose(f"kind of {name}", config.kind, KINDS)
    choose(f"role of {name}", config.role, ("retained", "target"))
    if not config.source and config.kind != "lm_eval":
        raise InputError(f"evaluation {name!r} lacks its source, the file to evaluate on")
    check_shots(config, name)
    for option in non_defaults(config).keys() - _OF_ALL - OPTIONS[config.kind]:
        raise InputError(
            f"{option} of {name} has no effect on a {config.kind} evaluation, which takes {', '.join(sorted(OPTIONS[config.kind]))}"
        )
    for option, lowest in (("limit", 1), ("num_generate", 0), ("max_new_tokens", 1), ("max_length", 2), ("window", 2)):
        value = getattr(config, option)
        if value is not None and value < lowest:
            raise InputError(f"{option} of {name} must be at least {lowest}, got {value}")


def _prepare(config: TaskConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    check_task(config)
    if config.kind == "lm_eval":
        return Task(name, config, [], harness=load_harness(config))
    if config.kind == "perplexity":
        return Task(name, config, _windows(config, tokenizer))
    if config.kind == "completion":
        return Task(name, config, completions(config, tokenizer))
    if config.kind == "multiple_choice":
        rows = read_questions(task_rows(config), describe_rows(config), with_subjects=bool(config.num_shots))
        rows = questions_after_shots(rows, config) if config.num_shots else rows
        return Task(name, config, *choice_samples(rows, config, tokenizer))
    pattern = compile_answer_pattern(config.answer_pattern, name)
    if config.num_shots:
        samples, num_dropped = answers_after_shots(config, tokenizer)
    else:
        data = DataConfig(
            source=config.source, split=config.split, subset=config.subset, prompt_field=config.prompt_field,
            response_field=config.response_field, choices_field=config.choices_field,
            template=config.template or "alpaca", max_length=config.max_length, limit=config.limit,
        )  # fmt: skip
        loaded = load_samples(data, tokenizer)
        samples, num_dropped = loaded.samples, len(loaded.dropped)
    return Task(name, config, samples, num_dropped=num_dropped, answers=_right_answers(config, pattern, samples))


def _say_what_is_lost(task: Task) -> None:
    # What the harness cuts is known, and said, when it is run.
    truncated = 0 if task.harness else task.num_truncated
    if truncated or task.num_dropped:
        say(
            f"{task.name}: {truncated:,} of {len(task.samples):,} texts truncated to max_length={task.config.max_length}, "
            f"{task.num_dropped:,} items left out, whose prompt fills it or whose response is empty"
        )


def _right_answers(config: TaskConfig, pattern: re.Pattern, samples: Sequence[Sample]) -> list[str]:
    asked = samples[: config.num_generate]
    answers = [extract_answer(s.response, pattern) for s in asked]
    if None in answers:
        raise InputError(
            f"{config.source}: answer_pattern {config.answer_pattern!r} finds no answer in row "
            f"{asked[answers.index(None)].id}; give another answer_pattern, or num_generate: 0 for losses only"
        )
    return answers


def _windows(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Non-overlapping windows of a text; each predicts all of its tokens but the first, which is the BOS if there is one."""
    prefix = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    ids = tokenizer(read_text(config.source), add_special_tokens=False, verbose=False).input_ids
    step = config.window - len(prefix)
    windows = [prefix + ids[first : first + step] for first in range(0, len(ids), step)]
    samples = [
        Sample(str(i), np.asarray(w, dtype=np.int32), 1, "", "", False) for i, w in enumerate(windows) if len(w) > 1
    ]
    if not samples:
        raise InputError(f"{config.source} is too short: it has no token to predict")
    return samples[: config.limit]


def read_text(source: str) -> str:
    """The content of a `.txt` or `.txt.gz` file."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"no such file: {source}")
    if not path.name.endswith((".txt", ".txt.gz")):
        raise InputError(f"{source} is not a text file (.txt or .txt.gz), which a perplexity is measured on")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode()
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{source} could not be read as UTF-8 text: {error}") from error
