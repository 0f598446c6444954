"""Forward-only scores with the entropy of the prediction: one Triton kernel, of given logits and of a linear head.

As `cross_entropy_fwd_kernel` it reads each logit once; beside the running sum of e = exp(z - max) each thread keeps that
of e (z - max), one fused operation and one maximum more a logit:

    entropy = log_sum - (sum_j e_j (z_j - max)) / (sum_j e_j)

In 16 bits that is 9 instructions a logit where `cross_entropy_fwd_kernel` has 7 (benchmarks/results/gpu_static.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flow_kernels.chunks import SCORING_ROWS, Chunks
from flow_kernels.kernels import configs
from flow_kernels.kernels.cross_entropy import check_classes, check_rows, is_aligned, launch, with_padding
from flow_kernels.kernels.softmax_row import is_prediction, load_logits, merge_target, row_entropy, walk_row


@triton.jit
def cross_entropy_score_kernel(
    logits_ptr, target_ptr, bias_ptr, loss_ptr, correct_ptr, entropy_ptr,
    sizes, row_options, HAS_SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Loss, correctness and entropy of one row a program."""
    ignore_index, softcap = row_options
    V = sizes[0]
    width = (V, sizes[1])
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if (target != ignore_index) & (target >= 0) & (target < V):
        y = target.to(tl.int32)
        row_ptr = logits_ptr + row * sizes[2]
        z_target = load_logits(row_ptr, bias_ptr, y, width, softcap, HAS_SOFTCAP)
        z_max, others, _, max_before, product = walk_row(
            row_ptr, y, z_target, bias_ptr, None, width, softcap, False, HAS_SOFTCAP, True, ALIGNED, BLOCK_V, DEPTH
        )
        nll, _, _, _ = merge_target(z_max, others, z_target)
        tl.store(loss_ptr + row, nll)
        tl.store(entropy_ptr + row, row_entropy(z_max, others, product, z_target))
        tl.store(correct_ptr + row, is_prediction(z_target, z_max, max_before, nll))
    else:
        absent = tl.where(target == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, absent)
        tl.store(entropy_ptr + row, absent)
        tl.store(correct_ptr + row, False)


def _launch_score(logits, target, bias, scores, options, end=None) -> None:
    """Write `scores`, loss, correct and entropy of every row of `logits [N, V]`; `end` as for the other launchers."""
    num_rows, num_classes = logits.shape
    if num_rows:
        loss, correct, entropy = scores
        config = configs.walk(logits.dtype, num_classes, has_all_options=False)
        tensors = (logits, target, bias, loss, correct.view(torch.uint8), entropy)
        sizes, aligned = (num_classes, end, logits.stride(0)), is_aligned(end or num_classes, logits)
        launch(
            cross_entropy_score_kernel, config, (num_rows,), tensors, sizes, options, aligned,
            HAS_SOFTCAP=options[1] > 0,
        )  # fmt: skip


def _empty_scores(like):
    loss = like.new_empty(like.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss, dtype=torch.bool), torch.empty_like(loss)


def cross_entropy_score(logits, target, ignore_index, softcap):
    """`reference.cross_entropy_score`: each logit is read once."""
    logits = check_rows(logits, target, ignore_index)
    scores = _empty_scores(logits)
    _launch_score(logits, target.contiguous(), None, scores, (ignore_index, softcap))
    return scores


def linear_cross_entropy_score(input, linear_weight, target, linear_bias, ignore_index, softcap, chunk_size):
    """`reference.linear_cross_entropy_score`; holds one chunk of logits and stores none."""
    chunks = Chunks(input, linear_weight, chunk_size, SCORING_ROWS)
    check_classes(linear_weight.shape[0], target, ignore_index)
    target, linear_bias, scores = target.contiguous(), with_padding(linear_bias), _empty_scores(input)
    for rows, logits in chunks:
        part = [values[rows] for values in scores]
        _launch_score(logits, target[rows], linear_bias, part, (ignore_index, softcap), chunks.end)
    return scores
