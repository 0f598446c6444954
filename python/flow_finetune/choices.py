"""Log-likelihoods of choices, each context run once.

A question's choices share its context, which is most of their tokens. The contexts of a batch are run left-padded, what
the model keeps of them is repeated for the choices, and only what differs is run after them; a model that does not
continue contexts runs each choice as a whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import flow_kernels
from flow_finetune.compiled_layers import uncompiled
from flow_finetune.context import Contexts, continues_contexts
from flow_finetune.data import Sample, collate
from flow_finetune.errors import InputError
from flow_finetune.models import CausalLM, autocast
from flow_finetune.progress import track

# How batches are filled. 200 questions each of the six commonsense tasks and both forms of MMLU, Gemma 3's tokenizer and
# batches of 4096: 157,743 padded tokens, against 206,310 by length alone.
_REST_STEP, _MAX_PADDING, _SMALL_SHARE = 4, 1.2, 1 / 8
# Items that a message about NaN names.
_NUM_NAMED = 5


def split_length(choices: Sequence[Sample]) -> int:
    """How many tokens all choices begin with, short of the last one before the first target, which predicts it."""
    if len(choices) == 1:
        return 0
    shortest = min(c.start for c in choices) - 1
    first = choices[0].input_ids[:shortest]
    differs = [np.flatnonzero(c.input_ids[:shortest] != first) for c in choices[1:]]
    return min((int(d[0]) for d in differs if len(d)), default=shortest)


class _Shape(NamedTuple):
    """Padded size of a batch of questions, and how many of its tokens are none of the padding."""

    num_questions: int
    num_choices: int
    context: int  # tokens of the longest context
    rest: int  # tokens of the longest choice, with what is not shared of its context
    num_tokens: int

    def joined(self, other: _Shape) -> _Shape:
        return _Shape(
            self.num_questions + other.num_questions, self.num_choices + other.num_choices,
            max(self.context, other.context), max(self.rest, other.rest), self.num_tokens + other.num_tokens,
        )  # fmt: skip

    @property
    def parts(self) -> tuple[int, int]:
        """Padded tokens of the contexts and of the choices."""
        return self.num_questions * self.context, self.num_choices * self.rest


def choice_batches(
    groups: Sequence[Sequence[Sample]], batch_tokens: int, *, share_contexts: bool = True
) -> list[list[int]]:
    """Batches of groups such that neither the contexts nor the choices exceed `batch_tokens` padded tokens.

    Contexts and choices are padded each to their own length, which no one order suits: a batch also ends where a fifth
    more tokens would be run than there are, unless it is small.
    """
    shapes = []
    for choices in groups:
        split = split_length(choices) if share_contexts else 0
        rests = [len(c.input_ids) - split for c in choices]
        shapes.append(_Shape(1, len(choices), split, max(rests), split + sum(rests)))
    # By the choices' length in steps, because they are padded more often, then by the context's.
    order = sorted(range(len(groups)), key=lambda i: (-(shapes[i].rest // _REST_STEP), -shapes[i].context, i))
    batches: list[list[int]] = []
    filled = None  # shape of the last batch
    for index in order:
        both = filled.joined(shapes[index]) if filled else shapes[index]
        padded = sum(both.parts)
        little_padding = padded <= max(_MAX_PADDING * both.num_tokens, _SMALL_SHARE * batch_tokens)
        if filled and max(both.parts) <= batch_tokens and little_padding:
            batches[-1].append(index)
            filled = both
        else:
            batches.append([index])
            filled = shapes[index]
    return batches


@torch.no_grad()
def score_choices(
    lm: CausalLM, groups: Sequence[Sequence[Sample]], pad_id: int, *, share_contexts: bool = True
) -> tuple[flow_kernels.SampleScores, int]:
    """Scores of every choice of a batch of questions, question by question, and how many tokens were run.

    `groups` holds the choices of each question, as samples whose targets are the choice. Without `share_contexts` each
    choice is run as a whole.
    """
    device = lm.head.weight.device
    splits = [split_length(choices) if share_contexts else 0 for choices in groups]
    owner = torch.tensor([row for row, choices in enumerate(groups) for _ in choices], device=device)
    rests = [
        replace(c, input_ids=c.input_ids[split:], start=c.start - split)
        for choices, split in zip(groups, splits, strict=True)
        for c in choices
    ]
    batch = collate(rests, pad_id).to(device)
    context = {}
    if max(splits):
        texts = [choices[0].input_ids[:split] for choices, split in zip(groups, splits, strict=True)]
        contexts = Contexts(lm, texts, pad_id)
        contexts.select(owner)
        context = contexts.options(batch.attention_mask)
    # As with the contexts, layers that read a cache are not compiled.
    with uncompiled(lm.model) if context else contextlib.nullcontext():
        tokens = lm.score(batch, **context)
    scores = flow_kernels.sum_samples(tokens, batch.target, batch.cu_seqlens)
    return scores, sum(splits) + int(batch.attention_mask.sum())


def score_groups(
    lm: CausalLM, groups: Sequence[Sequence[Sample]], pad_id: int, batch_tokens: int, precision: str, name: str
) -> flow_kernels.SampleScores:
    """Summed loss, target count and correct count of every sample, fp64 numpy in the order of the samples.

    A group is the choices of a question, or one sample on its own.
    """
    first = np.cumsum([0, *(len(group) for group in groups)])
    sums = np.zeros((3, first[-1]))
    lm.check_length(max(len(s.input_ids) for group in groups for s in group), name)
    share = continues_contexts(lm)
    batches = choice_batches(groups, batch_tokens, share_contexts=share)
    # One autocast context over all batches: it keeps the cast weights, a noticeable part of a small batch's time.
    with track(f"evaluating {name}", len(batches)) as tracker, autocast(lm.head.weight.device, precision):
        for indices in batches:
            scores, num_tokens = score_choices(lm, [groups[i] for i in indices], pad_id, share_contexts=share)
            samples = np.concatenate([np.arange(first[i], first[i + 1]) for i in indices])
            sums[:, samples] = [column.cpu() for column in scores]
            bad = [s.id for i in indices for j, s in enumerate(groups[i], first[i]) if not math.isfinite(sums[0, j])]
            if bad:
                raise InputError(
                    f"the model gives NaN or infinite losses in {name}, first for item {', '.join(bad[:_NUM_NAMED])}; "
                    "check the model, or evaluate it with --dtype float32 --precision full"
                )
            tracker.advance(1, tokens=num_tokens)
    return flow_kernels.SampleScores(*sums)
