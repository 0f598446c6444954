"""Operator tests on the CPU with kernels on a GPU: tensors travel there and results come back, around every operator."""

from __future__ import annotations

import functools
import types

import torch

from flow_kernels import backends, ops, reference


def shuttled(function, device: str):
    """`function` run on `device`: its CPU tensors are moved there, the tensors it returns to where the first came from."""

    def move(value, to):
        return value.to(to) if isinstance(value, torch.Tensor) else value

    @functools.wraps(function)
    def on_device(*args):
        origin = next(a.device for a in args if isinstance(a, torch.Tensor))
        results = function(*(move(a, device) for a in args))
        if isinstance(results, torch.Tensor):
            return results.to(origin)
        return tuple(move(r, origin) for r in results)

    return on_device


# Where the forward operators have their ignore_index.
_IGNORE_INDEX = {"cross_entropy_fwd": 3, "cross_entropy_fwd_bwd": 4, "linear_cross_entropy_fwd": 5,
                 "linear_cross_entropy_fwd_bwd": 6, "cross_entropy_score": 2, "linear_cross_entropy_score": 4}  # fmt: skip


def checked(name: str, function):
    """`function` after a look at the targets, which costs nothing on the CPU and which kernels on a GPU do not take."""
    if name not in _IGNORE_INDEX:
        return function

    @functools.wraps(function)
    def after_a_look(*args):
        num_classes, target = (args[1].shape[0], args[2]) if name.startswith("linear") else (args[0].shape[1], args[1])
        reference.check_target(target, num_classes, args[_IGNORE_INDEX[name]])
        return function(*args)

    return after_a_look


def serve_the_cpu_from(device: str, name: str) -> None:
    """Let backend `name` serve CPU tensors by its kernels for `device`, which must be usable.

    Raises:
        BackendUnavailable: backend `name` cannot serve `device`; the message says why.
    """
    backends.resolve(name, device)
    status, implementation = backends.status, backends.implementation

    def device_status(backend, device_type, *rest):
        return status(backend, device if (backend, device_type) == (name, "cpu") else device_type, *rest)

    def device_implementation(backend):
        module = implementation(backend)
        if backend != name:
            return module
        operators = {n: f for n, f in vars(module).items() if n in ops.SCHEMAS}
        found = types.SimpleNamespace(**{n: checked(n, shuttled(f, device)) for n, f in operators.items()})
        if name == "triton":
            found.scale_ = module.scale_  # backward passes use it, on the device's own tensors only
        return found

    backends.status, backends.implementation = device_status, device_implementation
