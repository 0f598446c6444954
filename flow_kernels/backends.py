"""Which implementation serves a call, and the reason when one cannot.

`auto` takes the first available backend in the order of `PREFERENCE` for the device; a named backend that cannot
serve the call raises `BackendUnavailable` with the reason. No environment variable changes the choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from flow_kernels import cpu, cuda, reference

BACKENDS = ("reference", "cpu", "triton", "cuda")

# By device type, best first. `reference` runs on every device that torch runs on.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("reference",)}


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot serve the call; the message says why and what would."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can serve a device, with the reason in words."""

    available: bool
    reason: str


def status(backend: str, device_type: str) -> Status:
    """Say whether `backend` can serve tensors on `device_type`, and why (not)."""
    if backend == "reference":
        return Status(True, "eager torch, every device and dtype")
    if backend == "cpu":
        if device_type != "cpu":
            return Status(False, "its kernels read CPU memory only")
        reason = cpu.why_not()
        return Status(reason is None, reason or cpu.describe())
    if backend == "cuda":
        if device_type != "cuda":
            return Status(False, "its kernels read CUDA memory only")
        reason = cuda.why_not()
        return Status(reason is None, reason or "cross_entropy with known row weights, and forward only")
    if backend in BACKENDS:
        return Status(False, f"flow_kernels has no {backend} kernels in this version")
    raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")


# Constant under torch.compile: what is compiled and which CPU this is do not change while a program runs.
@torch.compiler.assume_constant_result
def resolve(backend: str, device_type: str) -> str:
    """The name of the backend that serves a call on `device_type`.

    Raises:
        ValueError: `backend` is not a known name.
        BackendUnavailable: the named backend cannot serve the device.
    """
    if backend == "auto":
        candidates = PREFERENCE.get(device_type, ("reference",))
        return next(name for name in candidates if status(name, device_type).available)
    found = status(backend, device_type)
    if not found.available:
        raise BackendUnavailable(
            f"backend={backend!r} cannot serve tensors on {device_type}: {found.reason}; "
            f"backend='auto' would use {resolve('auto', device_type)!r}"
        )
    return backend


def implementation(backend: str) -> ModuleType:
    """The module that holds the operators of a resolved backend, under the names of `flow_kernels.reference`."""
    return {"reference": reference, "cpu": cpu, "cuda": cuda}[backend]
