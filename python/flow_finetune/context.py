"""Texts that are run once and continued: what a model keeps of them, and whether it can be relied on.

A model keeps keys and values of attention, and states of recurrent or convolutional layers. Not every architecture
continues the latter rightly from a padded batch, or with one token at a time, and some do so wrongly without an error.
So each model is tried on a few tokens; where that fails, everything is run again, which is right for every causal model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flow_finetune.compiled_layers import uncompiled
from flow_finetune.growing_cache import grow_in_place
from flow_finetune.models import CausalLM
from flow_finetune.progress import say
from flow_finetune.trials import is_same, tried_once


def pad(texts: Sequence[np.ndarray], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[B, T]` of texts that end together (`left`) or begin together."""
    longest = max(len(t) for t in texts)
    ids = torch.full((len(texts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        part = slice(longest - len(text), longest) if left else slice(0, len(text))
        ids[row, part] = torch.as_tensor(np.asarray(text, np.int64))
        mask[row, part] = 1
    return ids, mask


class Contexts:
    """A left-padded batch of texts that was run, to be continued row by row."""

    def __init__(self, lm: CausalLM, texts: Sequence[np.ndarray], pad_id: int) -> None:
        self._lm = lm
        # Its name of old is deprecated in transformers 5.2x.
        names = inspect.signature(lm.model.base_model.forward).parameters
        self._argument = "cache" if "cache" in names else "past_key_values"
        self._cache = None
        ids, mask = (t.to(lm.head.weight.device) for t in pad(texts, pad_id, left=True))
        self._mask = mask[:, :0]
        self._next = torch.zeros_like(mask[:, :1])  # the position that comes next
        self.last_hidden_state = self._run(ids, mask)

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        options = self.options(mask)
        # What writes to a cache has the number of its layer in it, and would be compiled for each.
        with uncompiled(self._lm.model):
            output = self._lm.model.base_model(input_ids=ids, use_cache=True, **options)
        self._cache, self._mask = getattr(output, self._argument), options["attention_mask"]
        self._next = self._next + mask.sum(1, keepdim=True)
        return output.last_hidden_state

    def run(self, ids: Tensor) -> Tensor:
        """Hidden states `[B, t, D]` of the `[B, t]` tokens that come next."""
        return self._run(ids, torch.ones_like(ids))

    def select(self, rows: Tensor) -> None:
        """Continue with these rows; a row may be named several times."""
        self._cache.reorder_cache(rows)
        self._mask, self._next = self._mask[rows], self._next[rows]

    def grow_in_place(self) -> None:
        """Make room behind what is kept: for a text that grows token by token."""
        grow_in_place(self._cache)

    def options(self, mask: Tensor) -> dict[str, object]:
        """What the body is given beside `[B, t]` tokens with this mask, the last that come next."""
        return {
            "attention_mask": torch.cat([self._mask, mask], 1),
            "position_ids": self._next + (mask.cumsum(1) - 1).clamp(min=0),
            self._argument: self._cache,
        }


@tried_once
def continues_contexts(lm: CausalLM) -> bool:
    """Whether the model goes on from a padded batch of texts as if it had run each text as a whole; tried once."""
    if not (continues := _tries_to_continue(lm)):
        say(
            f"{type(lm.model).__name__} does not continue a batch of texts rightly, or not at all; contexts are run again "
            "for every choice, and texts for every token that is generated, which takes longer"
        )
    return continues


def _tries_to_continue(lm: CausalLM) -> bool:
    num_ids, device = min(lm.head.weight.shape[0], 199), lm.head.weight.device
    texts = [(np.arange(n) * 37 + 11 * n) % num_ids for n in (5, 8)]
    owner = torch.tensor([1, 0, 1], device=device)
    new = (torch.arange(9, device=device).view(3, 3) * 53 + 5) % num_ids
    whole = [np.concatenate([texts[o], row]) for o, row in zip(owner.tolist(), new.cpu().numpy(), strict=True)]
    ids, mask = pad(whole, 0, left=False)
    expected = lm.model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    expected = torch.stack([h[len(w) - 3 : len(w)] for h, w in zip(expected.last_hidden_state, whole, strict=True)])
    try:
        contexts = Contexts(lm, texts, 0)
        contexts.select(owner)
        found = torch.cat([contexts.run(new[:, :2]), contexts.run(new[:, 2:])], 1)
    except Exception:  # whatever an architecture without such a cache raises; running everything again needs none
        return False
    return is_same(found, expected)
