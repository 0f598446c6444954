"""Attention of texts that lie behind each other in one row, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from flow_kernels import backends, ops
from flow_kernels.autocast import cast_all_for_autocast
from flow_kernels.rows import check_floating, check_no_tangent, check_same_device


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention within the texts of a packed row, whose common beginnings need to be there only once.

    The row's N tokens are cut into S segments. A token sees what stands before it in its own segment, itself, and all of
    the segments before its own: those that its segment comes after, the ones that these come after, and so on. Texts
    that share nothing are a segment each.

    On a CPU this is a kernel of csrc/cpu: in bf16 on 2 cores with AMX (Gemma 3 270M's 4 heads of 256 with one key head)
    8 texts of 180 to 250 tokens take 3.8 ms forward and 8.3 backward, where torch's scaled_dot_product_attention takes
    9.7 and 27.7 with padding (benchmarks/attention.py). Memory does not grow with N^2, and results are bit-equal for any
    number of threads. Elsewhere it is eager torch, `[H, N, N]` scores and all: for tests, not for training.

    Args:
        query: `[N, H, d]`, fp32, bf16 or fp16 (fp64 by the eager code). Sums are fp32.
        key: `[N, G, d]` with H a multiple of G; each key head serves H / G query heads (at most 256 by "cpu").
        value: as key.
        segments: `[S, 3]` int64: the first token, the one behind the last, and the index of the segment that it comes
            after, an earlier one, or -1. They follow each other without gaps.
        scale: what products are multiplied by; 1 / sqrt(d) by default.
        window: how many tokens of its text a token sees, itself included; all by default.
        backend: "auto", "cpu" or "reference".

    Returns:
        `[N, H, d]` of query's dtype. Differentiable in query, key and value, once.

    Raises:
        ValueError: shapes or devices that do not fit, segments with gaps or after a later one, a window below 1, or a
            scale that is not above 0.
        TypeError: dtypes that differ, or one that is no floating dtype.
        NotImplementedError: forward mode.
        BackendUnavailable: the named backend cannot serve the device or dtype.
    """
    query, key, value = cast_all_for_autocast(query, key, value)
    for name, heads in (("query", query), ("key", key), ("value", value)):
        check_floating(name, heads)
        if heads.dtype != query.dtype:
            raise TypeError(f"{name} is {heads.dtype} but query is {query.dtype}")
        if heads.ndim != 3:
            raise ValueError(f"{name} must have shape [N, heads, d], got {tuple(heads.shape)}")
    num_tokens, num_heads, dim = query.shape
    fits = key.shape == value.shape and key.shape[::2] == (num_tokens, dim)
    if not fits or not key.shape[1] or not num_heads or num_heads % key.shape[1] or not dim:
        raise ValueError(
            f"query [N, H, d], key and value [N, G, d] with H a multiple of G, and none of them 0 but N, do not fit: "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not isinstance(segments, Tensor):
        raise TypeError(f"segments must be a tensor, got {type(segments).__name__}")
    check_same_device(query, of="query", key=key, value=value, segments=segments)
    if segments.dtype != torch.int64 or segments.ndim != 2 or segments.shape[1] != 3:
        raise ValueError(f"segments must be int64 of shape [S, 3], got {segments.dtype} of {tuple(segments.shape)}")
    scale = dim**-0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, a token sees itself; got {window}")
    if not torch.compiler.is_compiling():
        check_segments(segments, num_tokens)
    check_no_tangent("scaled_dot_product_attention", query, key, value)
    chosen = backends.resolve(backend, query.device.type, query.dtype, "packed_attention_bwd")
    return ops.packed_attention_fwd(query, key, value, segments, scale, window or 0, chosen)[0]


def check_segments(segments: Tensor, num_tokens: int) -> None:
    """Raise `ValueError` unless the segments cover `num_tokens` tokens in order, each after an earlier one or -1."""
    at = 0
    for index, (start, end, parent) in enumerate(segments.tolist()):
        if start != at or end <= start or not -1 <= parent < index:
            raise ValueError(
                f"segment {index} is [{start}, {end}) after segment {parent}; segments follow each other without gaps "
                f"(this one starts at {at}), have a token, and come after an earlier segment or -1"
            )
        at = end
    if at != num_tokens:
        raise ValueError(f"segments end at {at} and there are {num_tokens} tokens")
