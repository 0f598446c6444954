"""Triton kernels and their launchers, under the names and signatures of `flow_kernels.reference`, for fp32, bf16, fp16.

Performance model. One row of V logits of b bytes; about 8 instructions and one exponential a logit forward, 18 to 20
and two with the gradient (`benchmarks/results/gpu_static.md`). The kernels move

    scoring    b V read                       2 V bytes in bf16
    training   b V read, b V written          4 V bytes while a row fits in registers (128 KiB), else 6 V

so the floor of a row is its bytes over the memory bandwidth, unless exponentials (16 a cycle and multiprocessor on
NVIDIA, by the vendor's tables) take longer. In nanoseconds a row of V = 151936 in bf16, and for V = 65536 in one pass:

    device   bandwidth   scoring    exponentials   training, two reads   one pass, V = 65536
    A100     2.0 TB/s    152 ns      62 ns         456 ns                131 ns
    H100     3.35 TB/s    91 ns      41 ns         272 ns                 78 ns
    H200     4.8 TB/s     63 ns      41 ns         190 ns                 55 ns
    B200     8.0 TB/s     38 ns      35 ns         114 ns                 33 ns
    MI300X   5.3 TB/s     57 ns      15 ns         172 ns                 49 ns

What a good streaming kernel reaches is 85 to 90 % of the bandwidth, which is to be expected where exponentials and
instructions hide behind it: everywhere but on B200, whose memory outruns its exponential units, so that scoring there is
bound by both. Training in two reads may gain from the second read hitting L2: the rows in flight are 0.3 MB times the
number of multiprocessors times resident blocks, which is near or above the size of L2, so no gain is counted. Under the
linear head the row kernel is a small part: three products of 2 D flops a logit take 4.7 us a row of V = 151936 with
D = 4096 at 800 TFLOP/s, the row kernel 0.3 us on H100.

Nothing here has been timed on a GPU; these are floors on paper.
"""

from flow_kernels.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd, cross_entropy_fwd_bwd
from flow_kernels.kernels.flow_weights import flow_weights
from flow_kernels.kernels.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_fwd_bwd,
)

__all__ = [
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "cross_entropy_fwd_bwd",
    "flow_weights",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_fwd_bwd",
]
