"""Every Triton kernel by the way that a launch takes: the interpreter has a launcher of its own, and so hides mistakes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")
SCRIPT = Path(__file__).parent / "launch_without_gpu.py"
KERNELS = {
    "cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel", "cross_entropy_fwd_bwd_kernel", "cross_entropy_walk_kernel",
    "cross_entropy_score_kernel", "flow_weights_kernel", "scale_kernel",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_launchers_compile_what_they_launch(backend, tmp_path):
    # A cache of its own: with the user's, a kernel that was compiled before would not be compiled now.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, backend], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS
