"""From row losses to per-sample mean losses and FLOW weights in one launch; with the temperature known, the loss of a
batch of logits and its weights come from one pass over the logits.

S samples; sample s owns rows [start_s, end_s): T rows each in a padded batch, or `cu_seqlens[s] : cu_seqlens[s + 1]`.
With V_s its rows that have a target,

    f_s = sum over V_s of loss / |V_s|          w_s = exp(-f_s / tau), normalised over the batch if asked:
                                                w_s = scale exp(-(f_s - min f) / tau) / sum_k exp(-(f_k - min f) / tau)

"simplex" has scale 1, "mean" the number of samples with targets.
A sample without targets has f = 0 and w = 0 and is left out of the sum. 12 bytes are read a row, 8 written a sample.
Plain weights: one program per BLOCK_SAMPLES samples. Normalised ones: one program walks them all, because only a single
program can sum in a fixed order without a second launch or atomics; the row losses of a batch are a V-th of its logits,
so one multiprocessor is enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flow_kernels.kernels.softmax_row import LOG2E

BLOCK_SAMPLES = 8
BLOCK_TOKENS = 128
NUM_WARPS = 4


@triton.jit
def _mean_losses(
    loss_ptr, target_ptr, cu_seqlens_ptr, sample, num_samples, num_tokens, ignore_index,
    BLOCK_SAMPLES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Mean loss and number of targets of BLOCK_SAMPLES samples, each token position summed in order."""
    exists = sample < num_samples
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sample, mask=exists, other=0)
        # num_tokens are all that there are: offsets beyond them, which nobody has looked at on a GPU, read nothing.
        end = tl.minimum(tl.load(cu_seqlens_ptr + sample + 1, mask=exists, other=0), num_tokens)
    else:
        start = sample.to(tl.int64) * num_tokens
        end = tl.where(exists, start + num_tokens, start)
    total = tl.zeros([BLOCK_SAMPLES, BLOCK_TOKENS], tl.float32)
    count = tl.zeros([BLOCK_SAMPLES, BLOCK_TOKENS], tl.float32)
    for token in range(0, tl.max(end - start, 0), BLOCK_TOKENS):
        row = start[:, None] + token + tl.arange(0, BLOCK_TOKENS)[None, :]
        inside = row < end[:, None]
        has_target = tl.load(target_ptr + row, mask=inside, other=ignore_index) != ignore_index
        total += tl.load(loss_ptr + row, mask=has_target, other=0.0)
        count += has_target.to(tl.float32)
    num_targets = tl.sum(count, 1)
    return tl.sum(total, 1) / tl.maximum(num_targets, 1.0), num_targets


@triton.jit
def flow_weights_kernel(
    loss_ptr, target_ptr, cu_seqlens_ptr, tau_ptr, mean_loss_ptr, weight_ptr,
    num_samples, num_tokens, ignore_index, is_mean,
    IS_NORMALIZED: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Mean losses and weights; the grid is one program where weights are normalised."""
    rate = LOG2E / tl.load(tau_ptr)
    lanes = tl.arange(0, BLOCK_SAMPLES)
    last = num_samples
    if not IS_NORMALIZED:
        last = (tl.program_id(0) + 1) * BLOCK_SAMPLES
    low = tl.full([BLOCK_SAMPLES], float("inf"), tl.float32)
    total = tl.zeros([BLOCK_SAMPLES], tl.float32)
    present = tl.zeros([BLOCK_SAMPLES], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_SAMPLES, last, BLOCK_SAMPLES):
        sample = first + lanes
        exists = sample < num_samples
        mean_loss, num_targets = _mean_losses(
            loss_ptr, target_ptr, cu_seqlens_ptr, sample, num_samples, num_tokens, ignore_index,
            BLOCK_SAMPLES, BLOCK_TOKENS,
        )  # fmt: skip
        tl.store(mean_loss_ptr + sample, mean_loss, mask=exists)
        if IS_NORMALIZED:
            # A running minimum and sum, as for lse; the sample's own loss stands in for its weight until both are known.
            held = tl.where(num_targets > 0, mean_loss, float("inf"))
            new_low = tl.minimum(low, held)
            shift = tl.where(low == float("inf"), 0.0, tl.exp2((new_low - low) * rate))
            # Infinite where a sample has no target or an infinite loss: a weight of 0, and no inf - inf.
            total = total * shift + tl.where(held == float("inf"), 0.0, tl.exp2((new_low - held) * rate))
            low = new_low
            present += (num_targets > 0).to(tl.float32)
            tl.store(weight_ptr + sample, held, mask=exists)
        else:
            weight = tl.where(num_targets > 0, tl.exp2(-mean_loss * rate), 0.0)
            tl.store(weight_ptr + sample, weight, mask=exists)
    if IS_NORMALIZED:
        lowest = tl.min(low, 0)
        total = tl.sum(tl.where(low == float("inf"), 0.0, total * tl.exp2((lowest - low) * rate)), 0)
        scale = tl.where(is_mean != 0, tl.sum(present, 0), 1.0)
        tl.debug_barrier()
        for first in range(0, num_samples, BLOCK_SAMPLES):
            sample = first + lanes
            held = tl.load(weight_ptr + sample, mask=sample < num_samples, other=float("inf"))
            weight = tl.where(held == float("inf"), 0.0, scale * tl.exp2((lowest - held) * rate) / total)
            tl.store(weight_ptr + sample, weight, mask=sample < num_samples)


def flow_weights(
    loss: Tensor,
    target: Tensor,
    temperature: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """`reference.flow_weights` in one launch and without a synchronisation; fp32."""
    loss = loss.float()
    num_samples = loss.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    mean_loss = loss.new_empty(num_samples)
    weights = torch.empty_like(mean_loss)
    if num_samples:
        is_normalized = normalize != "none"
        grid = (1 if is_normalized else triton.cdiv(num_samples, BLOCK_SAMPLES),)
        with torch.cuda.device_of(loss):
            flow_weights_kernel[grid](
                loss.contiguous(), target.contiguous(),
                None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
                temperature.to(loss.device, torch.float32), mean_loss, weights,
                num_samples, loss.shape[0 if cu_seqlens is not None else 1], ignore_index, int(normalize == "mean"),
                IS_NORMALIZED=is_normalized, BLOCK_SAMPLES=BLOCK_SAMPLES, BLOCK_TOKENS=BLOCK_TOKENS,
                num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return mean_loss, weights
