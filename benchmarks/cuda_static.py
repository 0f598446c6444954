"""What the compiler says of the CUDA kernels, without a GPU: registers, spills, shared memory, width of global accesses.

    python benchmarks/cuda_static.py --output benchmarks/results/cuda_static.csv

compiles csrc/cuda/cross_entropy.cu once for each architecture (half a minute each), reads `ptxas -v` and the machine
code from `cuobjdump -sass`, and writes one CSV row for each kernel. `share_16_bytes` is of the bytes that one execution
of every global memory instruction in the code would move. The code also holds the paths for single logits (row ends,
views that start between 16-byte boundaries), which aligned rows do not run: what they run is counted by
tests/test_cuda_kernels.py::test_traffic.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "cross_entropy.cu"
ARCHS = ("80", "90", "100", "120")

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
FUNCTION = re.compile(r"Function : (\w+)")
# LDG and STG move a register's 4 bytes unless they say otherwise; LDGSTS is cp.async.
ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E((?:\.\w+)*)")
NAME = re.compile(r"(cross_entropy_\w*?_kernel)I(f|13__nv_bfloat16|6__half)((?:Lb[01]E)+)E")
DTYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
# Template flags by their place, in csrc/cuda/cross_entropy.cuh.
FLAGS = {
    "cross_entropy_fwd_bwd_kernel": ("held", "softcap", "smoothing"),
    "cross_entropy_fwd_kernel": ("softcap", "smoothing"),
}


def access_bytes(modifiers: str) -> int:
    """Bytes of one global memory instruction, from the modifiers behind its opcode."""
    parts = modifiers.split(".")
    for word, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if word in parts:
            return size
    return 4


def describe(symbol: str) -> dict[str, str | int]:
    """Kernel, dtype and flags from a mangled name."""
    kernel, dtype, flags = NAME.search(symbol).groups()
    values = [int(x) for x in re.findall(r"Lb([01])E", flags)]
    set_flags = [name for name, value in zip(FLAGS[kernel], values, strict=True) if value]
    return {"kernel": kernel, "dtype": DTYPES[dtype], "flags": "+".join(set_flags) or "none"}


def compile_for(arch: str, folder: Path) -> tuple[str, Path]:
    """`(ptxas report, cubin)` of the kernels for sm_<arch>."""
    cubin = folder / f"sm_{arch}.cubin"
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", f"-I{include}", str(SOURCE), "-o", str(cubin)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr, cubin


def cuobjdump() -> str:
    """The one on the PATH, or the one inside the triton package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def resources(report: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spills by symbol from the report of `ptxas -v`."""
    found, symbol = {}, None
    for line in report.splitlines():
        if match := ENTRY.search(line):
            symbol = match[1]
            found[symbol] = {}
        elif match := SPILL.search(line):
            stack, stores, loads = map(int, match.groups())
            found[symbol] |= {"stack_bytes": stack, "spill_bytes": stores + loads}
        elif match := USED.search(line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[symbol] |= {"registers": int(match[1]), "static_shared_bytes": int(shared[1]) if shared else 0}
    return found


def accesses(cubin: Path) -> dict[str, dict[str, float | int]]:
    """Global memory instructions by symbol from the machine code."""
    sass = subprocess.run([cuobjdump(), "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    sizes: dict[str, list[int]] = {}
    symbol = ""
    for line in sass.splitlines():
        if match := FUNCTION.search(line):
            symbol = match[1]
            sizes[symbol] = []
        elif match := ACCESS.search(line):
            sizes[symbol].append(access_bytes(match[2]))
    return {
        symbol: {
            "global_16_bytes": sum(n == 16 for n in found),
            "global_narrower": sum(n < 16 for n in found),
            "share_16_bytes": round(sum(n for n in found if n == 16) / sum(found), 3),
        }
        for symbol, found in sizes.items()
        if found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            start = time.perf_counter()
            report, cubin = compile_for(arch, Path(folder))
            widths = accesses(cubin)
            found = [
                {"arch": f"sm_{arch}", **describe(symbol), **usage, **widths[symbol]}
                for symbol, usage in resources(report).items()
            ]
            rows += sorted(found, key=lambda r: (r["kernel"], r["dtype"], r["flags"]))
            print(
                f"sm_{arch}: {len(found)} kernels in {time.perf_counter() - start:.0f} s, "
                f"at most {max(r['registers'] for r in found)} registers, "
                f"{sum(r['spill_bytes'] + r['stack_bytes'] for r in found)} bytes of spills and stack",
                flush=True,
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
