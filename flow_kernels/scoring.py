"""Forward-only losses, per token and per sample: no gradient buffers, no logits kept."""

from __future__ import annotations

from numbers import Real
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from flow_kernels import backends, ops
from flow_kernels.autocast import cast_for_autocast
from flow_kernels.losses import check_chunk_size, check_head, check_options
from flow_kernels.reference import accumulation_dtype, sum_rows
from flow_kernels.rows import Rows, check_floating, flatten, scalar
from flow_kernels.weighting import NORMALIZATIONS


class SampleScores(NamedTuple):
    """Per-sample sums over target tokens; `loss_sum / num_targets` is the loss that FLOW's weights come from."""

    loss_sum: Tensor  # [S] fp32 (fp64 of fp64 input, here and below), nats
    num_targets: Tensor  # [S] int64
    num_correct: Tensor  # [S] int64, tokens whose target has the highest logit


class SampleWeights(NamedTuple):
    """What `weigh_samples` returns; 0 and 0 for a sample without targets."""

    mean_loss: Tensor  # [S] fp32, nats per target token
    weight: Tensor  # [S] fp32


class TokenScores(NamedTuple):
    """Per-row scores in the shape of the target; 0 and False where it is ignored."""

    loss: Tensor  # fp32, nats: minus the log-probability of the target
    correct: Tensor  # bool: the target has the highest logit


class TokenEntropies(NamedTuple):
    """`TokenScores` with the entropy of each prediction, which `return_entropy=True` asks for."""

    loss: Tensor
    correct: Tensor
    entropy: Tensor  # fp32, nats


@overload
def score_tokens(
    input: Tensor, target: Tensor, *, return_entropy: Literal[False] = False, cu_seqlens: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, shift: bool = False, backend: str = "auto",
) -> TokenScores: ...  # fmt: skip
@overload
def score_tokens(
    input: Tensor, target: Tensor, *, return_entropy: Literal[True], cu_seqlens: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, shift: bool = False, backend: str = "auto",
) -> TokenEntropies: ...  # fmt: skip
@overload
def score_tokens(
    input: Tensor, target: Tensor, *, return_entropy: bool, cu_seqlens: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, shift: bool = False, backend: str = "auto",
) -> TokenScores | TokenEntropies: ...  # fmt: skip
@torch.no_grad()
def score_tokens(
    input: Tensor,
    target: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
    return_entropy: bool = False,
    backend: str = "auto",
) -> TokenScores | TokenEntropies:
    """Loss and correctness of every row of `input [..., V]`, and with `return_entropy` the entropy of what it predicts.

        log_p = F.log_softmax(input.float(), -1)
        loss = F.nll_loss(log_p, target, reduction="none")
        entropy = -(log_p.exp() * log_p).sum(-1)

    `cu_seqlens`, `ignore_index`, `softcap`, `shift` and `backend` are those of `cross_entropy`. The entropy is made in
    the same pass over the logits; it is after the soft-cap, as the loss is.
    """
    rows = flatten(input, target, cu_seqlens, ignore_index, shift)
    check_options(rows, input.shape[-1], None, 0.0, softcap, 0.0)
    head, cap = (rows.input, rows.target), float(softcap or 0.0)
    operator = "cross_entropy_score" if return_entropy else "cross_entropy_fwd"
    backend = backends.resolve(backend, input.device.type, input.dtype, operator)
    if return_entropy:
        return _in_shape(rows, *ops.cross_entropy_score(*head, ignore_index, cap, backend))
    loss, _, correct = ops.cross_entropy_fwd(*head, None, ignore_index, 0.0, cap, 0.0, backend)
    return _in_shape(rows, loss, correct)


def _in_shape(rows: Rows, *scores: Tensor) -> TokenScores | TokenEntropies:
    kind = TokenScores if len(scores) == 2 else TokenEntropies
    return kind(*(values.reshape(rows.shape) for values in scores))


@overload
def linear_score_tokens(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, return_entropy: Literal[False] = False,
    linear_bias: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int = -100,
    softcap: float | None = None, shift: bool = False, chunk_size: int | None = None, backend: str = "auto",
) -> TokenScores: ...  # fmt: skip
@overload
def linear_score_tokens(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, return_entropy: Literal[True],
    linear_bias: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int = -100,
    softcap: float | None = None, shift: bool = False, chunk_size: int | None = None, backend: str = "auto",
) -> TokenEntropies: ...  # fmt: skip
@overload
def linear_score_tokens(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, return_entropy: bool,
    linear_bias: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int = -100,
    softcap: float | None = None, shift: bool = False, chunk_size: int | None = None, backend: str = "auto",
) -> TokenScores | TokenEntropies: ...  # fmt: skip
@torch.no_grad()
def linear_score_tokens(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
    chunk_size: int | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> TokenScores | TokenEntropies:
    """`score_tokens` of a linear head, without ever holding the logits; the arguments are those of `linear_cross_entropy`."""
    input, linear_weight, linear_bias = cast_for_autocast(input, linear_weight, linear_bias)
    rows = flatten(input, target, cu_seqlens, ignore_index, shift)
    check_head(input, linear_weight, linear_bias)
    check_options(rows, linear_weight.shape[0], None, 0.0, softcap, 0.0)
    head, cap = (rows.input, linear_weight, rows.target, linear_bias), float(softcap or 0.0)
    chunk_size = check_chunk_size(chunk_size)
    operator = "linear_cross_entropy_score" if return_entropy else "linear_cross_entropy_fwd"
    backend = backends.resolve(backend, input.device.type, input.dtype, operator)
    if return_entropy:
        return _in_shape(rows, *ops.linear_cross_entropy_score(*head, ignore_index, cap, chunk_size, backend))
    loss, _, correct = ops.linear_cross_entropy_fwd(
        *head, None, ignore_index, 0.0, cap, 0.0, chunk_size, 0.0, backend
    )  # fmt: skip
    return _in_shape(rows, loss, correct)


def score_samples(input: Tensor, target: Tensor, *, cu_seqlens: Tensor | None = None, **options) -> SampleScores:
    """Per-sample losses of logits, summed over each sample's target tokens.

        nll = F.cross_entropy(input.float(), target, reduction="none")
        loss_sum, num_targets = nll.sum(1), (target != ignore_index).sum(1)

    Args:
        input: logits, `[B, T, V]` for a padded batch, `[N, V]` with `cu_seqlens` for a packed one, or `[N, V]` alone
            where every row is a sample.
        target: class indices, the shape of `input` without its last dimension.
        cu_seqlens: `[S + 1]` row offsets of the samples.
        **options: `ignore_index`, `softcap`, `shift`, `backend` as in `cross_entropy`.

    Returns:
        `(loss_sum, num_targets, num_correct)`, each with one entry per sample; a sample without targets has 0, 0, 0.

    Raises:
        As `cross_entropy`.
    """
    _no_entropy(options)
    scores = score_tokens(input, target, cu_seqlens=cu_seqlens, **options)
    return sum_samples(scores, target, cu_seqlens, options.get("ignore_index", -100), options.get("shift", False))


def linear_score_samples(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, cu_seqlens: Tensor | None = None, **options
) -> SampleScores:
    """`score_samples` of a linear head, `linear_bias` and `chunk_size` among the options; the logits are never held."""
    _no_entropy(options)
    scores = linear_score_tokens(input, linear_weight, target, cu_seqlens=cu_seqlens, **options)
    return sum_samples(scores, target, cu_seqlens, options.get("ignore_index", -100), options.get("shift", False))


def _no_entropy(options: dict) -> None:
    if options.get("return_entropy"):
        raise TypeError(
            "return_entropy is an option of score_tokens and linear_score_tokens; sum its entropy by sample"
        )


def _by_sample(flat: Tensor, target: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Flat values of the rows as `[S, T]`, each row a sample where the target is `[N]`; with `cu_seqlens` as they are."""
    if cu_seqlens is not None:
        return flat
    return flat.reshape(target.shape).flatten(1) if target.dim() >= 2 else flat.unsqueeze(1)


@torch.no_grad()
def sum_samples(
    scores: TokenScores,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> SampleScores:
    """Sum token scores over each sample, deterministically, in fp64 before the one rounding to the result.

    `ignore_index`, `shift` and `cu_seqlens` are those of the call that scored the tokens: the targets are counted here.
    """
    # An already flat target goes through flatten again only for its shift; a scalar logit stands in for the input.
    placeholder = scores.loss.unsqueeze(-1)
    valid = flatten(placeholder, target, cu_seqlens, ignore_index, shift).target != ignore_index
    flat = [scores.loss.reshape(-1).double(), valid.double(), scores.correct.reshape(-1).double()]
    columns = torch.stack([_by_sample(values, target, cu_seqlens) for values in flat], -1)
    sums = sum_rows(columns, cu_seqlens)
    return SampleScores(sums[:, 0].to(scores.loss.dtype), sums[:, 1].long(), sums[:, 2].long())


@torch.no_grad()
def weigh_samples(
    loss: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    normalize: str = "none",
    backend: str = "auto",
) -> SampleWeights:
    """FLOW weights of a batch from its row losses: with `score_tokens`, one pass over the logits gives both.

        mean_loss = loss.sum(1) / (target != ignore_index).sum(1)
        weight = torch.exp(-mean_loss / temperature)

    Nothing is looked at on the host, so it belongs into a training step; `flow_weights` is for a whole data set.

    Args:
        loss: row losses in the shape of `target`, floating, nats, such as `score_tokens(...).loss` of the pre-trained
            model; what stands where there is no target does not count.
        target: class indices, `[B, T]`, `[N]` with `cu_seqlens`, or `[N]` alone where every row is a sample.
        temperature: nats, a number or a 0-d tensor. A tensor's value is not checked.
        cu_seqlens: `[S + 1]` row offsets of the samples.
        ignore_index: target value of rows that do not count.
        shift: as in `cross_entropy`; `loss` is then that of a call with `shift=True`.
        normalize: "none"; "mean": those of the samples with a target average 1; "simplex": they sum to 1, `softmax(-loss / tau)`.
        backend: as in `cross_entropy`; "triton" is one launch.

    Returns:
        `(mean_loss, weight)`, fp32 (fp64 for fp64 losses), one entry per sample.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit, by name.
        flow_kernels.BackendUnavailable: the named backend cannot serve the call.
    """
    check_floating("loss", loss)
    if loss.shape != getattr(target, "shape", None):
        raise ValueError(f"loss has shape {tuple(loss.shape)}; it must be that of target, one loss per row")
    rows = flatten(loss.unsqueeze(-1), target, cu_seqlens, ignore_index, shift)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
    if not isinstance(temperature, (Tensor, Real)) and getattr(temperature, "shape", None) != ():
        raise TypeError(f"temperature must be a number or a 0-d tensor, got {type(temperature).__name__}")
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"the temperature must be positive and finite, got {temperature}")
    elif temperature.dim() != 0:
        raise ValueError(f"temperature must be a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
    dtype = accumulation_dtype(loss.dtype)
    tau = scalar(temperature, loss.device, temperature.dtype if isinstance(temperature, Tensor) else dtype)
    values, labels = (_by_sample(t, target, cu_seqlens) for t in (rows.input.squeeze(-1), rows.target))
    backend = backends.resolve(backend, loss.device.type, dtype, "flow_weights")
    return SampleWeights(*ops.flow_weights(values, labels, tau, cu_seqlens, ignore_index, normalize, backend))
