"""The language-model heads that the benchmarks measure, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """N rows, D hidden, V vocabulary; `chunks` are the fastest `batch_chunk_size` of `F.linear_cross_entropy` there, scoring and training.

    The fastest chunks come from `head.py chunks`; results/head_chunks.csv has all that were tried.
    """

    name: str
    num_rows: int
    dim: int
    num_classes: int
    softcap: float | None = None
    dtype: str = "bfloat16"
    chunks: tuple[int, int] = (512, 1024)


HEADS = {
    head.name: head
    for head in (
        Head("smollm2-135m", 2048, 576, 49152, chunks=(1024, 2048)),
        Head("gemma-3-270m", 1024, 640, 262144),
        Head("gemma-2-2b", 1024, 2304, 256000, softcap=30.0),
        Head("qwen3-0.6b", 1024, 1024, 151936, chunks=(1024, 1024)),
        Head("smollm2-135m-fp32", 2048, 576, 49152, dtype="float32", chunks=(1024, 2048)),
        Head("gemma-3-270m-fp32", 1024, 640, 262144, dtype="float32"),
        Head("small", 100, 256, 8192),
    )
}

# 8 x ranges, the other two dimensions as in a quarter or a half of the Gemma 3 head.
SWEEPS = {
    "N": [Head(f"N={n}", n, 640, 65536) for n in (256, 512, 1024, 2048)],
    "V": [Head(f"V={v}", 512, 640, v) for v in (32768, 65536, 131072, 262144)],
    "D": [Head(f"D={d}", 512, d, 65536) for d in (320, 640, 1280, 2560)],
}
