"""Run by test_triton_jit without the interpreter: every launcher up to the machine code, by Triton's own launch path.

Usage: launch_without_gpu.py cuda|hip. The driver is a stand-in that names a target; `warmup` compiles and launches
nothing. Prints the names of the kernels that were compiled.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from flow_kernels import kernels
from flow_kernels.kernels import configs

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(backend: str) -> None:
    """Every public launcher on a few rows; the longest are walked."""
    driver.set_active(Driver(TARGETS[backend]))
    if backend == "hip":
        configs.warp_size = lambda device: 64
    compiled = []

    def launch(kernel, grid):
        def run(*args, **options):
            compiled.append(kernel.run(*args, grid=grid, warmup=True, **options).metadata.name)

        return run

    jit.JITFunction.__getitem__ = launch
    torch.set_num_threads(1)
    options, weights = (-100, 0.1, 5.0, 1e-3), torch.rand(2)
    target = torch.tensor([1, -100])
    for num_classes, numbers in ((48, (-100, 0.0, 0.0, 0.0)), (33, options)):
        logits, lse = torch.randn(2, num_classes).bfloat16(), torch.zeros(2, dtype=torch.float64)
        class_weight = torch.rand(num_classes) if numbers is options else None
        kernels.cross_entropy_fwd(logits, target, class_weight, *numbers)
        kernels.cross_entropy_score(logits, target, numbers[0], numbers[2])
        kernels.cross_entropy_bwd(weights, logits, target, lse, class_weight, *numbers)
        kernels.cross_entropy_fwd_bwd(logits, target, weights, class_weight, *numbers)
    kernels.cross_entropy_fwd_bwd(torch.randn(2, 65552), target, weights, None, -100, 0.0, 0.0, 0.0)
    numbers, needs = (-100, 0.0, 0.0, 0.0, 2), (True, True, True)
    for num_classes in (48, 33):
        hidden, head, bias = torch.randn(2, 16), torch.randn(num_classes, 16), torch.randn(num_classes)
        kernels.linear_cross_entropy_fwd(hidden, head, target, bias, None, *numbers)
        kernels.linear_cross_entropy_score(hidden, head, target, bias, -100, 0.0, 2)
        kernels.linear_cross_entropy_bwd(weights, hidden, head, target, lse, bias, None, *numbers, *needs)
        kernels.linear_cross_entropy_fwd_bwd(hidden, head, target, weights, bias, None, *numbers, *needs)
    kernels.scale_(torch.ones(5000).bfloat16(), torch.tensor(0.5))
    kernels.flow_weights(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.int64), torch.tensor(0.7), None, -100, "mean")
    print("\n".join(compiled))


if __name__ == "__main__":
    main(sys.argv[1])
