"""What a call costs the host: microseconds of small losses with their backward pass, where arithmetic is nothing.

    python benchmarks/host.py                    into benchmarks/results/host.csv
    python benchmarks/host.py --device cuda      calls are queued, the device is waited for between repetitions

Calls of every loss in turn, `CALLS` of each at a time on one thread; medians over `REPETITIONS` and the smallest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import harness

from flow_kernels import cross_entropy, linear_cross_entropy

CALLS, REPETITIONS = 20, 100
NUM_ROWS, DIM, NUM_CLASSES = 8, 16, 16
KEYS = ("loss", "implementation", "device", "machine")


def losses(device: str) -> dict:
    """Functions of nothing that return a loss with a gradient, by loss and implementation."""
    torch.manual_seed(0)
    logits, input, head = (
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((NUM_ROWS, NUM_CLASSES), (NUM_ROWS, DIM), (NUM_CLASSES, DIM))
    )
    target = torch.randint(NUM_CLASSES, (NUM_ROWS,), device=device)
    weights = torch.rand(NUM_ROWS, device=device)

    def weighted(logits):
        return (weights * F.cross_entropy(logits, target, reduction="none")).sum() / (target != -100).sum()

    return {
        "given logits": {
            "torch": lambda: F.cross_entropy(logits, target),
            "flow_kernels": lambda: cross_entropy(logits, target),
        },
        "given logits, weighted": {
            "torch": lambda: weighted(logits),
            "flow_kernels": lambda: cross_entropy(logits, target, sample_weight=weights),
        },
        "linear head": {
            "torch": lambda: F.cross_entropy(F.linear(input, head), target),
            "flow_kernels": lambda: linear_cross_entropy(input, head, target),
        },
        "linear head, weighted": {
            "torch": lambda: weighted(F.linear(input, head)),
            "flow_kernels": lambda: linear_cross_entropy(input, head, target, sample_weight=weights),
        },
    }


def microseconds(device: str) -> dict[tuple[str, str], list[float]]:
    """Microseconds of one call and its backward pass, for each repetition, by loss and implementation."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {}
    for loss, calls in losses(device).items():
        values = [call() for call in calls.values()]
        torch.testing.assert_close(*values, msg=lambda text, loss=loss: f"{loss}: {text}")
        for value in values:
            value.backward()
        times |= {(loss, implementation): (call, []) for implementation, call in calls.items()}
    for _ in range(REPETITIONS):
        for call, measured in times.values():
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                call().backward()
            measured.append((time.perf_counter() - start) / CALLS * 1e6)
    return {key: measured for key, (_, measured) in times.items()}


def main() -> None:
    """Measure, print, and write host.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    where = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    where |= harness.provenance("host.py", programs=("harness", "host"))
    rows = []
    for (loss, implementation), times in microseconds(device).items():
        median, least = round(statistics.median(times)), round(min(times))
        rows.append({"loss": loss, "implementation": implementation, "median_us": median, "min_us": least, **where})
        print(f"{loss:24} {implementation:14} {median:5} us, at least {least}")
    harness.update_csv("host", rows, KEYS)


if __name__ == "__main__":
    main()
