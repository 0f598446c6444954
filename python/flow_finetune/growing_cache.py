"""Keys and values that grow where they are; transformers' own cache copies all of them for every new token."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens of room, at least, and in parts of what is there already.
_MIN_ROOM = 64
_ROOM_SHARE = 4


class _Room:
    """Memory for a tensor `[B, H, T, D]` and for more of T behind it."""

    _buffer: Tensor | None = None
    _end = 0
    _held: Tensor | None = None

    def append(self, held: Tensor, new: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
        """`held` with `new` behind it, and the last `keep` tokens of that (all for None), to be handed in next time.

        A tensor that is not the last one handed out, of other rows say, is copied.
        """
        before, length = held.shape[-2], held.shape[-2] + new.shape[-2]
        if held is not self._held or self._end + new.shape[-2] > self._buffer.shape[-2]:
            size = length + max(_MIN_ROOM, length // _ROOM_SHARE)
            self._buffer = held.new_empty((*held.shape[:-2], size, held.shape[-1]))
            self._buffer[..., :before, :] = held
            self._end = before
        self._buffer[..., self._end : self._end + new.shape[-2], :] = new
        self._end += new.shape[-2]
        whole = self._buffer[..., self._end - length : self._end, :]
        self._held = whole if keep is None else whole[..., max(length - keep, 0) :, :]
        return whole, self._held


class _Growing:
    """What layers that grow where they are have in common."""

    def _append(self, key_states: Tensor, value_states: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_rooms"):
            self._rooms = _Room(), _Room()
        keys, self.keys = self._rooms[0].append(self.keys, key_states, keep)
        values, self.values = self._rooms[1].append(self.values, value_states, keep)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        # Or the memory of all rows would stay beside that of the chosen ones until each layer's next token.
        vars(self).pop("_rooms", None)


class _GrowingLayer(_Growing, DynamicLayer):
    """All keys and values of an attention layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
        return self._append(key_states, value_states, None)


class _GrowingSlidingWindowLayer(_Growing, DynamicSlidingWindowLayer):
    """Those of the last tokens that a window reaches."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        return self._append(key_states, value_states, self.sliding_window - 1)


_GROWING = {DynamicLayer: _GrowingLayer, DynamicSlidingWindowLayer: _GrowingSlidingWindowLayer}


def grow_in_place(cache: object) -> None:
    """Have a cache that holds something take new tokens without a copy of the old, in the layers whose kind is known."""
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        kind = _GROWING.get(type(layer))
        if kind is None or not layer.is_initialized or getattr(layer, "record_past", False):
            continue
        layers[index] = kind.__new__(kind)
        vars(layers[index]).update(vars(layer))
