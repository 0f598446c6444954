"""Texts whose continuations are scored: the choices of a question, or the one response of a prompt.

Text and continuation are tokenised together; a token that holds the end of the one and the start of the other counts as
the continuation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from flow_finetune.config import TaskConfig
from flow_finetune.data import (
    Sample,
    choice_columns,
    describe_rows,
    read_rows,
    render_prompts,
    responses_of,
    starts_with_bos,
    text_column,
)
from flow_finetune.errors import InputError


@dataclass(frozen=True)
class Question:
    """One multiple-choice item: its choices are as many consecutive samples as `num_bytes` has entries."""

    id: str
    answer: int
    # UTF-8 length of each choice as its file has it, the space that joins it to the context included, which
    # lm-evaluation-harness leaves out: one byte more of each.
    num_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One row of a multiple-choice file."""

    context: str
    choices: list[str]
    answer: int
    subject: str | None = None


def read_questions(rows, source: str, context_field: str = "context", *, with_subjects: bool = True) -> list[Row]:
    """The rows of a multiple-choice file, each checked; the subjects only matter to shots.

    Raises:
        InputError: a field that is not there, choices that are no list of texts, or an answer that is none of them.
    """
    contexts = text_column(rows, context_field, source)
    field = next((name for name in ("subtask", "subject") if name in rows.column_names), None)
    subjects = text_column(rows, field, source) if field and with_subjects else [None] * len(contexts)
    columns = zip(contexts, choice_columns(rows, source, "choices", "answer"), subjects, strict=True)
    return [Row(context, choices, answer, subject) for context, (choices, answer), subject in columns]


def choice_samples(
    rows: Sequence[Row], config: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Sample], list[Question]]:
    """One sample for each choice of each row, and the questions that they belong to."""
    questions = [
        Question(str(index), row.answer, tuple(len(c.encode()) for c in row.choices)) for index, row in enumerate(rows)
    ]
    pairs = [(f"{index}:{number}", row.context, choice)
             for index, row in enumerate(rows) for number, choice in enumerate(row.choices)]  # fmt: skip
    return continuations(pairs, config, tokenizer), questions


def completions(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The response of each row as the continuation of its prompt, without an end-of-sequence token."""
    prompts, responses = read_pairs(task_rows(config), describe_rows(config), config)
    texts = render_prompts(prompts, config.template or "{prompt}", tokenizer)
    for index, response in enumerate(responses):
        if not response:
            raise InputError(f"{config.source}: {config.response_field!r} of row {index} is empty; leave the row out")
    pairs = zip(map(str, range(len(texts))), texts, responses, strict=True)
    return continuations(list(pairs), config, tokenizer)


def task_rows(config: TaskConfig):
    """The rows that a task is evaluated on, as a `datasets.Dataset`."""
    return read_rows(config.source, config.split, config.limit, config.subset)


def read_pairs(rows, source: str, config: TaskConfig) -> tuple[list[str], list[str]]:
    """Prompts and responses of rows, in the fields that `config` names."""
    return text_column(rows, config.prompt_field, source), responses_of(rows, source, config)


def continuations(
    pairs: Sequence[tuple[str, str, str]], config: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """Samples of (id, text, continuation) whose targets are the continuations.

    A text that does not fit into `max_length` loses its beginning, unless solved examples stand there.
    """
    if not tokenizer.is_fast:
        raise InputError("this tokenizer gives no character offsets, which show where a choice starts; use a fast one")
    encoded = tokenizer(
        [context + choice for _, context, choice in pairs],
        add_special_tokens=False, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    bos = starts_with_bos(tokenizer)
    samples = []
    for (id, context, choice), ids, offsets in zip(pairs, encoded.input_ids, encoded.offset_mapping, strict=True):
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(context)), len(ids))
        samples.append(_sample(id, context, choice, ids, start, bos, config, tokenizer))
    return samples


def _sample(id, context, choice, ids, start, bos, config, tokenizer) -> Sample:
    row, _, number = id.partition(":")
    what = f"{config.source}: {f'choice {number}' if number else 'the response'} of row {row}"
    if start == len(ids):
        raise InputError(f"{what} has no token")
    # Nothing would predict a first token that is a target, so something stands in front of it in any case.
    prefix = []
    if bos and start > 0 and ids[0] == tokenizer.bos_token_id:  # a chat template has written it
        ids, start = ids[1:], start - 1
    if bos or start == 0:
        prefix = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    excess = len(prefix) + len(ids) - config.max_length
    truncated = excess > 0
    if truncated:
        if excess > start or (excess == start and not prefix):
            raise InputError(f"{what} alone fills max_length={config.max_length}; raise it")
        if config.num_shots:
            raise InputError(
                f"{what} with its {config.num_shots} shots is {excess + config.max_length} tokens long, more than "
                f"max_length={config.max_length}; raise it or ask for fewer shots"
            )
        # The end of a context says most about what follows.
        ids, start = ids[excess:], start - excess
    return Sample(id, np.asarray(prefix + ids, dtype=np.int32), len(prefix) + start, context, choice, truncated)
