"""What is compared: the fused loss and the ways it is done without it, all under one signature.

`loss(input, linear_weight, target, sample_weight, softcap, reduction)` returns per-row losses for "none" and the sum
over rows of weight * loss / N for "mean". Rows of target -100 do not count.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import flow_kernels

CHUNK_ROWS = 256


def flow(backend):
    def loss(input, linear_weight, target, sample_weight, softcap, reduction):
        return flow_kernels.linear_cross_entropy(
            input, linear_weight, target, sample_weight=sample_weight, softcap=softcap, reduction=reduction,
            backend=backend,
        )  # fmt: skip

    return loss


def _logits(input, linear_weight, softcap):
    logits = input @ linear_weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _reduce(logits, target, sample_weight, reduction):
    if reduction == "none" or sample_weight is not None:
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss if reduction == "none" else (sample_weight * loss).sum() / (target != -100).sum()
    return F.cross_entropy(logits, target)


def eager_fp32(input, linear_weight, target, sample_weight, softcap, reduction):
    """What transformers does: bf16 logits, widened as a whole."""
    return _reduce(_logits(input, linear_weight, softcap).float(), target, sample_weight, reduction)


def eager_bf16(input, linear_weight, target, sample_weight, softcap, reduction):
    return _reduce(_logits(input, linear_weight, softcap), target, sample_weight, reduction)


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def compiled_fp32(*arguments):
    return _compiled(eager_fp32)(*arguments)


def compiled_bf16(*arguments):
    return _compiled(eager_bf16)(*arguments)


def torch_chunked(input, linear_weight, target, sample_weight, softcap, reduction):
    """`F.linear_cross_entropy` with chunks of 256 rows; its default took 140 s a call on the Gemma 3 head."""
    if softcap is not None or sample_weight is not None:
        raise NotImplementedError("F.linear_cross_entropy has no soft-cap and no sample weights")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)
    return F.linear_cross_entropy(input, linear_weight, target, reduction=reduction, options=options)


def chunked_checkpoint(input, linear_weight, target, sample_weight, softcap, reduction):
    """Chunks of 256 rows, each made again in the backward pass: TRL's chunked loss as documented."""
    parts = []
    for rows in torch.arange(input.shape[0]).split(CHUNK_ROWS):
        some = slice(int(rows[0]), int(rows[-1]) + 1)

        def part(h, w, some=some):
            return F.cross_entropy(_logits(h, w, softcap).float(), target[some], reduction="none")

        inputs = (input[some], linear_weight)
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        parts.append(checkpoint(part, *inputs, use_reentrant=False) if wants_grad else part(*inputs))
    loss = torch.cat(parts)
    if reduction == "none":
        return loss
    return (loss if sample_weight is None else sample_weight * loss).sum() / (target != -100).sum()


def matmul(input, linear_weight, target, sample_weight, softcap, reduction):
    """The floor: the product alone."""
    return torch.mm(input, linear_weight.T)


IMPLEMENTATIONS = {
    "flow cpu": flow("cpu"),
    "flow reference": flow("reference"),
    "eager, fp32 logits": eager_fp32,
    "eager, 16-bit logits": eager_bf16,
    "compiled, fp32 logits": compiled_fp32,
    "compiled, 16-bit logits": compiled_bf16,
    "F.linear_cross_entropy, 256 rows": torch_chunked,
    "chunks of 256, checkpointed": chunked_checkpoint,
    "torch.mm": matmul,
}

# cut-cross-entropy's CPU path is torch.compile of the eager expression; the package imports only beside triton.
if importlib.util.find_spec("cut_cross_entropy") and importlib.util.find_spec("triton"):
    from cut_cross_entropy import linear_cross_entropy as _cce

    def cut_cross_entropy(input, linear_weight, target, sample_weight, softcap, reduction):
        loss = _cce(input, linear_weight, target, softcap=softcap, reduction="none", impl="torch_compile")
        if reduction == "none":
            return loss
        return (loss if sample_weight is None else sample_weight * loss).sum() / (target != -100).sum()

    IMPLEMENTATIONS["cut-cross-entropy, torch_compile"] = cut_cross_entropy
