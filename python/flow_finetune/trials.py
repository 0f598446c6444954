"""Questions about a model that are answered by trying it on a few tokens, once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flow_finetune.compiled_layers import uncompiled
from flow_finetune.modes import evaluating

if TYPE_CHECKING:
    from flow_finetune.models import CausalLM

# Relative error of hidden states that rounding explains; what architectures get wrong is 0.1 and more of it.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_16_BIT = 5e-2


def tried_once(question: Callable[[CausalLM], bool]) -> Callable[[CausalLM], bool]:
    """`question`, asked once of each model: in eval mode, without gradients, as the model was written; buffers stay."""
    answers: weakref.WeakKeyDictionary[CausalLM, bool] = weakref.WeakKeyDictionary()

    @functools.wraps(question)
    def answer(lm: CausalLM) -> bool:
        if lm not in answers:
            # Without autocast: older torch gives a later forward pass the weights that were cast here, without a graph.
            plain = torch.autocast(lm.head.weight.device.type, enabled=False)
            # A model may write to its buffers whenever it is run; a trial is to leave no trace.
            buffers = [(buffer, buffer._version, buffer.clone()) for buffer in lm.buffers()]
            with torch.no_grad(), plain, evaluating(lm), uncompiled(lm.model):
                answers[lm] = question(lm)
                for buffer, version, before in buffers:
                    if buffer._version != version:  # others may be in a graph already
                        buffer.copy_(before)
        return answers[lm]

    return answer


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to the same hidden states agree but for rounding."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    return error <= _ROUNDING.get(expected.dtype, _ROUNDING_16_BIT)


@tried_once
def sees_padding(lm: CausalLM) -> bool:
    """Whether what stands behind a text changes it where no mask says that it is padding; in a causal model it does not."""
    ids = (torch.arange(9, device=lm.head.weight.device)[None] * 37 + 5) % lm.head.weight.shape[0]
    try:
        alone, padded = (
            lm.model.base_model(input_ids=ids[:, :length], use_cache=False).last_hidden_state[:, :6]
            for length in (6, 9)
        )
    except Exception:  # whatever a model that asks for a mask raises
        return True
    return not is_same(padded, alone)
