"""torch.compile of a language model's layers, one after the other, where they are.

A layer's norms, activations and conversions become a few loops; its matrix products, the attention, and the fused loss
stay as they are. All layers of one kind share their code, so that a deep model compiles as fast as a shallow one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import weakref

import torch
from torch import nn

from flow_finetune.errors import InputError

# Code of one layer is compiled again for another mode, number of dimensions or kind of mask; torch stops at 8.
_MAX_VARIANTS = 64

_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_compiler(device: torch.device) -> None:
    """Raise `InputError` where torch.compile would find no compiler at the first batch."""
    if device.type != "cpu":
        return
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise InputError(
            f"compiling needs a C++ compiler, and {name} is not there; install it, set CXX, or do not compile"
        )


def compile_layers(model: nn.Module) -> None:
    """Have every layer compiled when it is first run; names of parameters and modules stay.

    Raises:
        InputError: a model that does not say what its layers are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise InputError(f"{type(model).__name__} does not say which of its modules are its layers; do not compile it")
    import torch._dynamo.config  # takes a second, so only here
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)
    # Between layers DDP finds gradients early as it is; within one there is nothing to split for it.
    torch._dynamo.config.optimize_ddp = False
    # A number of the model's own, a scale, is none that changes: left open, the first layer is traced twice (21 s to the
    # end of Gemma 3 270M's first step in place of 28).
    torch._dynamo.config.specialize_float = True
    # tanh from exp, within 1e-7 of 1: 3 % of Gemma 3's step on a CPU. An older torch has no such option.
    options = {"cpp.use_decompose_tanh": True} if hasattr(torch._inductor.config.cpp, "use_decompose_tanh") else {}
    for layer in layers:
        layer.compile(dynamic=True, options=options)
    _compiled.add(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` was asked for this model."""
    return model in _compiled


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which the layers run as they were written: for what would be compiled once a layer, or for one call."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()
