"""The texts of a batch behind each other in one row: no padding, and what several of them begin with is there once.

The layers see one row of tokens with the positions of each text, and `flow_kernels.packed_attention` in place of their
own attention, which keeps the texts apart. What a text's tokens are given is what they are given alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import flow_kernels
from flow_finetune.data import Batch, Sample, collate
from flow_finetune.trials import is_same, tried_once
from flow_kernels import backends

if TYPE_CHECKING:
    from flow_finetune.models import CausalLM

# The name of the attention below in transformers.
ATTENTION = "flow_finetune_packed"
# A beginning that several texts share is kept once if it has so many tokens.
_MIN_SHARED = 8
# What models hand to their attention that changes nothing of what a packed row gives.
_WITHOUT_EFFECT = {"cache_position", "is_causal", "position_ids"}
# The windows that the attention of each layer was given, while a trial runs.
_windows: list[int | None] | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, and that of packed rows where the mask holds segments, `[1, 1, S, 3]` int64.

    transformers hands a mask of four dimensions on to the layers as it is.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    if _windows is not None:
        _windows.append(sliding_window)
    # Such as a soft-cap, sinks, a bias, or the blocks that a query is to see.
    unknown = [n for n, v in options.items() if v is not None and v is not False and n not in _WITHOUT_EFFECT]
    is_causal = getattr(module, "is_causal", True) and options.get("is_causal") is not False
    if unknown or dropout or not is_causal or len(query) != 1:
        raise NotImplementedError(f"no packed rows with {unknown}, dropout {dropout}, causal: {is_causal}")
    heads = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = flow_kernels.packed_attention(*heads, attention_mask[0, 0], scale=scaling, window=sliding_window)
    return out[None], None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def pack(batch: Batch) -> Batch:
    """A right-padded batch as one packed row: `input_ids` `[1, N]`, the segments as its mask, and `position_ids`."""
    ids, lengths = batch.input_ids.numpy(), batch.attention_mask.sum(1).numpy()
    segments: list[tuple[int, int, int]] = []
    tokens: list[np.ndarray] = []
    position_ids: list[np.ndarray] = []
    place = np.zeros(ids.shape, np.int64)  # where each token of the batch is in the row
    for low, high, start, end, parent in _segments(ids, lengths):
        at = segments[-1][1] if segments else 0
        segments.append((at, at + end - start, parent))
        tokens.append(ids[low, start:end])
        position_ids.append(np.arange(start, end))
        place[low:high, start:end] = np.arange(at, at + end - start)
    return replace(
        batch,
        input_ids=torch.from_numpy(np.concatenate(tokens))[None],
        attention_mask=torch.tensor(segments)[None, None],
        positions=torch.from_numpy(place.reshape(-1)[batch.positions.numpy()]),
        position_ids=torch.from_numpy(np.concatenate(position_ids))[None],
    )


def _segments(ids: np.ndarray, lengths: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """Texts `[low, high)` whose tokens `[start, end)` are one segment, and the index of the one before it, or -1."""
    columns = np.arange(ids.shape[1])
    differs = (ids[1:] != ids[:-1]) | (columns >= np.minimum(lengths[1:], lengths[:-1])[:, None] - 1)
    shared = differs.argmax(
        1
    )  # with the next text; all but the last token at most, which keeps a segment's end its own
    found: list[tuple[int, int, int, int, int]] = []

    def add(low: int, high: int, start: int, parent: int) -> None:
        if high - low == 1:
            found.append((low, high, start, int(lengths[low]), parent))
            return
        end = int(shared[low : high - 1].min())
        if end - start >= _MIN_SHARED:
            found.append((low, high, start, end, parent))
            start, parent = end, len(found) - 1
        cuts = [i + 1 for i in range(low, high - 1) if shared[i] - start < _MIN_SHARED]
        for first, last in zip([low, *cuts], [*cuts, high], strict=True):
            add(first, last, start, parent)

    add(0, len(ids), 0, -1)
    return found


def num_packed_tokens(batch: Batch) -> int:
    """The tokens of the row that `pack` makes."""
    return sum(
        end - start for _, _, start, end, _ in _segments(batch.input_ids.numpy(), batch.attention_mask.sum(1).numpy())
    )


def packs_texts(lm: CausalLM) -> bool:
    """Whether batches are packed: it is wanted, the compiled kernels are there, and the model gives texts the same."""
    if not lm.packing or lm.backend not in ("auto", "cpu") or lm.head.weight.device.type != "cpu":
        return False
    return backends.status("cpu", "cpu").available and not _drops(lm.model) and _keeps_texts_apart(lm)


@tried_once
def _keeps_texts_apart(lm: CausalLM) -> bool:
    """Whether the model gives packed texts what it gives them alone; where it does, its attention is the one above now.

    Recurrent layers and convolutions do not, nor do models with an attention of their own, or one that transformers does
    not let others replace.
    """
    global _windows
    config = lm.model.config.get_text_config()
    if getattr(config, "attention_chunk_size", None):
        return False
    before = config._attn_implementation
    if before not in ("sdpa", ATTENTION):  # what its owner has chosen stays
        return False
    ids = (np.arange(64) * 37 + 5) % lm.head.weight.shape[0]
    texts = [np.concatenate([ids[:20], ids[20 + k : 20 + k + n]]) for k, n in ((0, 5), (7, 12), (21, 1))] + [ids[30:45]]
    batch = collate([Sample("", text, 1, "", "", False) for text in texts], 0)
    try:
        expected = lm.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        expected = expected.flatten(0, 1)[batch.positions]
        lm.model.set_attn_implementation(ATTENTION)
        packed, _windows = pack(batch), []
        found = lm.model.base_model(
            input_ids=packed.input_ids, attention_mask=packed.attention_mask, position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state[0, packed.positions]  # fmt: skip
        packs = is_same(found, expected) and _hands_on_windows(config, _windows)
    except Exception:  # whatever a model that knows no such attention raises; padded batches serve every model
        packs = False
    finally:
        _windows = None
    if not packs:
        lm.model.set_attn_implementation(before)
    return packs


def _hands_on_windows(config: PreTrainedConfig, windows: Sequence[int | None]) -> bool:
    """Whether the layers with a window gave it to their attention: some have it in the mask alone, which packing replaces,
    and the texts of a trial are shorter."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    num_sliding = sum("sliding" in kind for kind in kinds) if kinds else len(windows)
    return not window or windows.count(window) >= num_sliding


def _drops(model: nn.Module) -> bool:
    """Whether training drops anything: a shared beginning would lose the same for all texts, and attention drops nothing."""
    modules = [m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0) for m in model.modules()]
    return any(
        isinstance(rate, (int, float)) and rate > 0 for rate in [*modules, *_rates(model.config.get_text_config())]
    )


def _rates(config: PreTrainedConfig) -> Iterator[object]:
    """What a configuration says of dropout, by any name, but for heads that a language model does not have."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _rates(value)
        elif "drop" in name and not name.startswith(("classifier", "summary")):
            yield value
