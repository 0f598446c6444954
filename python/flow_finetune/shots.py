"""Solved items in front of each item (few-shot prompts), laid out as lm-evaluation-harness 0.4 does.

Shots are the first rows of their file, for a question with a subject the first of that subject (the harness's sampler
`first_n`, which it uses for MMLU), separated by blank lines; a space stands between question and answer.
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/mmlu/default/_default_template_yaml
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/gsm8k/gsm8k.yaml
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from flow_finetune.config import TaskConfig
from flow_finetune.data import Sample, describe_rows, is_local, read_rows, render_prompts, template_text
from flow_finetune.errors import InputError
from flow_finetune.questions import Row, continuations, read_pairs, read_questions, task_rows

QA_TEMPLATE = "Question: {prompt}\nAnswer:"
# MMLU's first line, which stands once, in front of all shots.
_HEADER = re.compile(r"The following are multiple choice questions \(with answers\) about [^\n]*\n\n")
_BETWEEN = "\n\n"


def check_shots(config: TaskConfig, name: str) -> None:
    """Raise `InputError` where the options for shots contradict each other or the kind of task."""
    if config.num_shots is not None and config.num_shots < 0:
        raise InputError(f"num_shots of {name} must be at least 0, got {config.num_shots}")
    if config.kind == "lm_eval":
        if config.shots_source:
            raise InputError(f"{name} takes its shots from the harness's own task; leave shots_source out")
    elif config.num_shots and config.kind not in ("qa", "multiple_choice"):
        raise InputError(f"num_shots of {name} is for qa, multiple_choice and lm_eval, not for {config.kind}")
    elif config.num_shots and not config.shots_source:
        raise InputError(f"{name} asks for {config.num_shots} shots; give shots_source, the file to read them from")
    elif config.shots_source and not config.num_shots:
        raise InputError(f"{name} has a shots_source; give num_shots as well")


def stop_texts(config: TaskConfig) -> list[str]:
    """What ends an answer that is generated: the beginning of another question (gsm8k.yaml's `until`).

    A model that has not learned to end its answers goes on with questions of its own, whose answers do not count.
    """
    if config.num_shots:
        return [_template(config).partition("{prompt}")[0].strip() or _BETWEEN]
    if config.template == "chat":
        return []
    # What stands right before the prompt, such as "### Instruction:", if it can be told from the text of an answer.
    before = template_text(config.template or "alpaca").partition("{prompt}")[0].strip()
    return [before.splitlines()[-1].strip()] if before.endswith(":") else []


def _template(config: TaskConfig) -> str:
    if config.template == "chat":
        raise InputError("shots are laid out in plain text; give a template with {prompt} instead of 'chat'")
    return template_text(config.template or QA_TEMPLATE)


def answers_after_shots(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Sample], int]:
    """The response of each row after `num_shots` solved rows and its own prompt, without an end-of-sequence token.

    Also returns how many rows were left out because their response is empty.
    """
    template = _template(config)
    prompts, responses = read_pairs(task_rows(config), describe_rows(config), config)
    solved, answers = read_pairs(_shot_rows(config, config.num_shots), config.shots_source, config)
    _check_number(len(solved), config)
    _check_leaks(solved, prompts, config)
    shots = render_prompts(solved, template, tokenizer)
    front = "".join(f"{shot} {answer.strip()}{_BETWEEN}" for shot, answer in zip(shots, answers, strict=True))
    texts = render_prompts(prompts, template, tokenizer)
    pairs = [
        (str(index), front + text, f" {response.strip()}")
        for index, (text, response) in enumerate(zip(texts, responses, strict=True))
        if response.strip()
    ]
    if not pairs:
        raise InputError(f"none of the responses of {config.source} has any text")
    return continuations(pairs, config, tokenizer), len(prompts) - len(pairs)


def questions_after_shots(rows: Sequence[Row], config: TaskConfig) -> list[Row]:
    """Each question with `num_shots` solved ones of its subject between its header, if it has one, and its own text.

    `shots_source` has the fields of a multiple-choice file, or MMLU's: question, choices, answer and subject.
    """
    solved = _shot_rows(config)
    plain = "context" not in solved.column_names
    shots = read_questions(solved, config.shots_source, context_field="question" if plain else "context")
    fronts: dict[tuple, str] = {}
    used, answered = [], []
    for row in rows:
        lettered = _is_lettered(row)
        key = (row.subject, lettered)
        if key not in fronts:
            chosen = _of_subject(shots, row.subject, config)
            solved = [_solved(shot, plain, lettered) for shot in chosen]
            used += [
                _identity(text, shot, lettered or _is_lettered(shot))
                for shot, (text, _) in zip(chosen, solved, strict=True)
            ]
            fronts[key] = "".join(f"{text}{answer}{_BETWEEN}" for text, answer in solved)
        header, text = _split_header(row.context)
        answered.append(replace(row, context=header + fronts[key] + text))
    items = [_identity(_split_header(row.context)[1], row, _is_lettered(row)) for row in rows]
    _check_leaks(used, items, config)
    return answered


def _shot_rows(config: TaskConfig, limit: int | None = None):
    """The rows that shots are read from: of a file, or of the split train of a hub data set."""
    return read_rows(config.shots_source, limit=limit, subset=None if is_local(config.shots_source) else config.subset)


def _of_subject(shots: Sequence[Row], subject: str | None, config: TaskConfig) -> Sequence[Row]:
    by_subject = shots[0].subject is not None
    if by_subject and subject is None:
        raise InputError(
            f"{config.shots_source} holds shots by subject, but {config.source} does not say the subjects of its "
            "questions; add the field 'subject' to it or leave it out of the shots"
        )
    found = [shot for shot in shots if shot.subject == subject] if by_subject else shots
    _check_number(len(found), config, f" of the subject {subject!r}" if by_subject else "")
    return found[: config.num_shots]


def _solved(shot: Row, plain: bool, lettered: bool) -> tuple[str, str]:
    """Text and answer of a shot, laid out as the question it stands in front of."""
    if not plain:
        return _split_header(shot.context)[1], shot.choices[shot.answer]
    question = shot.context.strip()
    if not lettered:
        return QA_TEMPLATE.replace("{prompt}", question), f" {shot.choices[shot.answer].strip()}"
    lines = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, shot.choices, strict=False)]
    return "\n".join([question, *lines, "Answer:"]), f" {string.ascii_uppercase[shot.answer]}"


def _split_header(context: str) -> tuple[str, str]:
    found = _HEADER.match(context)
    end = found.end() if found else 0
    return context[:end], context[end:]


def _is_lettered(row: Row) -> bool:
    """Whether the choices are letters, which the text explains."""
    return row.choices == [f" {letter}" for letter in string.ascii_uppercase[: len(row.choices)]]


def _identity(text: str, row: Row, lettered: bool) -> str:
    """What makes a question the same, so that a shot gives its answer away.

    Its text with the right answer ("Which of these is true?" is asked of many things), its text alone where that has the
    choices in it, its choices where they are all there is.
    """
    if not text:
        return " ".join(sorted(row.choices))
    return text if lettered else f"{text}\n{row.choices[row.answer].strip()}"


def _check_number(found: int, config: TaskConfig, of: str = "") -> None:
    if found < config.num_shots:
        raise InputError(
            f"{config.shots_source} has {found} items{of} to be shots, {config.num_shots} are asked for; lower "
            "num_shots or give another file"
        )


def _content(text: str) -> str:
    """A text without case, spacing and the punctuation of prose; operators and signs make another question."""
    plain = " ".join(re.sub(r"[.,;:!?'\"]", " ", text.casefold()).split())
    return plain or text


def _check_leaks(shots: Iterable[str], items: Iterable[str], config: TaskConfig) -> None:
    """Raise `InputError` if a shot is one of the items, case and punctuation aside: its answer would be read off."""
    rows = {_content(text): row for row, text in enumerate(items)}
    for shot in shots:
        row = rows.get(_content(shot))
        if row is not None:
            raise InputError(
                f"a shot of {config.shots_source} is row {row} of {config.source} ({shot!r:.80}); take shots that are "
                "not evaluated"
            )
