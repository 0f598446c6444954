"""Attention of texts of different lengths: packed in one row, and torch's own with padding, in turn.

    python benchmarks/attention.py               into benchmarks/results/attention.csv

Four query heads of 256 with one key head, as in Gemma 3 270M, bf16; forward and backward apart, in milliseconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import harness

from flow_kernels import packed_attention

NUM_HEADS, NUM_KEY_HEADS, DIM = 4, 1, 256
TEXTS = {
    "8 of 180 to 250": (220, 190, 240, 210, 180, 250, 200, 230),
    "16 of 128": (128,) * 16,
    "4 of 280 to 320": (300, 280, 320, 290),
    "1 of 2048": (2048,),
}
KEYS = ("texts", "implementation", "pass", "machine")


def implementations(lengths: tuple[int, ...]) -> dict:
    """Functions that return the attention of these texts, and what its gradient is of."""
    torch.manual_seed(0)

    def heads(*shape):
        return torch.randn(*shape).bfloat16().requires_grad_()

    total, longest = sum(lengths), max(lengths)
    ends = torch.tensor(lengths).cumsum(0)
    segments = torch.stack([ends - torch.tensor(lengths), ends, torch.full_like(ends, -1)], 1)
    packed = [heads(total, n, DIM) for n in (NUM_HEADS, NUM_KEY_HEADS, NUM_KEY_HEADS)]
    padded = [heads(len(lengths), n, longest, DIM) for n in (NUM_HEADS, NUM_KEY_HEADS, NUM_KEY_HEADS)]
    return {
        "packed_attention": lambda: packed_attention(*packed, segments),
        "torch, padded": lambda: F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True),
    }


def measure(texts: str, repetitions: int) -> list[dict]:
    """One row for each implementation and pass."""
    times: dict = {}
    for repetition in range(repetitions + 1):
        for name, call in implementations(TEXTS[texts]).items():
            started = time.perf_counter()
            out = call()
            between = time.perf_counter()
            out.backward(torch.ones_like(out))
            if repetition:  # the first is to warm up
                times.setdefault((name, "forward"), []).append(between - started)
                times.setdefault((name, "backward"), []).append(time.perf_counter() - between)
    provenance = harness.provenance("attention.py", programs=("harness", "attention"))
    rows = []
    for (name, which), seconds in times.items():
        seconds = sorted(seconds)
        row = {"texts": texts, "implementation": name, "pass": which, "repetitions": repetitions}
        row |= {"median_ms": round(1e3 * seconds[len(seconds) // 2], 3), "min_ms": round(1e3 * seconds[0], 3)}
        rows.append(row | provenance)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=21)
    arguments = parser.parse_args()
    rows = [row for texts in TEXTS for row in measure(texts, arguments.repetitions)]
    print(harness.markdown(rows, ["texts", "implementation", "pass", "median_ms", "min_ms"]))
    harness.update_csv("attention", rows, KEYS)


if __name__ == "__main__":
    main()
