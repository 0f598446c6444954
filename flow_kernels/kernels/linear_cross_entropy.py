"""Cross-entropy of a linear head: the row kernels of Triton on chunks of logits (`flow_kernels.chunks`).

On an H100 in bf16, 8192 rows, training takes 1.6 of the time of the bare products at their best rate where D is 576 or
640, 1.45 at 1024, 1.3 at 2304 and 4096; scoring 1.7, 1.4 and 1.2 (benchmarks/results/gpu.md). What is lost: of training at
V = 262144, D = 640 (17.2 ms) about 5 ms go to the row kernel, which moves 6 bytes a logit, and the product of the logits,
2 D flops a logit, is as near to memory's limit as to arithmetic's.
"""

from __future__ import annotations

import torch

from flow_kernels.chunks import SCORING_ROWS, TRAINING_ROWS, Chunks, HeadGradients, fwd_bwd
from flow_kernels.kernels.cross_entropy import (
    check_classes,
    launch_bwd,
    launch_fwd,
    launch_fwd_bwd,
    with_padding,
    with_sum,
)


def linear_cross_entropy_fwd(
    input, linear_weight, target, linear_bias, class_weight, ignore_index, label_smoothing, softcap, z_loss, chunk_size,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`reference.linear_cross_entropy_fwd`; holds one chunk of logits and stores none."""
    options = (ignore_index, label_smoothing, softcap, z_loss)
    chunks = Chunks(input, linear_weight, chunk_size, SCORING_ROWS)
    check_classes(linear_weight.shape[0], target, ignore_index)
    target, linear_bias, class_weight = target.contiguous(), with_padding(linear_bias), with_sum(class_weight)
    loss = input.new_empty(input.shape[0], dtype=torch.float32)
    lse, correct = torch.empty_like(loss, dtype=torch.float64), torch.empty_like(loss, dtype=torch.bool)
    for rows, logits in chunks:
        launch_fwd(
            logits, target[rows], linear_bias, class_weight, loss[rows], lse[rows], correct[rows], options, chunks.end
        )  # fmt: skip
    return loss, lse, correct


def linear_cross_entropy_bwd(
    dloss, input, linear_weight, target, lse, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`reference.linear_cross_entropy_bwd`; the logits are made again, a chunk at a time."""
    options = (ignore_index, label_smoothing, softcap, z_loss)
    needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)
    dloss, lse, target = dloss.float().contiguous(), lse.contiguous(), target.contiguous()
    keep = (target != ignore_index) & (dloss != 0)
    grads = HeadGradients(input, linear_weight, linear_bias, keep, needs)
    linear_bias, class_weight = with_padding(linear_bias), with_sum(class_weight)
    chunks = Chunks(input, grads.linear_weight, chunk_size, TRAINING_ROWS)
    for rows, logits in chunks:
        for part, dlogits in grads.parts(logits):
            launch_bwd(
                dloss[rows][part], logits[part], target[rows][part], lse[rows][part], linear_bias, class_weight,
                dlogits, options, chunks.end,
            )  # fmt: skip
        grads.add(rows, logits)
    return grads.result()


def linear_cross_entropy_fwd_bwd(
    input, linear_weight, target, row_weight, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`reference.linear_cross_entropy_fwd_bwd`; each chunk's gradient takes the place of its logits."""
    options = (ignore_index, label_smoothing, softcap, z_loss)
    check_classes(linear_weight.shape[0], target, ignore_index)
    bias, class_weight = with_padding(linear_bias), with_sum(class_weight)

    def write(logits, target, row_weight, loss, dlogits, end):
        launch_fwd_bwd(logits, target, row_weight, bias, class_weight, loss, dlogits, options, end)

    needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)
    return fwd_bwd(write, input, linear_weight, target, row_weight, linear_bias, ignore_index, chunk_size, needs)
