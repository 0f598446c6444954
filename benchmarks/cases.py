"""What one measurement runs: the tensors of a case, the call of an implementation on them, and whether it is right."""

from __future__ import annotations

import functools
import math

import torch
from harness import GRADIENT_GATES, LOSS_GATES
from implementations import FLOOR, IMPLEMENTATIONS, REFERENCE
from shapes import Head

CASES = ("score", "train", "train weighted", "train half ignored", "train frozen head")
# Training of a head that is held in fp32, under autocast to bf16.
AUTOCAST = "train autocast"


@functools.lru_cache(maxsize=1)
def _random(head: Head) -> tuple[torch.Tensor, ...]:
    """Input, weight and target, shared by the cases of a head: rows of unit scale, logits of variance 1."""
    torch.manual_seed(0)
    dtype = getattr(torch, head.dtype)
    weight = torch.empty(head.num_classes, head.dim, dtype=dtype)
    for rows in weight.split(16384):  # never the whole of it in fp32
        rows.copy_(torch.randn(rows.shape) / head.dim**0.5)
    input = torch.randn(head.num_rows, head.dim).to(dtype)
    return input, weight, torch.randint(0, head.num_classes, (head.num_rows,))


def confident_input(weight: torch.Tensor, target: torch.Tensor, p: float, softcap: float | None) -> torch.Tensor:
    """Rows `[N, D]` that give their target the probability p: multiples of the target's own row of the weight.

    The margin is that of the target over the logsumexp of the others, which grows with it: the other logits of such a
    row have about the variance margin^2 / D.
    """
    own = weight[target].float()
    num_classes, dim = weight.shape
    base = math.log(p / (1 - p)) + math.log(num_classes - 1)
    margin = base
    for _ in range(16):
        capped = base + margin**2 / (2 * dim)
        margin = capped if softcap is None else softcap * math.atanh(capped / softcap)
    return (margin * own / own.square().sum(1, keepdim=True)).to(weight.dtype)


def tensors(head: Head, case: str, confident: float | None = None):
    """Input, weight, target and sample weight; `confident` is the probability of the target in every row."""
    input, weight, target = _random(head)
    if confident is not None:
        input = confident_input(weight, target, confident, head.softcap)
    torch.manual_seed(1)
    if case == "train half ignored":
        target = target.clone()
        target[torch.randperm(head.num_rows)[: head.num_rows // 2]] = -100
    sample_weight = torch.rand(head.num_rows) + 0.1 if case == "train weighted" else None
    if case == AUTOCAST:
        weight = weight.float()
    input = input.detach().requires_grad_(case != "score")
    return input, weight.detach().requires_grad_(case not in ("score", "train frozen head")), target, sample_weight


def call_of(name: str, case: str, head: Head, inputs):
    """A function without arguments that returns the losses, or the loss and its gradients."""
    function = IMPLEMENTATIONS[name]

    def call():
        input, weight, target, sample_weight = inputs
        if case == "score" or name == FLOOR:
            with torch.no_grad():
                return (function(input, weight, target, None, head.softcap, "none", head.chunks[0]),)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == AUTOCAST):
            loss = function(input, weight, target, sample_weight, head.softcap, "mean", head.chunks[1])
        return (loss, *torch.autograd.grad(loss, [t for t in (input, weight) if t.requires_grad]))

    return call


def _samples(result, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The loss, dH, and the rows of dW that are targets, and some that are not; small beside dW itself."""
    parts = [result[0].detach()]
    if len(result) > 1:
        parts.append(result[1].float())
    if len(result) > 2:
        parts += [result[2][target[target >= 0][:256]].float(), result[2][:256].float()]
    return tuple(parts)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in the dtype of `expected`, some rows at a time."""
    squares = expected.new_zeros(2)
    for a, e in zip(actual.split(16384), expected.split(16384), strict=True):
        squares += torch.stack(((a.to(e.dtype) - e).square().sum(), e.square().sum()))
    return float((squares[0] / squares[1]).sqrt())


def why_wrong(result, expected: tuple[torch.Tensor, ...], target: torch.Tensor, dtype: str) -> str | None:
    """What is wrong with the loss or a gradient of a result of a head in `dtype`, or None."""
    loss, *gradients = _samples(result, target)
    difference = float((loss.float() - expected[0].float()).abs().max())
    if not difference < LOSS_GATES[dtype]:
        return f"loss off by {difference:.2g}"
    for name, actual, wanted in zip(("dH", "dW[target]", "dW"), gradients, expected[1:], strict=False):
        error = relative_error(actual, wanted)
        if not error < GRADIENT_GATES[dtype]:
            return f"{name} off by {error:.2g} of its norm"
    return None


def right_calls(case: str, head: Head, names: list[str]) -> tuple[dict, dict]:
    """The calls of the implementations that are right on a case, and why the others are left out.

    The judge is the reference backend; an implementation's check is its warm-up.
    """
    inputs = tensors(head, case)
    expected = _samples(call_of(REFERENCE, case, head, inputs)(), inputs[2])
    calls, reasons = {}, {}
    for name in names:
        call = call_of(name, case, head, inputs)
        try:
            result = call()
            reason = None if name == FLOOR else why_wrong(result, expected, inputs[2], head.dtype)
            del result
        except (NotImplementedError, RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
        if reason is None:
            calls[name] = call
        else:
            reasons[name] = reason
    return calls, reasons
