"""What the CPU kernels take beside inputs and results, from the resident peak of the process."""

from pathlib import Path

import pytest
import torch
from test_cpu_kernels import PLAIN, head

from flow_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no compiled CPU kernels: {cpu.why_not()}")


def peak_mib(monkeypatch, call):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import harness

    return harness.peak_above(call, lambda found: sum(t.nbytes for t in found)) / 2**20


def test_memory_of_scoring_does_not_grow_with_the_rows(monkeypatch):
    """32768 rows of 256: packed at once they were 16 MiB more in bf16, and 32 in fp32."""
    input, weight, target, _ = head(32768, 256, 4096, torch.bfloat16)

    def score(num_rows):
        return cpu.linear_cross_entropy_fwd(input[:num_rows], weight, target[:num_rows], None, *PLAIN, 0)

    score(64)
    peaks = {n: peak_mib(monkeypatch, lambda n=n: score(n)) for n in (4096, 32768)}
    # What is left: 16 bytes a row, for which rows count and their targets (0.5 MiB), and what malloc rounds to.
    assert peaks[32768] - peaks[4096] <= 2, peaks


def test_training_does_not_keep_the_statistics_of_every_stretch(monkeypatch):
    """16384 rows and 64 stretches, of 16 bytes each: 16 MiB, beside what is less than that."""
    input, weight, target, row_weight = head(16384, 16, 64 * 480, torch.bfloat16)

    def train(num_rows):
        rows = (input[:num_rows], weight, target[:num_rows], row_weight[:num_rows])
        return cpu.linear_cross_entropy_fwd_bwd(*rows, None, *PLAIN, 1, True, False, False)

    train(64)
    assert peak_mib(monkeypatch, lambda: train(16384)) <= 14
