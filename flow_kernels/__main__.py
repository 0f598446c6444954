"""`python -m flow_kernels`: versions, and which backend serves which device, with the reason when one cannot."""

import platform

import torch

import flow_kernels
from flow_kernels import backends


def _answer(question):
    """The answer, or why there is none: compiled files that do not load are an error wherever they are used."""
    try:
        return question()
    except ImportError as error:
        return f"error: {error}"


def describe() -> str:
    """The report as text."""
    lines = [
        f"flow-kernels {flow_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"CUDA {'available' if torch.cuda.is_available() else 'not available'}",
    ]
    for device_type in ("cpu", "cuda"):
        chosen = _answer(lambda d=device_type: backends.resolve("auto", d))
        training = _answer(lambda d=device_type: backends.resolve("auto", d, operator="cross_entropy_fwd_bwd"))
        also = "" if training == chosen else f" (training without a soft-cap or a head's bias: {training})"
        lines.append(f"{device_type}: auto -> {chosen}{also}")
        for backend in backends.BACKENDS:
            found = _answer(lambda b=backend, d=device_type: backends.status(b, d))
            if isinstance(found, str):
                found = backends.Status(False, found)
            lines.append(f"  {backend:<10} {'yes' if found.available else 'no '}  {found.reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
