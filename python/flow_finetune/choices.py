"""Log-likelihoods of choices, each context run once.

A question's choices share its context, which is most of their tokens. Where texts are packed, what they share is there
once (packing.py). Elsewhere the contexts of a batch are run left-padded, what the model keeps of them is repeated for the
choices, and only what differs is run after them; a model that does not continue contexts runs each choice as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

import flow_kernels
from flow_finetune.compiled_layers import uncompiled
from flow_finetune.context import Contexts, continues_contexts
from flow_finetune.data import Sample, collate
from flow_finetune.errors import DivergedError
from flow_finetune.models import CausalLM, autocast
from flow_finetune.packing import num_packed_tokens, packs_texts
from flow_finetune.progress import track

# What a forward pass costs beside its tokens, in tokens: all weights of the body and the head are read once more.
# Measured with Gemma 3 270M, whose head has 262,144 rows, on 200 questions each of ARC-Easy, OpenBookQA and HellaSwag
# (batches of 4096, 2 Xeon cores with AMX, two runs in turn): 66 and 67 s, with 128 72 and 78, with 512 73 and 71, and
# where a batch ended at a fifth of padding 75 and 101. Of the paper's seven tasks this makes 75 batches with 140,051
# padded tokens, that made 237 with 127,328.
_BATCH_COST = 256
# Of steps from 1 to 16 the one that cost least there. The cheapest of three orders for each task gained 0.5 %.
_REST_STEP = 8
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


def choice_batches(
    groups: Sequence[Sequence[Sample]], batch_tokens: int, *, share_contexts: bool = True
) -> list[list[int]]:
    """Batches of groups such that neither the contexts nor the choices exceed `batch_tokens` padded tokens.

    Contexts and choices are padded each to their own length, which no one order suits. Of all ways to cut the order
    taken here into batches this is the cheapest, by padded tokens and `_BATCH_COST`. A group that exceeds the limit on
    its own is a batch of its own.
    """
    contexts = [split_length(choices) if share_contexts else 0 for choices in groups]
    rests = [max(len(c.input_ids) for c in choices) - split for choices, split in zip(groups, contexts, strict=True)]
    # By the choices' length in steps, because they are padded more often, then by the context's. Without contexts this
    # is the order of length.
    order = sorted(range(len(groups)), key=lambda i: (-(rests[i] // _REST_STEP), -contexts[i], -rests[i], i))
    starts = _cheapest_starts([(len(groups[i]), contexts[i], rests[i]) for i in order], batch_tokens)
    return [order[start:end] for start, end in itertools.pairwise([*starts, len(order)])]


def packed_batches(groups: Sequence[Sequence[Sample]], batch_tokens: int) -> list[list[int]]:
    """Batches of groups, in order, of at most `batch_tokens` tokens each (or one group), where what all begin with and what
    the choices of a group begin with is there once."""
    whole = split_length([min(choices, key=lambda c: c.start) for choices in groups])
    batches: list[list[int]] = []
    tokens = 0
    for index, choices in enumerate(groups):
        split = max(split_length(choices), whole)
        size = split - whole + sum(len(c.input_ids) - split for c in choices)
        if not batches or tokens + size > batch_tokens:
            batches.append([])
            tokens = whole
        batches[-1].append(index)
        tokens += size
    return batches


def _cheapest_starts(shapes: Sequence[tuple[int, int, int]], batch_tokens: int) -> list[int]:
    """Where the batches of these questions start: each has a number of choices, a context's length and a choice's."""
    num_choices, contexts, rests = np.asarray(shapes, np.int64).reshape(-1, 3).T
    first_choice = np.cumsum([0, *num_choices])
    # The longest context and rest from each question on, up to the current one.
    context, rest = contexts.copy(), rests.copy()
    # The least cost of all questions before each, and where the last batch up to and with each starts at that cost.
    costs, starts = np.zeros(len(rests) + 1, np.int64), np.zeros(len(rests), np.int64)
    low = 0  # a batch with the current question, or a later one, that starts before this exceeds the limit
    for last in range(len(rests)):
        window = slice(low, last + 1)
        np.maximum(context[window], contexts[last], out=context[window])
        np.maximum(rest[window], rests[last], out=rest[window])
        context_tokens = np.arange(last + 1 - low, 0, -1) * context[window]
        rest_tokens = (first_choice[last + 1] - first_choice[window]) * rest[window]
        fits = np.maximum(context_tokens, rest_tokens) <= batch_tokens
        # What fits is the end of the window, because a batch only grows towards its start.
        num_fit = max(int(np.count_nonzero(fits)), 1)
        low = last + 1 - num_fit
        totals = costs[low : last + 1] + context_tokens[-num_fit:] + rest_tokens[-num_fit:]
        best = int(totals.argmin())
        costs[last + 1] = totals[best] + _BATCH_COST
        starts[last] = low + best
    found: list[int] = []
    end = len(rests)
    while end:
        end = int(starts[end - 1])
        found.append(end)
    return found[::-1]


@torch.no_grad()
def score_choices(
    lm: CausalLM, groups: Sequence[Sequence[Sample]], pad_id: int, *, share_contexts: bool = True
) -> tuple[flow_kernels.SampleScores, int]:
    """Scores of every choice of a batch of questions, question by question, and how many tokens were run.

    `groups` holds the choices of each question, as samples whose targets are the choice. Without `share_contexts` each
    choice is run as a whole.
    """
    device = lm.head.weight.device
    if packs_texts(lm):
        batch = collate([c for choices in groups for c in choices], pad_id)
        scores = flow_kernels.sum_samples(lm.score(batch), batch.target, batch.cu_seqlens)
        return scores, num_packed_tokens(batch)
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
    packed = packs_texts(lm)
    share = not packed and continues_contexts(lm)
    if packed:
        batches = packed_batches(groups, batch_tokens)
    else:
        batches = choice_batches(groups, batch_tokens, share_contexts=share)
    # One autocast context over all batches: it keeps the cast weights, a noticeable part of a small batch's time.
    with track(f"evaluating {name}", len(batches)) as tracker, autocast(lm.head.weight.device, precision):
        for indices in batches:
            scores, num_tokens = score_choices(lm, [groups[i] for i in indices], pad_id, share_contexts=share)
            samples = np.concatenate([np.arange(first[i], first[i + 1]) for i in indices])
            sums[:, samples] = [column.cpu() for column in scores]
            bad = [s.id for i in indices for j, s in enumerate(groups[i], first[i]) if not math.isfinite(sums[0, j])]
            if bad:
                # The harness's have no names.
                first_of = f", first for item {', '.join(bad[:_NUM_NAMED])}" if all(bad) else ""
                raise DivergedError(
                    f"the model gives NaN or infinite losses in {name}{first_of}; "
                    "check the model, or evaluate it with --dtype float32 --precision full"
                )
            tracker.advance(1, tokens=num_tokens)
    return flow_kernels.SampleScores(*sums)
