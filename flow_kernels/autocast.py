"""What torch.autocast makes of a loss's tensors, as of those of the linear layer that the head is."""

from __future__ import annotations

import torch
from torch import Tensor


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# Constant under torch.compile, as `backends.resolve` is: the Dynamo of torch 2.11 cannot trace the question.
_has_autocast._dynamo_marked_constant = True


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of an autocast context that the call stands in, or None."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def stays_wide(linear_weight: Tensor, input: Tensor) -> bool:
    """Whether the head stays fp32 beside an input of autocast's 16 bits.

    A copy of a large head and its gradient's way back to fp32 take time and memory: 512 rows of Gemma 3's head, forward,
    backward and added to the gradient that is there, take 1.46 s and took 2.30 (1024 rows 2.95 and 3.33; medians of 6
    in turn on 2 Zen 4 cores; with huge pages for torch's own tensors 1.59 and 1.63, 2.94 and 2.93). Scoring 4 rows takes
    0.05 s and took 0.14, 512 rows 0.47 and 0.62.
    """
    is_narrow = input.dtype in (torch.bfloat16, torch.float16) and input.dtype == _autocast_dtype(input.device.type)
    return is_narrow and linear_weight.dtype == torch.float32


def cast_for_autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, cast as `F.linear` does: floating tensors but fp64 to the autocast dtype, save an fp32 head."""
    cast = _caster(input)
    input = cast(input)
    stays = isinstance(linear_weight, Tensor) and stays_wide(linear_weight, input)
    return input, linear_weight if stays else cast(linear_weight), cast(linear_bias)


def cast_all_for_autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, cast as `scaled_dot_product_attention` does."""
    return [_caster(tensors[0])(t) for t in tensors]


def _caster(input: Tensor):
    dtype = _autocast_dtype(input.device.type) if isinstance(input, Tensor) else None
    castable = (torch.float32, torch.float16, torch.bfloat16)

    def cast(tensor):
        is_cast = dtype is not None and isinstance(tensor, Tensor) and tensor.dtype in castable
        return tensor.to(dtype) if is_cast else tensor

    return cast
