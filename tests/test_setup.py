"""setup.py: what it refuses, and what it leaves of earlier builds. (Compiling is what installing for the tests did.)"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build(folder: Path, mode: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "FLOW_KERNELS_BUILD": mode}, capture_output=True, text=True, timeout=120
    )


def test_an_unknown_mode_is_refused_before_anything_is_built(tmp_path):
    done = build(tmp_path, "gpu")
    assert done.returncode != 0
    assert "FLOW_KERNELS_BUILD must be auto, cpu, cuda or off, got 'gpu'" in done.stderr
    assert not (tmp_path / "lib").exists()


def test_kernels_of_an_earlier_build_do_not_outlive_a_build_without_them(tmp_path):
    package = tmp_path / "lib/flow_kernels"
    package.mkdir(parents=True)
    for name in ("_cpu.so", "_cuda.so"):
        (package / name).write_bytes(b"of an earlier build")
    done = build(tmp_path, "off")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in package.iterdir()} == {"build_report.txt", "cuda_build_report.txt"}
    assert (package / "cuda_build_report.txt").read_text() == "built with FLOW_KERNELS_BUILD=off\n"
