"""Greedy answers in batches, and what counts as the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flow_finetune.batches import token_batches
from flow_finetune.context import Contexts, continues_contexts, pad
from flow_finetune.data import end_of_response
from flow_finetune.errors import InputError
from flow_finetune.models import CausalLM, autocast
from flow_finetune.progress import Tracker, track

# A sign belongs to a number unless it is a minus between two of them.
_NUMBER = re.compile(r"((?:(?<![\d.)])[-+\u2212])?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\d.])\.\d+))")
# Finished sequences leave the batch when they are a quarter of it: each time the cache is copied.
_KEEP_SHARE = 0.75
# Logits of which one is looked for at a time.
_BLOCK = 512
# A prompt's tokens but the last leave only keys and values behind, and a step reads all weights, whatever its rows: 64
# answers of 192 tokens take Gemma 3 270M 66 s in one batch and 80 in two (2 Xeon cores).
_PROMPT_TOKENS = 2
# What a batch may hold by its end, in parts of `batch_tokens`: a short prompt's answer may be many times as long.
_KEPT_TOKENS = 8


def generate_texts(
    lm: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], *, until: Sequence[str], **options
) -> list[str]:
    """Greedy texts after token prompts, up to the model's end of text or the first of the texts in `until`.

    `options` are those of `generate_greedily`.
    """
    # A token may hold more than the stop text's end, so a few tokens more are looked at than it has.
    tail = 4 + max((len(tokenizer(text, add_special_tokens=False).input_ids) for text in until), default=0)

    def ends(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[-tail:], skip_special_tokens=True)
        return any(stop in text for stop in until)

    # A stop text that is a special token is not in decoded text.
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in until]
    special = {ids[0] for ids in encoded if len(ids) == 1 and ids[0] in tokenizer.all_special_ids}
    tokens = generate_greedily(
        lm, prompts, stop_ids=_stop_ids(lm, tokenizer) | special, pad_id=tokenizer.pad_token_id, ends=ends if until else None,
        **options,
    )  # fmt: skip
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    for stop in until:
        texts = [text.partition(stop)[0] for text in texts]
    return texts


def _stop_ids(lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's EOS, what ends a turn of its chat template, and whatever else the model's settings end a text with."""
    configured = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    others = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, end_of_response("chat", tokenizer), *(i for i in others if i is not None)}


@torch.no_grad()
def generate_greedily(
    lm: CausalLM,
    prompts: Sequence[np.ndarray],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_tokens: int,
    precision: str,
    ends: Callable[[list[int]], bool] | None = None,
    description: str = "generating",
) -> list[list[int]]:
    """The most likely token after each prompt, again and again, until one of `stop_ids` or `max_new_tokens`.

    Args:
        prompts: token ids, BOS included where the model wants one.
        stop_ids: tokens that end a sequence; they are not part of what is returned.
        pad_id: fills up shorter prompts; never attended to.
        batch_tokens: padded tokens of one forward pass elsewhere; here a batch has up to twice as many of prompts, and 8
            times as many with all new tokens. Of a model that runs every text again it is a forward pass's, too.
        ends: whether the new tokens of a sequence, the last of them included, end it.

    Returns:
        The new tokens of every prompt, in the order of the prompts.

    Raises:
        InputError: texts beyond the model's positions, or a model that gives NaN.
    """
    lm.eval()
    device = lm.head.weight.device
    lm.check_length(max(len(p) for p in prompts) + max_new_tokens, f"{description}: a prompt with its answer")
    if continues_contexts(lm):
        start, most = _Continued, _KEPT_TOKENS * batch_tokens
        lengths = [max(_KEPT_TOKENS // _PROMPT_TOKENS * len(p), len(p) + max_new_tokens) for p in prompts]
    else:
        start, most, lengths = _RunAgain, batch_tokens, [len(p) + max_new_tokens for p in prompts]
    batches = token_batches(lengths, most)
    results: list[list[int]] = [[] for _ in prompts]
    # One autocast context over everything: it keeps the cast weights, which would cost more than a step of decoding.
    with track(description, len(prompts)) as tracker, autocast(device, precision):
        for indices in batches:
            texts = start(lm, [prompts[i] for i in indices], pad_id)
            _decode(lm.head, texts, set(stop_ids), ends, max_new_tokens, indices, results, tracker, description)
    return results


class _Continued:
    """Texts that grow at their end, from what the model keeps of them."""

    def __init__(self, lm: CausalLM, texts: Sequence[np.ndarray], pad_id: int) -> None:
        self._contexts = Contexts(lm, texts, pad_id)
        self._contexts.grow_in_place()
        self.last_hidden = self._contexts.last_hidden_state[:, -1]

    def extend(self, tokens: Tensor) -> None:
        self.last_hidden = self._contexts.run(tokens[:, None])[:, -1]

    def select(self, rows: Tensor) -> None:
        self._contexts.select(rows)


class _RunAgain:
    """The same of a model that cannot continue: every token is a run of the whole text."""

    def __init__(self, lm: CausalLM, texts: Sequence[np.ndarray], pad_id: int) -> None:
        self._lm, self._pad_id = lm, pad_id
        self._texts = [np.asarray(text, np.int64) for text in texts]
        self._run()

    def _run(self) -> None:
        ids, mask = (t.to(self._lm.head.weight.device) for t in pad(self._texts, self._pad_id, left=False))
        hidden = self._lm.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        self.last_hidden = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]

    def extend(self, tokens: Tensor) -> None:
        self._texts = [np.append(text, token) for text, token in zip(self._texts, tokens.tolist(), strict=True)]
        self._run()

    def select(self, rows: Tensor) -> None:
        self._texts = [self._texts[row] for row in rows.tolist()]


def _decode(head, texts, stop_ids, ends, max_new_tokens, owners, results, tracker: Tracker, description: str) -> None:
    """Extend `results[owner]` for every row of a batch of texts."""
    owners, going = list(owners), [True] * len(owners)
    chosen = None
    for _ in range(max_new_tokens):
        if chosen is not None:
            texts.extend(chosen)
        # The soft-cap is monotone, so the largest logit is the same without it.
        logits = head(texts.last_hidden)
        chosen = _argmax(logits)
        if not logits.gather(-1, chosen[:, None]).isfinite().all():
            raise InputError(
                f"{description}: the model gives NaN or infinite values; check the model, or evaluate it with --dtype "
                "float32 --precision full"
            )
        num_new = sum(going)
        for row, token in enumerate(chosen.tolist()):
            if going[row] and token in stop_ids:
                going[row] = False
            elif going[row]:
                results[owners[row]].append(token)
                going[row] = not (ends and ends(results[owners[row]]))
        tracker.advance(num_new - sum(going), tokens=num_new)
        if not any(going):
            return
        if sum(going) <= _KEEP_SHARE * len(going):
            rows = [row for row, is_going in enumerate(going) if is_going]
            kept = torch.tensor(rows, device=chosen.device)
            texts.select(kept)
            chosen = chosen[kept]
            owners, going = [owners[row] for row in rows], [True] * len(rows)
    tracker.advance(sum(going))


def _argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of `[B, V]`, the first of equals: the block of the largest, then the largest in it.

    torch's own looks at one bf16 after the other: 27 ms for 32 rows of 262,144, and this 4 (2 Xeon cores).
    """
    count = logits.shape[-1]
    whole = count // _BLOCK * _BLOCK
    largest = logits[:, :whole].unflatten(-1, (whole // _BLOCK, _BLOCK)).amax(-1)
    if whole < count:
        largest = torch.cat([largest, logits[:, whole:].amax(-1, keepdim=True)], -1)
    places = largest.argmax(-1, keepdim=True) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    places = places.clamp(max=count - 1)
    return places.gather(-1, logits.gather(-1, places).argmax(-1, keepdim=True)).squeeze(-1)


def compile_answer_pattern(pattern: str, name: str) -> re.Pattern:
    """The regular expression whose last match's first group is an answer."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"answer_pattern of {name} is not a regular expression: {error} in {pattern!r}") from error
    if compiled.groups < 1:
        raise InputError(f"answer_pattern of {name} must have a group, (...), around the answer, got {pattern!r}")
    return compiled


def extract_answer(text: str, pattern: re.Pattern, *, or_last_number: bool = False) -> str | None:
    """The answer that a text ends with: the pattern's last match, else its last number if that is asked for."""
    found = [m for m in pattern.finditer(text) if m.group(1)]
    if not found and or_last_number:
        found = list(_NUMBER.finditer(text))
    if not found:
        return None
    return found[-1].group(1).replace(",", "").replace("$", "").replace("\u2212", "-").strip().rstrip(".")


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are equal, as numbers if both are numbers."""
    if a is None or b is None or a == b:
        return a is not None and a == b
    try:
        numbers = Decimal(a), Decimal(b)
    except InvalidOperation:
        return False
    return all(number.is_finite() for number in numbers) and numbers[0] == numbers[1]
