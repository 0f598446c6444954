"""From a data set to tokenised samples, and from samples to batches.

A sample is a prompt, wrapped in a template, and a response that ends in the end-of-sequence token, or in what ends a
turn of the tokenizer's chat template. Only the response's tokens are targets.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flow_finetune.chat_template import render_chat
from flow_finetune.config import DataConfig, TaskConfig
from flow_finetune.errors import InputError
from flow_finetune.storage import fingerprint, require_writable

# The instruction template without input field of Stanford Alpaca, which the paper uses.
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TOKENIZE_AT_ONCE = 1000


@dataclass(frozen=True)
class Sample:
    """One tokenised sample: `input_ids[start:]` are its targets, each predicted from the position before."""

    id: str
    input_ids: np.ndarray  # int32
    start: int
    prompt: str
    response: str
    truncated: bool

    @property
    def num_targets(self) -> int:
        return len(self.input_ids) - self.start


@dataclass
class SampleSet:
    """The samples of a data set that have targets, what became of the others, and what they were made of."""

    samples: list[Sample]
    num_read: int
    dropped: list[str]  # ids of samples without any target token
    num_truncated: int
    fingerprints: dict[str, str] = field(default_factory=dict)  # of template and data

    def describe(self) -> str:
        """One line for the user."""
        targets = sum(s.num_targets for s in self.samples)
        return (
            f"{len(self.samples):,} samples with {targets:,} target tokens "
            f"({len(self.dropped):,} of {self.num_read:,} dropped without a target, {self.num_truncated:,} truncated)"
        )


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, and where its targets are."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    positions: Tensor  # [R] int64, flat index of the position that predicts each target
    target: Tensor  # [R] int64
    cu_seqlens: Tensor  # [B + 1] int64, the targets of sample b are [cu_seqlens[b], cu_seqlens[b + 1])
    position_ids: Tensor | None = None  # [1, N] of a packed row (packing.py)

    def to(self, device: torch.device) -> Batch:
        tensors = (getattr(self, name) for name in self.__dataclass_fields__)
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in tensors))


def read_rows(source: str, split: str = "train", limit: int | None = None, subset: str | None = None):
    """The rows of a local JSONL, CSV or Parquet file, or of a hub data set, as a `datasets.Dataset`."""
    import datasets

    path = Path(source).expanduser()
    split = "+".join(part.strip() for part in split.split("+"))
    suffixes = [s for s in path.suffixes if s != ".gz"]
    datasets.disable_progress_bars()
    _require_cache(Path(datasets.config.HF_DATASETS_CACHE))
    try:
        if path.is_file():
            if not suffixes or suffixes[-1] not in _FORMATS:
                raise InputError(f"{source} is none of {', '.join(_FORMATS)} (.gz allowed)")
            for name, value in (("split", None if _of_a_file(split) else split), ("subset", subset)):
                if value is not None:
                    raise InputError(
                        f"{name} {value!r} is of a hub data set; {source} is a file, of which only rows can be chosen, "
                        "as in split 'train[:700]'"
                    )
            if not path.stat().st_size:
                raise InputError(f"{source} is empty")
            options = _csv_as_text(path) if _FORMATS[suffixes[-1]] == "csv" else {}
            # datasets takes a path for a pattern, and what follows :: for another place.
            if "::" in str(path):
                raise InputError(f"{source} has :: in its name, which datasets takes for two places; rename it")
            files = glob.escape(str(path))
            rows = datasets.load_dataset(_FORMATS[suffixes[-1]], data_files=files, split=split, **options)
        elif not path.is_dir() and is_local(source):
            raise InputError(f"no such file: {source}")
        else:
            rows = datasets.load_dataset(source, subset, split=split)
    except InputError:
        raise
    except Exception as error:  # the library raises a different class for every way in which a file can be wrong
        raise InputError(f"{source} could not be read: {_detail(error)}") from error
    if len(rows) == 0:
        raise InputError(f"{source} is empty" if split == DataConfig.split else f"{source} has no rows in {split}")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _require_cache(cache: Path) -> None:
    """Raise `InputError` where `datasets` could not keep what it reads: it does so with local files too."""
    try:
        # What stands for the home directory stays as it is where there is none.
        cache = Path(os.path.expanduser(cache))
        if str(cache).startswith("~"):
            raise InputError(f"{cache} is no place")
        require_writable(cache)
    except (InputError, OSError) as error:
        raise InputError(
            f"the cache of data sets cannot be kept ({error}); set HF_HOME to a directory that can"
        ) from error


def _csv_as_text(path: Path) -> dict:
    """Options under which every field of a CSV file is text: an answer may be "2" or "None"."""
    import datasets
    import pandas

    names = pandas.read_csv(path, nrows=0).columns
    return {
        "features": datasets.Features({name: datasets.Value("string") for name in names}), "keep_default_na": False
    }  # fmt: skip


def describe_rows(config: DataConfig | TaskConfig) -> str:
    """What messages call the rows of `config`, whose numbers are counted in its split."""
    return config.source if config.split == DataConfig.split else f"{config.source} ({config.split})"


def _of_a_file(split: str) -> bool:
    """Whether a split can be a file's, which `datasets` calls "train": the whole, or slices of it."""
    return all(part.partition("[")[0] == DataConfig.split for part in split.split("+"))


def _detail(error: Exception) -> str:
    """The first line of the library's message, and which subsets there are where one has to be named."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Config name is missing") and len(lines) > 1:
        return f"it has several subsets; give one as subset (--subset). {lines[1]}"
    return lines[0]


def is_local(source: str) -> bool:
    """Whether a source must have been meant as a file or folder, by its name: hub ids may hold dots too."""
    path = Path(source).expanduser()
    endings = {*_FORMATS, ".gz", ".tsv", ".txt", ".zip", ".tar", ".arrow", ".xlsx"}
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix.lower() in endings


def text_column(rows, name: str, source: str) -> list[str]:
    """One column of text; anything else in it is an `InputError` that names the row."""
    if name not in rows.column_names:
        raise InputError(f"{source} has no field {name!r}; it has {', '.join(rows.column_names)}")
    values = list(rows[name])
    for index, value in enumerate(values):
        if isinstance(value, datetime):
            raise InputError(
                f"{source}: field {name!r} is taken for dates, because all of it looks like them, and what they were "
                "written as is lost; save the rows as CSV, or as Parquet with text in that field"
            )
        if not isinstance(value, str):
            raise InputError(
                f"{source}: field {name!r} of row {index} is {type(value).__name__} ({value!r:.60}), not text; write "
                "it as text or leave the row out, or name another field (an index into choices takes --choices-field)"
            )
    return values


def choice_columns(rows, source: str, choices: str, answer: str) -> list[tuple[list[str], int]]:
    """The columns of a multiple-choice file: the choices of each row, and the index of the right one.

    Raises:
        InputError: a field that is not there, choices that are no list of texts, or an answer that is none of them.
    """
    for name in (choices, answer):
        if name not in rows.column_names:
            raise InputError(f"{source} has no field {name!r}; it has {', '.join(rows.column_names)}")
    columns = []
    for index, (texts, right) in enumerate(zip(rows[choices], rows[answer], strict=True)):
        if not isinstance(texts, list) or not all(isinstance(c, str) and c for c in texts):
            raise InputError(f"{source}: {choices} of row {index} must be a list of non-empty texts, got {texts!r:.80}")
        if len(texts) < 2:
            raise InputError(f"{source}: row {index} has {len(texts)} choice; give at least 2 or leave the row out")
        if not isinstance(right, int | float) or right not in range(len(texts)):
            raise InputError(
                f"{source}: {answer} of row {index} is {right!r}, which is not the index of one of its {len(texts)} "
                "choices; the first is 0"
            )
        columns.append((texts, int(right)))
    return columns


def responses_of(rows, source: str, config: DataConfig | TaskConfig) -> list[str]:
    """The response of each row: the text in its field, or the choice that the field holds the index of."""
    if config.choices_field is None:
        return text_column(rows, config.response_field, source)
    return [texts[right] for texts, right in choice_columns(rows, source, config.choices_field, config.response_field)]


def render_prompts(prompts: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Wrap every prompt in the template."""
    if template == "chat":
        if tokenizer.chat_template is None:
            raise InputError("this tokenizer has no chat template; use another template, for example alpaca")
        return [render_chat(tokenizer, [{"role": "user", "content": p}], add_generation_prompt=True) for p in prompts]
    text = template_text(template)
    # Not str.format: prompts and templates hold braces of their own.
    return [text.replace("{prompt}", p) for p in prompts]


def template_text(template: str) -> str:
    """The text of a template that is not the tokenizer's own."""
    text = ALPACA_TEMPLATE if template == "alpaca" else template
    if "{prompt}" not in text:
        raise InputError(f"template must be 'alpaca', 'chat' or a text that contains {{prompt}}, got {template!r}")
    return text


def template_fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of how a sample's text is laid out and cut."""
    text = str(tokenizer.chat_template) if config.template == "chat" else template_text(config.template)
    parts = [text.encode(), str(config.max_length).encode()]
    if config.template == "chat" and "strftime_now" in text:
        # It holds the day, and one that is asked for in another way than by a format, which changes.
        parts.append(render_prompts(["qzx prompt qzx"], "chat", tokenizer)[0].encode())
    end = end_of_response(config.template, tokenizer)
    return fingerprint(parts if end == tokenizer.eos_token_id else [*parts, str(end).encode()])


def end_of_response(template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a response ends in: EOS, or the one that ends a turn of a chat template (Gemma's <end_of_turn>)."""
    if template != "chat" or tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    prompt, response = "qzx prompt qzx", "qzx response qzx"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    try:
        rendered = render_chat(tokenizer, turns)
    except Exception:  # one that takes no answers; one that takes no prompts either is met where they are rendered
        return tokenizer.eos_token_id
    between, after = rendered.partition(prompt)[2].partition(response)[::2]
    between_ids, after_ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (between, after))
    # What ends prompts too, and not what closes a part of an answer (Command R's <|END_RESPONSE|>); or EOS.
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = special.intersection(between_ids) | {tokenizer.eos_token_id}
    return next((id for id in after_ids if id in ends), tokenizer.eos_token_id)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer puts a beginning-of-sequence token in front of text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def without_appended_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that goes on: some tokenizers end every text with EOS."""
    appends = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if appends and ids[-1:] == [tokenizer.eos_token_id] else ids


def check_data(config: DataConfig) -> None:
    """Raise `InputError` for an option out of range; nothing is read for it."""
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit of {config.source} must be at least 1, got {config.limit}")
    if config.max_length < 2:
        raise InputError(f"max_length of {config.source} must be at least 2 tokens, got {config.max_length}")


def load_samples(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> SampleSet:
    """Read, render and tokenise a data set.

    Raises:
        InputError: a file or field that is not there, a response that is not text, repeated ids, or no sample with a
            target token.
    """
    check_data(config)
    rows = read_rows(config.source, config.split, config.limit, config.subset)
    prompts = text_column(rows, config.prompt_field, describe_rows(config))
    responses = responses_of(rows, describe_rows(config), config)
    ids = _sample_ids(rows, config)
    samples, dropped, num_truncated = [], [], 0
    end = end_of_response(config.template, tokenizer)
    rendered = render_prompts(prompts, config.template, tokenizer)
    for first in range(0, len(ids), _TOKENIZE_AT_ONCE):
        part = slice(first, first + _TOKENIZE_AT_ONCE)
        # A chat template writes its own special tokens; for other texts the tokenizer adds its BOS if it has one.
        prompt_ids = tokenizer(rendered[part], add_special_tokens=config.template != "chat").input_ids
        if config.template != "chat":
            prompt_ids = [without_appended_eos(ids, tokenizer) for ids in prompt_ids]
        response_ids = tokenizer(responses[part], add_special_tokens=False).input_ids
        for index, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True), start=first):
            sample = _sample(ids[index], prompt, [*response, end], prompts[index], responses[index], config.max_length)
            num_truncated += sample.truncated
            if sample.num_targets <= 0 or not responses[index].strip():
                dropped.append(sample.id)
            else:
                samples.append(sample)
    if not samples:
        raise InputError(
            f"none of the {len(ids)} samples of {config.source} has a target token: responses are empty or prompts "
            f"fill max_length={config.max_length}"
        )
    fingerprints = {
        "template": template_fingerprint(config, tokenizer),
        "data": fingerprint(json.dumps(row).encode() for row in zip(ids, prompts, responses, strict=True)),
    }
    return SampleSet(samples, len(ids), dropped, num_truncated, fingerprints)


def _sample(id, prompt_ids, response_ids, prompt, response, max_length) -> Sample:
    ids = [*prompt_ids, *response_ids]
    truncated = len(ids) > max_length
    ids = ids[:max_length]
    # Nothing predicts the first token of a sequence, so a sample without prompt and BOS starts at its second.
    start = min(max(len(prompt_ids), 1), len(ids))
    return Sample(id, np.asarray(ids, dtype=np.int32), start, prompt, response, truncated)


def _sample_ids(rows, config: DataConfig) -> list[str]:
    if config.id_field is None:
        return [str(i) for i in range(len(rows))]
    if config.id_field not in rows.column_names:
        raise InputError(f"{config.source} has no field {config.id_field!r}; it has {', '.join(rows.column_names)}")
    ids = [str(value) for value in rows[config.id_field]]
    repeated = [value for value, count in Counter(ids).items() if count > 1]
    if repeated:
        raise InputError(
            f"{config.source}: {len(repeated)} values of id field {config.id_field!r} are repeated, the first is "
            f"{repeated[0]!r}; ids must be unique"
        )
    return ids


# Padded positions stand behind every token, or are masked, and are never targets, so any token does.
PAD_ID = 0


def collate(samples: Iterable[Sample], pad_id: int) -> Batch:
    """Right-pad samples into one batch."""
    samples = list(samples)
    longest = max(len(s.input_ids) for s in samples)
    input_ids = np.full((len(samples), longest), pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    positions, target, offsets = [], [], [0]
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        attention_mask[row, :length] = 1
        positions.append(row * longest + np.arange(sample.start - 1, length - 1))
        target.append(sample.input_ids[sample.start :])
        offsets.append(offsets[-1] + sample.num_targets)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        torch.from_numpy(np.concatenate(target).astype(np.int64)),
        torch.tensor(offsets),
    )


# A fast tokenizer warns when the process forks after it was used in parallel; data loading here does not fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
