"""From an evaluation's file to tokenised samples and the items its metrics are counted over.

Every kind of evaluation is a list of samples whose target tokens are scored; an item owns one sample, or one for each
of its choices.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from flow_finetune.config import DataConfig, TaskConfig, choose
from flow_finetune.data import Sample, load_samples, read_rows, starts_with_bos, text_column
from flow_finetune.errors import InputError
from flow_finetune.storage import fingerprint

KINDS = ("perplexity", "qa", "multiple_choice")


@dataclass(frozen=True)
class Question:
    """One multiple-choice item: its choices are `num_choices` consecutive samples."""

    id: str
    answer: int
    num_bytes: tuple[int, ...]  # UTF-8 length of each choice


@dataclass(frozen=True)
class Task:
    """An evaluation that is ready to be run."""

    name: str
    config: TaskConfig
    samples: list[Sample]
    questions: list[Question] = field(default_factory=list)  # of a multiple-choice task
    num_dropped: int = 0  # samples of a question/answer file that have no target token

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
        kept = (np.asarray([s.start], np.int32).tobytes() + s.input_ids.tobytes() for s in self.samples)
        answers = [f"{q.answer} {q.num_bytes}".encode() for q in self.questions]
        return fingerprint([self.config.kind.encode(), *answers, *kept])


def task_name(config: TaskConfig) -> str:
    """The name given, or the file's name without its endings."""
    return config.name or Path(config.source).name.split(".")[0]


def prepare(configs: Sequence[TaskConfig], tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """Read and tokenise every task, so that bad input is met before any model is run.

    Raises:
        InputError: a file, field or row that cannot be used, or two tasks of one name.
    """
    names = [task_name(config) for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{names.count(name)} evaluations are named {name!r}; give each its own name")
    return [_prepare(config, name, tokenizer) for config, name in zip(configs, names, strict=True)]


def _prepare(config: TaskConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    choose(f"kind of {name}", config.kind, KINDS)
    choose(f"role of {name}", config.role, ("retained", "target"))
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit of {name} must be at least 1, got {config.limit}")
    if config.kind == "perplexity":
        return Task(name, config, _windows(config, tokenizer))
    if config.kind == "multiple_choice":
        return Task(name, config, *_questions(config, tokenizer))
    data = DataConfig(
        source=config.source, prompt_field=config.prompt_field, response_field=config.response_field,
        template=config.template, max_length=config.max_length, limit=config.limit,
    )  # fmt: skip
    loaded = load_samples(data, tokenizer)
    return Task(name, config, loaded.samples, num_dropped=len(loaded.dropped))


def _windows(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Non-overlapping windows of a text; each predicts all of its tokens but the first, which is the BOS if there is one."""
    prefix = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    if config.window < 2:
        raise InputError(f"window of {config.source} must be at least 2 tokens, got {config.window}")
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


def _questions(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Sample], list[Question]]:
    rows = _read_questions(config)
    questions = [
        Question(str(index), answer, tuple(len(c.encode()) for c in choices))
        for index, (_, choices, answer) in enumerate(rows)
    ]
    if not tokenizer.is_fast:
        raise InputError("this tokenizer gives no character offsets, which show where a choice starts; use a fast one")
    pairs = [(f"{index}:{number}", context, choice)
             for index, (context, choices, _) in enumerate(rows) for number, choice in enumerate(choices)]  # fmt: skip
    encoded = tokenizer(
        [context + choice for _, context, choice in pairs],
        add_special_tokens=False, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    bos = starts_with_bos(tokenizer)
    samples = []
    for (id, context, choice), ids, offsets in zip(pairs, encoded.input_ids, encoded.offset_mapping, strict=True):
        # A token that holds the end of the context and the start of the choice is the choice's.
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(context)), len(ids))
        samples.append(_choice_sample(id, context, choice, ids, start, bos, config, tokenizer))
    return samples, questions


def _choice_sample(id, context, choice, ids, start, bos, config, tokenizer) -> Sample:
    if start == len(ids):
        raise InputError(f"{config.source}: choice {id.split(':')[1]} of row {id.split(':')[0]} has no token")
    # Nothing would predict a first token that is a target, so something stands in front of it in any case.
    prefix = []
    if bos or start == 0:
        prefix = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    excess = len(prefix) + len(ids) - config.max_length
    truncated = excess > 0
    if truncated:
        if excess > start or (excess == start and not prefix):
            raise InputError(
                f"{config.source}: choice {id.split(':')[1]} of row {id.split(':')[0]} alone fills "
                f"max_length={config.max_length}; raise it"
            )
        # The end of a context says most about what follows.
        ids, start = ids[excess:], start - excess
    return Sample(id, np.asarray(prefix + ids, dtype=np.int32), len(prefix) + start, context, choice, truncated)


def _read_questions(config: TaskConfig) -> list[tuple[str, list[str], int]]:
    """Context, choices and index of the right one, row by row, each checked."""
    source = config.source
    rows = read_rows(source, limit=config.limit)
    contexts = text_column(rows, "context", source)
    for name in ("choices", "answer"):
        if name not in rows.column_names:
            raise InputError(f"{source} has no field {name!r}; it has {', '.join(rows.column_names)}")
    questions = []
    for index, (context, choices, answer) in enumerate(zip(contexts, rows["choices"], rows["answer"], strict=True)):
        if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
            raise InputError(f"{source}: choices of row {index} must be a list of non-empty texts, got {choices!r:.80}")
        if len(choices) < 2:
            raise InputError(f"{source}: row {index} has {len(choices)} choice; give at least 2 or leave the row out")
        if not isinstance(answer, int | float) or answer not in range(len(choices)):
            raise InputError(
                f"{source}: answer of row {index} is {answer!r}, which is not the index of one of its {len(choices)} "
                "choices; the first is 0"
            )
        questions.append((context, choices, int(answer)))
    return questions
