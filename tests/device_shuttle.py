"""Operator tests on the CPU with kernels on a GPU: tensors travel there and results come back, around every operator."""

from __future__ import annotations

import functools
import types

import torch

from flow_kernels import backends


def shuttled(function, device: str):
    """`function` run on `device`: its CPU tensors are moved there, the tensors it returns are moved back."""

    def move(value, to):
        return value.to(to) if isinstance(value, torch.Tensor) else value

    @functools.wraps(function)
    def on_device(*args):
        results = function(*(move(a, device) for a in args))
        if isinstance(results, torch.Tensor):
            return results.to("cpu")
        return tuple(move(r, "cpu") for r in results)

    return on_device


def serve_the_cpu_from(device: str, name: str) -> None:
    """Let backend `name` serve CPU tensors by its kernels for `device`, which must be usable.

    Raises:
        BackendUnavailable: backend `name` cannot serve `device`; the message says why.
    """
    backends.resolve(name, device)
    status, implementation = backends.status, backends.implementation

    def device_status(backend, device_type, dtype=None):
        return status(backend, device if (backend, device_type) == (name, "cpu") else device_type, dtype)

    def device_implementation(backend):
        module = implementation(backend)
        if backend != name:
            return module
        operators = {n: f for n, f in vars(module).items() if "cross_entropy_" in n and callable(f)}
        return types.SimpleNamespace(**{n: shuttled(f, device) for n, f in operators.items()})

    backends.status, backends.implementation = device_status, device_implementation
