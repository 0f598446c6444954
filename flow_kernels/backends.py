"""Which implementation serves a call, and the reason when one cannot.

`auto` takes the first available backend in the order of `PREFERENCE` for the device; a named backend that cannot
serve the call raises `BackendUnavailable` with the reason. No environment variable of ours changes the choice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

from flow_kernels import cpu, cuda, reference
from flow_kernels.compiled import CompiledFileError as CompiledFileError

BACKENDS = ("reference", "cpu", "triton", "cuda")

# By device type, best first. `reference` runs on every device that torch runs on.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
# Training, where clusters of blocks hold a row in shared memory: on an H100 whole calls on given logits reach 81 to 88 % of
# a copy's bandwidth at any V by the CUDA kernels, 82 to 87 % to V = 65536 and 60 to 62 % beyond by Triton's. A linear
# head takes 0.95 to 1.00 of the time with them, a frozen one 0.91 to 0.99. With a soft-cap, whose tanh the CUDA kernels
# make exactly and twice, given logits reach 36 % to Triton's 54 (benchmarks/results/gpu.md).
CUDA_FIRST = {"cross_entropy_fwd_bwd", "linear_cross_entropy_fwd_bwd"}
CLUSTER_CAPABILITY = (9, 0)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's own floor for bf16; older GPUs would fail inside its compiler.
MIN_CUDA_CAPABILITY = (8, 0)


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot serve the call; the message says why and what would."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can serve a device, with the reason in words."""

    available: bool
    reason: str


def _why_no_triton(device_type: str) -> str:
    """Why the Triton kernels cannot serve `device_type`; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton = importlib.import_module("triton")
    if not hasattr(triton, "knobs"):
        return f"triton {triton.__version__} is installed, the kernels need 3.4"
    # The choice between compiler and interpreter is made when triton is imported.
    interprets = triton.knobs.runtime.interpret and type(triton.language.sum).__name__ == "InterpretedFunction"
    if device_type == "cpu":
        if interprets:
            return ""
        return "Triton compiles for GPUs; on the CPU it only interprets, with TRITON_INTERPRET=1 set before its import"
    if device_type != "cuda":
        return f"flow_kernels has no Triton kernels for {device_type}"
    if not torch.cuda.is_available():
        return "no usable GPU driver: torch.cuda.is_available() is False"
    if interprets:
        return "TRITON_INTERPRET=1 was set before triton's import, so nothing would be compiled; start without it"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < MIN_CUDA_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return _why_no_launch()


@functools.cache
def _why_no_launch() -> str:
    """Why Triton cannot launch on this machine's GPU, asked once; empty when it can.

    It compiles its launcher on the machine, which needs a C compiler and the headers of Python.
    """
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:
        what = (str(error).splitlines() or [""])[0]
        return f"Triton cannot launch here (it needs a C compiler and Python's headers): {type(error).__name__}: {what}"
    return ""


def status(
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    operator: str | None = None,
    has_bias: bool = False,
) -> Status:
    """Say whether `backend` can serve tensors on `device_type` (of `dtype`, by `operator`, if given), and why (not)."""
    if backend == "reference":
        return Status(True, "eager torch, every device with fp64, every floating dtype")
    if backend == "cpu":
        if device_type != "cpu":
            return Status(False, "its kernels read CPU memory only")
        reason = cpu.why_not()
        if reason is None and dtype is not None and dtype not in (*cpu.DTYPES, torch.float64):
            reason = f"the CPU kernels take fp32, bf16, fp16 and (in eager torch) fp64, not {dtype}"
        return Status(reason is None, reason or cpu.describe())
    if backend == "triton":
        reason = _why_no_triton(device_type)
        if not reason and dtype is not None and dtype not in TRITON_DTYPES:
            reason = f"the Triton kernels take fp32, bf16 and fp16, not {dtype}"
        if not reason and operator is not None and operator.startswith("packed_attention"):
            reason = "there is no packed attention in Triton"
        return Status(not reason, reason or "Triton kernels, fp32, bf16 and fp16")
    if backend == "cuda":
        if device_type != "cuda":
            return Status(False, "its kernels read CUDA memory only")
        reason = cuda.why_not()
        if reason is None and dtype is not None and dtype not in cuda.DTYPES:
            reason = f"the CUDA kernels take fp32, bf16 and fp16, not {dtype}"
        if reason is None and operator is not None and operator not in cuda.OPERATORS:
            reason = f"the CUDA kernels are {', '.join(cuda.OPERATORS)}, and this call needs {operator}"
        if reason is None and has_bias:
            reason = "the CUDA kernels have no linear_bias"
        return Status(
            reason is None, reason or "training with known row weights (no bias), and cross_entropy forward only"
        )
    raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")


def _candidates(device_type: str, operator: str | None, has_softcap: bool = False) -> tuple[str, ...]:
    """Backends for "auto", best first."""
    candidates = PREFERENCE.get(device_type, ("reference",))
    if device_type != "cuda":
        return candidates
    # The kernels have run on NVIDIA's GPUs alone; for AMD's they have been compiled.
    if torch.version.hip is not None:
        return ("reference",)
    if operator not in CUDA_FIRST or cuda.why_not() is not None:
        return candidates
    if torch.cuda.get_device_capability() < CLUSTER_CAPABILITY:  # where they have not run
        return candidates
    return ("triton", "cuda", "reference") if has_softcap else ("cuda", "triton", "reference")


def resolve(
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    operator: str | None = None,
    has_softcap: bool = False,
    has_bias: bool = False,
) -> str:
    """The name of the backend that serves a call on `device_type` with input of `dtype`.

    Args:
        operator: the one of `flow_kernels.ops` that the call needs in the end: where a gradient is wanted that is not
            made in the forward pass, the backward one.
        has_softcap: whether the call has a soft-cap, of which "auto" takes notice.
        has_bias: whether the head has a bias, which "cuda" cannot serve.

    Raises:
        ValueError: `backend` is not a known name.
        BackendUnavailable: the named backend cannot serve the device, dtype or operator.
    """
    if backend == "auto":
        candidates = _candidates(device_type, operator, has_softcap)
        return next(name for name in candidates if status(name, device_type, dtype, operator, has_bias).available)
    found = status(backend, device_type, dtype, operator, has_bias)
    if not found.available:
        raise BackendUnavailable(
            f"backend={backend!r} cannot serve tensors on {device_type}: {found.reason}; "
            f"backend='auto' would use {resolve('auto', device_type, dtype, operator, has_softcap, has_bias)!r}"
        )
    return backend


# Constant under torch.compile: what is compiled and which machine this is do not change while a program runs. This is all
# that torch.compiler.assume_constant_result does beside importing torch._dynamo and with it triton, for 2 seconds.
resolve._dynamo_marked_constant = True


def implementation(backend: str) -> ModuleType:
    """The module that holds the operators of a resolved backend, under the names of `flow_kernels.reference`."""
    if backend == "triton":
        # Imported at the first call: without triton, or without a use for it, nothing else depends on it.
        return importlib.import_module("flow_kernels.kernels")
    # An operator may be called with a name that nobody resolved; the compiled file is loaded by asking why not.
    load = {"cpu": cpu.why_not, "cuda": cuda.load}.get(backend)
    if load is not None and (reason := load()) is not None:
        raise BackendUnavailable(reason)
    return {"reference": reference, "cpu": cpu, "cuda": cuda}[backend]
