"""What is compared: the fused loss and the ways it is done without it, all under one signature.

`loss(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows)` returns per-row losses for "none"
and the sum over rows of weight * loss / N for "mean". Rows of target -100 do not count. Each is a function of a name
in `IMPLEMENTATIONS`; one that cannot serve a call raises NotImplementedError with the reason, which the harness prints.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import flow_kernels

# TRL's documented chunk of rows.
TRL_CHUNK_ROWS = 256
# Beyond this many shapes torch.compile would go on in eager mode without a word; a sweep has more.
torch._dynamo.config.recompile_limit = 64


def flow(backend):
    def loss(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
        return flow_kernels.linear_cross_entropy(
            input, linear_weight, target, sample_weight=sample_weight, softcap=softcap, reduction=reduction,
            backend=backend,
        )  # fmt: skip

    return loss


def _logits(input, linear_weight, softcap):
    logits = input @ linear_weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _mean(losses, target, sample_weight):
    return (losses if sample_weight is None else sample_weight * losses).sum() / (target != -100).sum()


def _reduce(logits, target, sample_weight, reduction):
    if reduction == "none" or sample_weight is not None:
        losses = F.cross_entropy(logits, target, reduction="none")
        return losses if reduction == "none" else _mean(losses, target, sample_weight)
    return F.cross_entropy(logits, target)


def eager_fp32(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
    """What transformers does: bf16 logits, widened as a whole."""
    return _reduce(_logits(input, linear_weight, softcap).float(), target, sample_weight, reduction)


def eager_bf16(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
    return _reduce(_logits(input, linear_weight, softcap), target, sample_weight, reduction)


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def compiled_fp32(*arguments):
    return _compiled(eager_fp32)(*arguments)


def compiled_bf16(*arguments):
    return _compiled(eager_bf16)(*arguments)


def torch_linear(options_of):
    """`F.linear_cross_entropy` with the options that `options_of(chunk_rows)` gives."""

    def loss(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
        if softcap is not None:
            raise NotImplementedError("F.linear_cross_entropy has no soft-cap")
        options = options_of(chunk_rows)
        if sample_weight is None:
            return F.linear_cross_entropy(input, linear_weight, target, reduction=reduction, options=options)
        losses = F.linear_cross_entropy(input, linear_weight, target, reduction="none", options=options)
        return losses if reduction == "none" else _mean(losses, target, sample_weight)

    return loss


def trl_chunked(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
    """TRL's `loss_type="chunked_nll"` as its pull request 5575 and the notes of release 1.13 describe it.

    Ignored rows are dropped before the head; chunks of 256 rows, bf16 logits widened chunk by chunk, every chunk made
    again in the backward pass. Without its accuracy and entropy sums, which would make it slower.
    """
    kept = (target != -100).nonzero()[:, 0]
    losses = []
    for rows in kept.split(TRL_CHUNK_ROWS):

        def part(h, w, labels):
            return F.cross_entropy(_logits(h, w, softcap).float(), labels, reduction="none")

        inputs = (input[rows], linear_weight, target[rows])
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        losses.append(checkpoint(part, *inputs, use_reentrant=False) if wants_grad else part(*inputs))
    losses = torch.cat(losses)
    if reduction == "none":
        return losses.new_zeros(target.shape).index_put((kept,), losses)
    return (losses if sample_weight is None else sample_weight[kept] * losses).sum() / kept.numel()


def _require(package: str) -> None:
    for name in (package, "triton"):
        if importlib.util.find_spec(name) is None:
            raise NotImplementedError(
                f"no module {name}; pip install triton; pip install --no-deps {_PACKAGES[package]}"
            )


def cut_cross_entropy(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
    """The package's one CPU path: torch.compile of the eager expression, with shapes left dynamic."""
    _require("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(input, linear_weight, target, softcap=softcap, reduction="none", impl="torch_compile")
    return losses if reduction == "none" else _mean(losses, target, sample_weight)


def liger(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
    """Liger's fused linear cross-entropy; Triton kernels only, so on a CPU it ends with Triton's error."""
    _require("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap, reduction=reduction)
    return loss(linear_weight, input, target)


def matmul(input, linear_weight, target, sample_weight, softcap, reduction, chunk_rows):
    """The floor of scoring: the product alone, its result written once."""
    return torch.mm(input, linear_weight.T)


# Without their own requirements, which would replace torch.
_PACKAGES = {"cut_cross_entropy": "cut-cross-entropy", "liger_kernel": "liger-kernel"}
FLOW, REFERENCE, EAGER, FLOOR = "flow cpu", "flow reference", "eager, fp32 logits", "torch.mm"
DEFAULT_CHUNKS = "F.linear_cross_entropy, default chunks"
IMPLEMENTATIONS = {
    FLOW: flow("cpu"),
    REFERENCE: flow("reference"),
    EAGER: eager_fp32,
    "eager, 16-bit logits": eager_bf16,
    "compiled, fp32 logits": compiled_fp32,
    "compiled, 16-bit logits": compiled_bf16,
    "F.linear_cross_entropy": torch_linear(lambda chunk_rows: None),
    DEFAULT_CHUNKS: torch_linear(lambda chunk_rows: torch.nn.LinearCrossEntropyOptions()),
    "F.linear_cross_entropy, best chunk": torch_linear(
        lambda chunk_rows: torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
    ),
    "TRL chunked_nll": trl_chunked,
    "cut-cross-entropy, torch_compile": cut_cross_entropy,
    "Liger": liger,
    FLOOR: matmul,
}
# Without a GPU the Triton kernels run in their interpreter, which can be asked for errors but not for times.
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    sys.path.append(str(Path(__file__).parent.parent))
    importlib.import_module("conftest")  # makes the interpreter round to bf16 as a GPU does
    IMPLEMENTATIONS["flow triton, interpreted"] = flow("triton")
