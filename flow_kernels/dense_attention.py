"""Attention of a packed row in eager torch, all scores at once: the definition, and the oracle of the tests.

`segments` `[S, 3]` cut the N tokens of the row into segments: the first token, the one behind the last, and the segment
before it in its text, or -1. A token sees the segments before its own and, of its own, itself and what stands before it;
of these those less than `window` places back, where `window` is not 0. For token i and head h, with the key head g of h:

    lse[i, h] = log sum_j exp(scale q[i, h] . k[j, g])          over the j that i sees
    out[i, h] = sum_j exp(scale q[i, h] . k[j, g] - lse[i, h]) v[j, g]

Arithmetic is fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _seen(segments: Tensor, num_tokens: int, window: int) -> Tensor:
    """`[N, N]`: whether the token of the row sees the one of the column."""
    device = segments.device
    token = torch.arange(num_tokens, device=device)
    segment = torch.bucketize(token, segments[:, 1].contiguous(), right=True)
    # Whether segment s is t or stands before it in t's text, and where in their text segments start.
    before = torch.eye(len(segments), dtype=torch.bool, device=device)
    start = torch.zeros(len(segments), dtype=torch.int64, device=device)
    for s, (_, _, parent) in enumerate(segments.tolist()):
        if parent >= 0:
            before[s] |= before[parent]
            start[s] = start[parent] + segments[parent, 1] - segments[parent, 0]
    seen = before[segment][:, segment] & (token[None] <= token[:, None])
    if window:
        place = start[segment] + token - segments[segment, 0]
        seen &= place[:, None] - place[None] < window
    return seen


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in tensors]


def _per_head(key_heads: Tensor, num_heads: int) -> Tensor:
    return key_heads.repeat_interleave(num_heads // key_heads.shape[1], 1)


def packed_attention_fwd(query, key, value, segments, scale, window):
    """`(out, lse)` of query `[N, H, d]` and key and value `[N, G, d]`: `[N, H, d]` of their dtype, and `[N, H]`."""
    q, k, v = _wide(query, *(_per_head(t, query.shape[1]) for t in (key, value)))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = scores.masked_fill(~_seen(segments, len(query), window), -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("hij,jhd->ihd", (scores - lse[..., None]).exp(), v)
    return out.to(query.dtype).contiguous(), lse.t().contiguous()


def packed_attention_bwd(dout, query, key, value, lse, segments, scale, window):
    """`(dquery, dkey, dvalue)`, from the saved lse."""
    num_heads = query.shape[1]
    g, q, k, v = _wide(dout, query, *(_per_head(t, num_heads) for t in (key, value)))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    hidden = ~_seen(segments, len(query), window)
    p = (scores - lse.t()[..., None]).exp().masked_fill(hidden, 0)
    dp = torch.einsum("ihd,jhd->hij", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dkey, dvalue = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, g)
    dkey, dvalue = (t.unflatten(1, (key.shape[1], -1)).sum(2) for t in (dkey, dvalue))
    dquery = torch.einsum("hij,jhd->ihd", ds, k)
    return tuple(t.to(query.dtype).contiguous() for t in (dquery, dkey, dvalue))
