"""Which samples go through the model together, by their numbers of tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from flow_finetune.errors import InputError


def check_batch_tokens(batch_tokens: int) -> None:
    """Raise `InputError` for batches that nothing fits in."""
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")


def token_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Indices in batches of at most `max_tokens` tokens each (or one sample), longest first.

    Of similar length, padding counted; or `packed`, of about as many tokens each.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if packed:
        return _even_batches(order, lengths, max_tokens)
    batches: list[list[int]] = []
    for index in order:
        # The first sample of a batch is its longest, so it sets the padded length.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _even_batches(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each sample in turn into the batch with the fewest tokens, of about as few batches as hold them."""
    number = max(1, -(-sum(lengths) // max_tokens))
    while True:
        batches: list[list[int]] = [[] for _ in range(min(number, len(order)))]
        heap = [(0, k) for k in range(len(batches))]
        for index in order:
            tokens, k = heapq.heappop(heap)
            if batches[k] and tokens + lengths[index] > max_tokens:
                break
            batches[k].append(index)
            heapq.heappush(heap, (tokens + lengths[index], k))
        else:
            return batches
        number += max(1, number // 100)  # one by one takes long where many samples fill half a batch each
