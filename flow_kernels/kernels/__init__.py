"""Triton kernels and their launchers, under the names and signatures of `flow_kernels.reference`, for fp32, bf16, fp16.

Performance model. One row of V logits of b bytes; in 16 bits about 7 instructions and one exponential a logit forward,
about 17 and two with the gradient (`python benchmarks/gpu_static.py`); 10, and 25 to 30 (AMD: 15 and 36), of given
logits whose V or row stride is no multiple of 16, which are accessed an element at a time. The kernels move

    scoring    b V read                       2 V bytes in bf16
    training   b V read, b V written          4 V bytes while a row fits in registers (128 KiB; 32 KiB where it is
                                              accessed an element at a time in 16 bits), else 6 V

so the floor of a row is its bytes over the memory bandwidth, unless its exponentials (16 a cycle and multiprocessor) or
its instructions (128 lanes a cycle and multiprocessor, 64 on MI300X) take longer. In nanoseconds a row in bf16:

             scoring, V = 151936       training, V = 65536       training, V = 151936
    device   bytes    exponentials     bytes    instructions     bytes
    A100     152       62              131       57              456            2.0 TB/s, 108 x 1.41 GHz
    H100      91       41               78       39              272            3.35 TB/s, 132 x 1.755 GHz
    H200      63       41               55       39              190            4.8 TB/s, 132 x 1.755 GHz
    B200      38       35               33       31              114            8.0 TB/s, 148 x 1.85 GHz
    MI300X    57       15               49       32              172            5.3 TB/s, 304 x 2.1 GHz

A good streaming kernel reaches 85 to 95 % of the bandwidth where the rest hides behind it; on B200 instructions take as
long as the bytes of a one-pass row and exponentials nearly as long as those of scoring, so 75 to 80 % are to be expected
there. Measured on an H100 in bf16 (benchmarks/results/gpu.md), whole calls of the losses in per cent of what a copy moves:
scoring 92 to 96 %, training 87 % at V = 32768 and 82 % at 65536 (the kernels alone 99 and 93 %), 60 to 62 % beyond, which
are 90 to 93 % of the 6 V bytes that are moved there. With a soft-cap 61 and 54 %. The other devices are floors on paper.

Under the linear head the row kernel is a small part where D is large. Of 17.2 ms for 8192 rows of V = 262144 with D = 640,
61 % of a bf16 product's rate, it takes about 5; with D = 4096 and V = 128256 training runs at 78 %.

A training call with "mean" or "sum" multiplies the gradient by the upstream gradient in its backward pass. Where that is 1
(`loss.backward()`) the kernel sees it and moves nothing; any other factor (a loss that is multiplied afterwards) moves the
gradient once more, 4 V bytes in bf16, and so do backward passes that torch.compile has traced.
"""

from flow_kernels.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd, cross_entropy_fwd_bwd
from flow_kernels.kernels.flow_weights import flow_weights
from flow_kernels.kernels.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_fwd_bwd,
)
from flow_kernels.kernels.scale import scale_ as scale_  # not an operator: a part of the backward pass
from flow_kernels.kernels.score import cross_entropy_score, linear_cross_entropy_score

__all__ = [
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "cross_entropy_fwd_bwd",
    "cross_entropy_score",
    "flow_weights",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_fwd_bwd",
    "linear_cross_entropy_score",
]
