"""Every operator in a few lines of eager torch, in any dtype up to fp64: the definition, and the oracle of the tests.

N rows, V vocabulary entries, D hidden. For one row with logits z and target y, where `b` is the class weight of y
(1 without class weights), `e` the label smoothing, `l` the z-loss factor and `c` the soft-cap:

    z     = c * tanh(z / c)                                         if c > 0
    lse   = log sum_j exp(z_j)
    loss  = (1 - e) b (lse - z_y) + (e / V) sum_j weight_j (lse - z_j) + l lse^2
    dz_j  = ((1 - e) b + (e / V) sum_k weight_k + 2 l lse) p_j - (1 - e) b [j = y] - (e / V) weight_j
    dz_j *= 1 - (z_j / c)^2                                         if c > 0
    entropy = lse - sum_j p_j z_j

The first two terms of `loss` are those of `torch.nn.functional.cross_entropy`. Arithmetic is fp32 (fp64 for fp64
input); a matrix product runs in the dtype of its inputs, so bf16 logits are rounded once before they are widened,
as an eager model does.

Rows whose target is `ignore_index`, and rows of weight 0, are left out by selection, never by multiplication, so a
NaN in them reaches nothing. The selection is data-dependent: on an accelerator this backend synchronises.
`grad_filter_eps`, a permission to leave out small gradients, is not made use of here.

`linear_weight` has the dtype of the input, or is fp32 beside 16 bits, as a model's is under autocast. Then it is rounded
to the input's dtype for the products (kernels that widen the input instead take it as it is), and its gradient is not
rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_kernels.dense_attention import packed_attention_bwd, packed_attention_fwd  # noqa: F401
from flow_kernels.products import add_product, rounded_product

# Bytes of one fp32 block of logits in the linear operator. Measured with benchmarks/head.py (benchmarks/results):
# smaller blocks read `linear_weight` too often, larger ones leave the cache and cost memory only.
LOGITS_BLOCK_BYTES = 64 * 2**20
MIN_CHUNK_ROWS = 64
# An accelerator has no such cache, and waits for `linear_weight` with fewer rows than this: R flops a byte of it, where
# an H100 does about 300 flops in the time of one byte. On paper, not measured.
ACCELERATOR_BLOCK_BYTES = 512 * 2**20
MIN_ACCELERATOR_ROWS = 256


def default_chunk_size(num_classes: int, device_type: str = "cpu") -> int:
    """Rows of logits that the linear operator holds at a time when `chunk_size` is not given."""
    is_cpu = device_type == "cpu"
    num_bytes, lowest = (
        (LOGITS_BLOCK_BYTES, MIN_CHUNK_ROWS) if is_cpu else (ACCELERATOR_BLOCK_BYTES, MIN_ACCELERATOR_ROWS)
    )
    return max(lowest, num_bytes // (4 * max(num_classes, 1)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else is accumulated in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _refuse_capture(device_type: str) -> None:
    """Say what torch would say of a value that is looked at while a CUDA graph is captured, and what to do."""
    if device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the reference looks at targets on the host, which a CUDA graph cannot hold (torch.compile's "
            "reduce-overhead makes one): name backend='triton', or leave the loss out of the graph"
        )


def check_target(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise `IndexError` naming the first row whose target is neither a class nor `ignore_index`."""
    _refuse_capture(target.device.type)
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"the target of row {row} is {int(target[row])}, outside [0, {num_classes}) and not ignore_index={ignore_index}"
        )


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def row_losses(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, label_smoothing: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, lse, correct)` of rows that all have a target; `logits` already in the accumulation dtype.

    The lse is fp64: the gradient of a confident row is made of z_y - lse, which can be far smaller than fp32's rounding
    of lse.
    """
    z = _cap(logits, softcap)
    z_max = z.amax(-1).detach()
    # -inf everywhere would give NaN from inf - inf; keep torch's result for it (NaN) without a special case.
    log_sum = torch.log(torch.exp(z - z_max[:, None]).sum(-1))
    lse = z_max + log_sum
    # (max - z_y) + log_sum instead of lse - z_y: no cancellation when the target is the maximum, so the loss of a
    # confident row, which FLOW weights most, keeps its relative precision.
    nll = (z_max - z.gather(1, target[:, None]).squeeze(1)) + log_sum
    # A row without a softmax, of a NaN or an infinite maximum, has no prediction; argmax would find the NaN.
    correct = (z.argmax(-1) == target) & ~nll.isnan()
    if class_weight is not None:
        nll = nll * class_weight[target]
    loss = (1 - label_smoothing) * nll
    if label_smoothing > 0:
        if class_weight is None:
            smooth = lse - z.mean(-1)
        else:
            smooth = (lse * class_weight.sum() - z @ class_weight) / z.shape[1]
        loss = loss + label_smoothing * smooth
    if z_loss > 0:
        loss = loss + z_loss * lse.square()
    return loss, z_max.double() + log_sum.double(), correct


def row_entropies(logits: Tensor, softcap: float) -> Tensor:
    """`- sum_j p_j log p_j` of every row, nats; `logits` already in the accumulation dtype."""
    z = _cap(logits, softcap)
    z = z - z.amax(-1, keepdim=True)
    e = z.exp()
    total = e.sum(-1)
    # 0 times -inf would be NaN, where p log p goes to 0: the clamp is below the logarithm of the smallest number.
    # Rounding must not make it negative.
    return (total.log() - (e * z.clamp(min=-1e4)).sum(-1) / total).clamp(min=0)


def row_gradients(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """Gradient of `sum(row_scale * loss)` with respect to `logits`, in the accumulation dtype."""
    z = _cap(logits, softcap)
    num_classes = z.shape[1]
    shift = lse.to(z.dtype)
    # What rounding took from lse, as a factor of every probability of the row.
    factor = torch.exp(shift - lse).to(z.dtype)
    hit = (1 - label_smoothing) * (torch.ones_like(shift) if class_weight is None else class_weight[target])
    spread = hit + 2 * z_loss * shift
    if label_smoothing > 0:
        spread = spread + label_smoothing * (1.0 if class_weight is None else class_weight.sum() / num_classes)
    p = torch.exp(z - shift[:, None])
    p_target = factor * p.gather(1, target[:, None]).squeeze(1)
    # At the target, spread * p - hit = (spread - hit) * p - hit * (1 - p). Near p = 1, where FLOW puts its weight, 1 - p
    # is taken as the sum of the others: rounding is then relative to each of them, not to 1.
    others = factor * p.scatter(1, target[:, None], 0.0).sum(1)
    dlogits = (spread * factor)[:, None] * p
    dlogits.scatter_(1, target[:, None], ((spread - hit) * p_target - hit * others)[:, None])
    if label_smoothing > 0:
        dlogits -= label_smoothing / num_classes * (1.0 if class_weight is None else class_weight)
    if softcap > 0:
        dlogits *= 1 - (z / softcap).square()
    return dlogits * row_scale[:, None]


def _row_chunks(keep: Tensor, num_classes: int, chunk_size: int) -> tuple[Tensor, ...]:
    """Indices of the kept rows, in chunks."""
    rows = keep.nonzero().squeeze(1)
    if not rows.numel():
        return ()
    return rows.split(chunk_size if chunk_size > 0 else default_chunk_size(num_classes, keep.device.type))


def cross_entropy_fwd(logits, target, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """Per-row `(loss [N], lse [N] fp64, correct [N] bool)` of `logits [N, V]`; 0, 0 and False for ignored rows."""
    check_target(target, logits.shape[1], ignore_index)
    dtype = accumulation_dtype(logits.dtype)
    loss = logits.new_zeros(logits.shape[0], dtype=dtype)
    lse = torch.zeros_like(loss, dtype=torch.float64)
    correct = torch.zeros_like(loss, dtype=torch.bool)
    for rows in _row_chunks(target != ignore_index, logits.shape[1], 0):
        loss[rows], lse[rows], correct[rows] = row_losses(
            logits[rows].to(dtype), target[rows], class_weight, label_smoothing, softcap, z_loss
        )
    return loss, lse, correct


def cross_entropy_score(logits, target, ignore_index, softcap):
    """Per-row `(loss [N], correct [N] bool, entropy [N])` of `logits [N, V]`, forward only; 0 for ignored rows."""
    check_target(target, logits.shape[1], ignore_index)
    return _scores(target, ignore_index, softcap, logits.shape[1], 0, lambda rows: logits[rows], logits)


def _scores(target, ignore_index, softcap, num_classes, chunk_size, logits_of, like):
    loss = like.new_zeros(len(target), dtype=accumulation_dtype(like.dtype))
    entropy, correct = torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.bool)
    for rows in _row_chunks(target != ignore_index, num_classes, chunk_size):
        logits = logits_of(rows).to(loss.dtype)
        loss[rows], _, correct[rows] = row_losses(logits, target[rows], None, 0.0, softcap, 0.0)
        entropy[rows] = row_entropies(logits, softcap)
    return loss, correct, entropy


def cross_entropy_bwd(dloss, logits, target, lse, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """`dlogits [N, V]` for the upstream gradient `dloss [N]` of the row losses."""
    dlogits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for rows in _row_chunks((target != ignore_index) & (dloss != 0), logits.shape[1], 0):
        dlogits[rows] = row_gradients(
            logits[rows].to(accumulation_dtype(logits.dtype)), target[rows], lse[rows], dloss[rows],
            class_weight, label_smoothing, softcap, z_loss,
        ).to(logits.dtype)  # fmt: skip
    return dlogits


def cross_entropy_fwd_bwd(logits, target, row_weight, class_weight, ignore_index, label_smoothing, softcap, z_loss):
    """`(total, loss [N], dlogits [N, V])` with `total = sum(row_weight * loss)`; rows of weight 0 are left out."""
    check_target(target, logits.shape[1], ignore_index)
    dtype = accumulation_dtype(logits.dtype)
    loss = logits.new_zeros(logits.shape[0], dtype=dtype)
    dlogits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for rows in _row_chunks((target != ignore_index) & (row_weight != 0), logits.shape[1], 0):
        z = logits[rows].to(dtype)
        loss[rows], lse, _ = row_losses(z, target[rows], class_weight, label_smoothing, softcap, z_loss)
        dlogits[rows] = row_gradients(
            z, target[rows], lse, row_weight[rows], class_weight, label_smoothing, softcap, z_loss
        ).to(logits.dtype)
    return (row_weight * loss).sum(), loss, dlogits


def sum_rows(columns, cu_seqlens):
    """Sum `columns [S, T, C]` over T, or with `cu_seqlens [S + 1]` `columns [N, C]` over each sample's rows; `[S, C]`."""
    if cu_seqlens is None:
        return columns.sum(1)
    # Offsets beyond the rows, which nobody has looked at on a GPU, take none.
    lengths = cu_seqlens.to(torch.int64).clamp(max=columns.shape[0]).diff()
    return torch.segment_reduce(columns, "sum", lengths=lengths, axis=0, unsafe=True)


def flow_weights(loss, target, temperature, cu_seqlens, ignore_index, normalize):
    """`(mean_loss, weights)` of the samples that the rows belong to, `[S]` each.

    Args:
        loss: row losses, `[S, T]`, or `[N]` with `cu_seqlens [S + 1]`; those of rows without a target do not count.
        target: int64 of the same shape.
        temperature: 0-d, nats.
        normalize: "none", "mean" or "simplex", over the samples that have a target; the others get 0 and 0.
    """
    keep = target != ignore_index
    # fp64, so that a sample's mean does not depend on the order of its rows.
    columns = torch.stack([torch.where(keep, loss, 0).double(), keep.double()], -1)
    total, count = sum_rows(columns, cu_seqlens).unbind(-1)
    has_target = count > 0
    mean_loss = total / count.clamp(min=1)
    exponent = torch.where(has_target, -mean_loss / temperature.double(), -torch.inf)
    if normalize == "none":
        weights = exponent.exp()
    else:
        # Where no sample has a target and a finite loss: 0 everywhere, where the softmax of nothing would be NaN.
        scale = has_target.sum() if normalize == "mean" else 1
        weights = torch.where(exponent == -torch.inf, 0, scale * exponent.softmax(0))
    dtype = accumulation_dtype(loss.dtype)
    return mean_loss.to(dtype), weights.to(dtype)


def _logits(input, linear_weight, linear_bias):
    logits = input @ linear_weight.T
    logits = logits.to(accumulation_dtype(logits.dtype))
    return logits if linear_bias is None else logits + linear_bias.to(logits.dtype)


def linear_cross_entropy_fwd(
    input, linear_weight, target, linear_bias, class_weight, ignore_index, label_smoothing, softcap, z_loss, chunk_size,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`cross_entropy_fwd` of `input [N, D] @ linear_weight [V, D].T + linear_bias [V]`, a chunk of logits at a time."""
    num_classes = linear_weight.shape[0]
    check_target(target, num_classes, ignore_index)
    linear_weight = head_to_multiply(input, linear_weight)
    loss = input.new_zeros(input.shape[0], dtype=accumulation_dtype(input.dtype))
    lse = torch.zeros_like(loss, dtype=torch.float64)
    correct = torch.zeros_like(loss, dtype=torch.bool)
    for rows in _row_chunks(target != ignore_index, num_classes, chunk_size):
        loss[rows], lse[rows], correct[rows] = row_losses(
            _logits(input[rows], linear_weight, linear_bias), target[rows],
            class_weight, label_smoothing, softcap, z_loss,
        )  # fmt: skip
    return loss, lse, correct


def linear_cross_entropy_score(input, linear_weight, target, linear_bias, ignore_index, softcap, chunk_size):
    """`cross_entropy_score` of `input [N, D] @ linear_weight [V, D].T + linear_bias [V]`, a chunk at a time."""
    num_classes = linear_weight.shape[0]
    check_target(target, num_classes, ignore_index)
    linear_weight = head_to_multiply(input, linear_weight)
    return _scores(
        target, ignore_index, softcap, num_classes, chunk_size,
        lambda rows: _logits(input[rows], linear_weight, linear_bias), input,
    )  # fmt: skip


def head_to_multiply(input: Tensor, linear_weight: Tensor) -> Tensor:
    """`linear_weight` in the dtype of `input`, which it has, or it is fp32 beside 16 bits."""
    is_wide = linear_weight.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
    if linear_weight.dtype != input.dtype and not is_wide:
        raise TypeError(f"linear_weight is {linear_weight.dtype} but input is {input.dtype}")
    return linear_weight.to(input.dtype)


class _HeadGradients:
    """The gradients of the head that were asked for, accumulated chunk by chunk in fp32 and rounded once.

    `linear_weight` is the one that was given; `self.linear_weight`, of the input's dtype, is the one to multiply with.
    """

    def __init__(self, input, linear_weight, linear_bias, need_dinput, need_dlinear_weight, need_dlinear_bias):
        dtype = accumulation_dtype(input.dtype)
        self.input, self.linear_weight = input, head_to_multiply(input, linear_weight)
        self.linear_weight_dtype = linear_weight.dtype
        self.linear_bias_dtype = input.dtype if linear_bias is None else linear_bias.dtype
        num_classes = linear_weight.shape[0]
        # An empty tensor stands for a gradient nobody asked for: custom operators cannot return None.
        self.dinput = (
            torch.zeros_like(input, memory_format=torch.contiguous_format) if need_dinput else input.new_empty(0)
        )
        shape = linear_weight.shape if need_dlinear_weight else (0,)
        self.dlinear_weight = linear_weight.new_zeros(shape, dtype=dtype)
        self.dlinear_bias = linear_weight.new_zeros(num_classes if need_dlinear_bias else 0, dtype=dtype)
        self.needs = (need_dinput, need_dlinear_weight, need_dlinear_bias)

    def add(self, rows, dlogits):
        need_dinput, need_dlinear_weight, need_dlinear_bias = self.needs
        if need_dlinear_bias:
            self.dlinear_bias += dlogits.sum(0)
        dlogits = dlogits.to(self.input.dtype)
        if need_dinput:
            self.dinput[rows] = rounded_product(dlogits, self.linear_weight)
        if need_dlinear_weight:
            add_product(self.dlinear_weight, dlogits.T, self.input[rows])

    def result(self):
        return (
            self.dinput,
            self.dlinear_weight.to(self.linear_weight_dtype),
            self.dlinear_bias.to(self.linear_bias_dtype),
        )


def linear_cross_entropy_bwd(
    dloss, input, linear_weight, target, lse, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`(dinput, dlinear_weight, dlinear_bias)` for the upstream gradient `dloss [N]`; the logits are made again."""
    grads = _HeadGradients(input, linear_weight, linear_bias, need_dinput, need_dlinear_weight, need_dlinear_bias)
    for rows in _row_chunks((target != ignore_index) & (dloss != 0), linear_weight.shape[0], chunk_size):
        logits = _logits(input[rows], grads.linear_weight, linear_bias)
        grads.add(
            rows,
            row_gradients(logits, target[rows], lse[rows], dloss[rows], class_weight, label_smoothing, softcap, z_loss),
        )
    return grads.result()


def linear_cross_entropy_fwd_bwd(
    input, linear_weight, target, row_weight, linear_bias, class_weight,
    ignore_index, label_smoothing, softcap, z_loss, chunk_size, need_dinput, need_dlinear_weight, need_dlinear_bias,
    grad_filter_eps=0.0,
):  # fmt: skip
    """`(total, loss [N], dinput, dlinear_weight, dlinear_bias)` of `total = sum(row_weight * loss)` in one pass."""
    num_classes = linear_weight.shape[0]
    check_target(target, num_classes, ignore_index)
    loss = input.new_zeros(input.shape[0], dtype=accumulation_dtype(input.dtype))
    grads = _HeadGradients(input, linear_weight, linear_bias, need_dinput, need_dlinear_weight, need_dlinear_bias)
    for rows in _row_chunks((target != ignore_index) & (row_weight != 0), num_classes, chunk_size):
        logits = _logits(input[rows], grads.linear_weight, linear_bias)
        loss[rows], lse, _ = row_losses(logits, target[rows], class_weight, label_smoothing, softcap, z_loss)
        grads.add(
            rows,
            row_gradients(logits, target[rows], lse, row_weight[rows], class_weight, label_smoothing, softcap, z_loss),
        )
    return (row_weight * loss).sum(), loss, *grads.result()
