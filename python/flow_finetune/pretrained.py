"""One flat copy of the pre-trained weights, for everything that looks back at them while training.

With theta the trained parameters, n their number and theta0 what they were before:

    L2 penalty    lambda / n * sum (theta - theta0)^2      gradient 2 lambda / n * (theta - theta0)
    L1 penalty    lambda / n * sum |theta - theta0|        gradient lambda / n * sign(theta - theta0)
    SFA           theta <- beta * theta0 + (1 - beta) * theta, after each full share of the steps (arXiv 2501.05559)
    distance      sqrt(sum (theta - theta0)^2)

The gradients are added to those of the loss, so no second model and no second graph is held. Everything goes bucket
by bucket over the flat copy: beside it, memory is needed for one bucket only.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flow_finetune.config import MethodConfig
from flow_finetune.progress import say
from flow_finetune.storage import require_disk_space

# 4 MiB of fp32: small beside the activations of a step, large beside the cost of a launch.
BUCKET_ELEMENTS = 2**20


class PretrainedCopy:
    """The values that parameters have now, kept flat in one tensor of `dtype` on `device`, or in a file.

    Args:
        parameters: what is trained; contiguous, of floating dtypes.
        dtype: of the copy; narrower than the parameters' where rounding is accepted.
        device: where the copy is kept; ignored with `folder`.
        folder: for a memory-mapped file in place of memory; the file has no name, so it is gone with the process.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        folder: Path | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self.num_elements = sum(p.numel() for p in self._parameters)
        self._buckets = list(_buckets([p.numel() for p in self._parameters]))
        if folder is None:
            self.flat = torch.empty(self.num_elements, dtype=dtype, device=device)
        else:
            self.flat = _unnamed_file(folder, self.num_elements, dtype)
        with torch.no_grad():
            for start, parts in self._buckets:
                for view, piece in zip(self._views(parts), self._flat_pieces(start, parts), strict=True):
                    piece.copy_(view)
            # sum (theta0 - copy)^2, 0 where the copy is exact.
            self.rounding = self._square_sum()

    @torch.no_grad()
    def add_penalty(self, kind: str, strength: float) -> Tensor:
        """Add the gradient of the penalty `kind` ("l2", "l1") to `.grad`; returns the penalty, 0-d fp32.

        Parameters without a gradient took no part in the step and are left alone.
        """
        scale = strength / max(self.num_elements, 1)
        total = torch.zeros((), device=self._parameters[0].device if self._parameters else None)
        for start, parts in self._buckets:
            used = [i for i, part in enumerate(parts) if self._parameters[part[0]].grad is not None]
            differences = self._differences(start, parts)
            differences = [differences[i] for i in used]
            if not used:
                continue
            if kind == "l2":
                total += torch.stack([d.square().sum() for d in differences]).sum()
                alpha = 2 * scale
            else:
                total += torch.stack(torch._foreach_norm(differences, 1)).sum()
                torch._foreach_sign_(differences)
                alpha = scale
            gradients = self._views([parts[i] for i in used], of_gradients=True)
            torch._foreach_add_(gradients, differences, alpha=alpha)
        return total * scale

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Replace the parameters by `share * pre-trained + (1 - share) * parameters`."""
        for start, parts in self._buckets:
            views = self._views(parts)
            torch._foreach_add_(views, self._differences(start, parts), alpha=-share)

    @torch.no_grad()
    def distance(self) -> float:
        """Euclidean distance of the parameters from their pre-trained values.

        Where the copy is rounded, the rounding's own square sum is taken off: it has nothing to do with the direction
        in which the weights moved, so the squares of the two add.
        """
        return math.sqrt(max(self._square_sum() - self.rounding, 0.0))

    def _square_sum(self) -> float:
        """Of all differences: fp32 within a bucket, as some devices have no fp64, and fp64 over the buckets."""
        sums = [
            torch.stack([difference.square().sum() for difference in self._differences(start, parts)]).sum()
            for start, parts in self._buckets
        ]
        # Looked at together: each look waits for an accelerator.
        return float(torch.stack(sums).cpu().double().sum()) if sums else 0.0

    def _differences(self, start: int, parts: list[tuple[int, int, int]]) -> list[Tensor]:
        """`theta - theta0` of a bucket in fp32 (fp64 for fp64 parameters), new tensors."""
        views = self._views(parts)
        dtype = torch.promote_types(views[0].dtype, torch.float32)
        pieces = [piece.to(views[0].device, dtype) for piece in self._flat_pieces(start, parts)]
        wide = [view.to(dtype) for view in views]
        return list(torch._foreach_sub(wide, pieces))

    def _views(self, parts: list[tuple[int, int, int]], *, of_gradients: bool = False) -> list[Tensor]:
        tensors = (self._parameters[i].grad if of_gradients else self._parameters[i].detach() for i, _, _ in parts)
        # view, not reshape: a copy would take the update away with it.
        return [t.view(-1)[low:high] for t, (_, low, high) in zip(tensors, parts, strict=True)]

    def _flat_pieces(self, start: int, parts: list[tuple[int, int, int]]) -> list[Tensor]:
        lengths = [high - low for _, low, high in parts]
        return list(self.flat[start : start + sum(lengths)].split(lengths))


def make_copy(
    method: MethodConfig, parameters: list[nn.Parameter], *, track_distance: bool, folder: Path
) -> PretrainedCopy | None:
    """The one copy that a method's penalty and averaging and the distance share; None where nothing needs it.

    A penalty alone takes `method.penalty_copy`. Averages write the copy into the model, so they take an unrounded one,
    on the CPU; so does the distance alone. "disk" is unrounded too.
    """
    exact = functools.reduce(torch.promote_types, {p.dtype for p in parameters})
    if method.penalty == "none" and method.average_every is None:
        return PretrainedCopy(parameters, dtype=exact, device="cpu") if track_distance else None
    if method.penalty_copy == "disk":
        return PretrainedCopy(parameters, dtype=exact, device="cpu", folder=folder)
    if method.average_every is not None:
        device = "cpu" if method.penalty == "none" else parameters[0].device
        return PretrainedCopy(parameters, dtype=exact, device=device)
    dtype = exact if method.penalty_copy == "float32" else torch.bfloat16
    copy = PretrainedCopy(parameters, dtype=dtype, device=parameters[0].device)
    if copy.rounding > 0:
        say(
            f"method {method.name}: the bf16 copy of the pre-trained weights is off by {copy.rounding**0.5:.3g} "
            "(Euclidean), since they are no bf16 numbers; penalty_copy float32 or disk keeps them exactly"
        )
    return copy


def averaging_steps(num_steps: int, every: float | None) -> set[int]:
    """The steps after which SFA averages: each full `every` share of all of them, rounded up to a whole step."""
    if every is None:
        return set()
    count = math.floor(1 / every + 1e-9)
    # A share like 0.1 is a little more than a tenth; 1e-9 keeps 0.1 * 30 from becoming step 4.
    return {max(1, math.ceil(k * every * num_steps - 1e-9)) for k in range(1, count + 1)}


def distance_steps(num_steps: int, log_every: int, copy: PretrainedCopy | None, device: torch.device) -> set[int]:
    """The steps whose log lines have the distance: all, or where the copy is not on the `device` 20, with the last.

    The copy that serves the distance alone is in the CPU's memory (a second one on an accelerator would be as large as the
    model), from where it goes over the bus every time.
    """
    logged = [step for step in range(1, num_steps + 1) if step % log_every == 0 or step == num_steps]
    if copy is None or copy.flat.device.type == device.type or not logged:
        return set(logged)
    return {logged[math.ceil(k * len(logged) / 20) - 1] for k in range(1, 21)}


def _buckets(lengths: list[int]) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Consecutive pieces of the flat copy: where each begins, and its `(parameter, from, to)` parts."""
    parts, start, filled = [], 0, 0
    for index, length in enumerate(lengths):
        low = 0
        while low < length:
            high = min(length, low + BUCKET_ELEMENTS - filled)
            parts.append((index, low, high))
            filled += high - low
            low = high
            if filled == BUCKET_ELEMENTS:
                yield start, parts
                parts, start, filled = [], start + filled, 0
    if parts:
        yield start, parts


def _unnamed_file(folder: Path, num_elements: int, dtype: torch.dtype) -> Tensor:
    """A memory-mapped tensor whose file is removed at once: the mapping keeps it, and a kill leaves nothing."""
    # The file is sparse: without this, a full disk would be a bus error in the middle of the copy.
    require_disk_space(folder, num_elements * dtype.itemsize)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".pretrained-") as file:
        return torch.from_file(file.name, shared=True, size=num_elements, dtype=dtype)
