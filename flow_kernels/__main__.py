"""`python -m flow_kernels`: versions, and which backend serves which device, with the reason when one cannot."""

import platform

import torch

import flow_kernels
from flow_kernels import backends


def describe() -> str:
    """The report as text."""
    lines = [
        f"flow-kernels {flow_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"CUDA {'available' if torch.cuda.is_available() else 'not available'}",
    ]
    for device_type in ("cpu", "cuda"):
        lines.append(f"{device_type}: auto -> {backends.resolve('auto', device_type)}")
        for backend in backends.BACKENDS:
            found = backends.status(backend, device_type)
            lines.append(f"  {backend:<10} {'yes' if found.available else 'no '}  {found.reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
