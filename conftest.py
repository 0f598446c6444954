"""Before anything imports triton: without a GPU, its kernels run in Triton's interpreter.

The choice is made when triton is imported, so it cannot wait for a fixture; pytest reads this file before those in
tests/.
"""

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# What torch.cuda.is_available() would say, without importing torch, which the environment must precede: one GPU of a node
# may be /dev/nvidia3 alone, and WSL has the driver's library. `make test DEVICE=cuda` must never pass in the interpreter.
_OF_A_GPU = ("/dev/kfd", "/usr/lib/wsl/lib/libcuda.so.1")
# A torch without CUDA leaves even a machine with a GPU to the interpreter.
_IS_CPU_BUILD = metadata.version("torch").endswith("+cpu")
_HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or any(Path(file).exists() for file in _OF_A_GPU)
if (_IS_CPU_BUILD or not _HAS_GPU) and os.environ.get("DEVICE") != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _round_bfloat16_to_nearest() -> None:
    """Make the interpreter round fp32 to bf16 to nearest even, as every GPU does; it truncates (triton 3.9)."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, destination):
        kinds = source.dtype.scalar, destination.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            data = np.where(np.isnan(source.data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
        elif kinds == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return original(self, source, destination)
        return interpreter.TensorHandle(data, destination.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    _round_bfloat16_to_nearest()
