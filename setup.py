"""Builds flow-kernels; everything static is in pyproject.toml.

FLOW_KERNELS_BUILD says what to compile: `auto` (the default: the CPU kernels if torch and a compiler are there, the
CUDA kernels if besides nvcc is there and torch has CUDA), `cpu` (the CPU kernels, and failing to is an error), `cuda`
(auto, but nvcc is enough for the CUDA kernels and failing to compile them is an error), `off`. TORCH_CUDA_ARCH_LIST
names the GPUs. Without compiled kernels the install is pure Python and works; the reasons are left in
flow_kernels/build_report.txt and cuda_build_report.txt, which `python -m flow_kernels` prints.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("FLOW_KERNELS_BUILD", "auto")
SOURCES = ["csrc/ops.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
COMPILER = os.environ.get("CXX", "c++")
REPORT = "build_report.txt"
CUDA_REPORT = "cuda_build_report.txt"
CUDA_ARCHS = "8.0;9.0;10.0;12.0"


def why_not() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if MODE == "off":
        return "built with FLOW_KERNELS_BUILD=off"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the CPU kernels are x86-64 code and this is {platform.machine()}"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch could not be imported at build time ({error}); install with --no-build-isolation"
    if os.name != "nt" and not any(shutil.which(c) for c in (COMPILER, "g++")):
        return f"no C++ compiler ({COMPILER} and g++ are not on the PATH)"
    # One that is named is the one that is meant; "ccache g++" is a program with an argument.
    if os.name != "nt" and "CXX" in os.environ and not shutil.which((COMPILER.split() or [""])[0]):
        return f"no C++ compiler: CXX={COMPILER} is not on the PATH"
    return None


def run(command: list[str]) -> subprocess.CompletedProcess:
    """What a program says, in whatever encoding."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def compiler_version() -> str:
    """The first line of what the compiler says of itself."""
    try:
        return run([COMPILER, "--version"]).stdout.splitlines()[0]
    except (OSError, IndexError):
        return COMPILER


def why_not_cuda() -> str | None:
    """The reason why no CUDA kernels are compiled here, or None."""
    if MODE in ("cpu", "off"):
        return f"built with FLOW_KERNELS_BUILD={MODE}"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    try:
        import torch
    except ImportError as error:
        return f"torch could not be imported at build time ({error}); install with --no-build-isolation"
    if MODE == "auto" and torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA, so FLOW_KERNELS_BUILD=auto left them out"
    return None


def cuda_archs() -> list[tuple[str, bool]]:
    """Number and whether PTX is kept of every GPU to compile for: those asked for that the kernels can run on (8.0 and
    newer, for cp.async), else all of CUDA_ARCHS that this nvcc knows, the newest with PTX for those to come."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    archs = [arch.replace(".", "").partition("+")[::2] for arch in wanted.split(";") if arch]
    archs = [
        (number, bool(ptx))
        for number, ptx in archs
        if number.rstrip("af").isdecimal() and int(number.rstrip("af")) >= 80
    ]
    if archs:
        return archs
    known = run(["nvcc", "--list-gpu-arch"]).stdout
    numbers = [arch.replace(".", "") for arch in CUDA_ARCHS.split(";")]
    numbers = [number for number in numbers if f"compute_{number}" in known.split()] or numbers[:2]
    return [(number, number == numbers[-1]) for number in numbers]


def nvcc_command(output: Path) -> list[str]:
    """nvcc itself, because torch's CUDAExtension refuses a torch without CUDA and these sources need none."""
    import torch

    root = Path(torch.__file__).parent
    command = ["nvcc", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-I{root / 'include'}"]
    # Nothing younger than torch 2.10 is used, so one file serves every torch from there on.
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    for number, ptx in cuda_archs():
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    return [*command, "csrc/cuda/cross_entropy.cu", "-o", str(output), f"-L{root / 'lib'}", "-ltorch_cpu", "-ldl"]


class BuildKernels(build_ext):
    """Compiles with torch's build command, or says why not and leaves a pure-Python package."""

    def run(self) -> None:
        if MODE not in ("auto", "cpu", "cuda", "off"):
            raise SystemExit(f"FLOW_KERNELS_BUILD must be auto, cpu, cuda or off, got {MODE!r}")
        self.run_cuda()
        report = Path(self.get_ext_fullpath("flow_kernels._cpu")).parent / REPORT
        report.parent.mkdir(parents=True, exist_ok=True)
        reason = why_not()
        if reason is None:
            try:
                self.compile()
                report.unlink(missing_ok=True)
                return
            except Exception as error:
                reason = (
                    f"compilation failed with {compiler_version()}: {str(error).strip().splitlines()[0]} "
                    "(FLOW_KERNELS_BUILD=cpu pip install -v --no-build-isolation . shows what the compiler said)"
                )
                if MODE == "auto":
                    print(f"flow-kernels: {error}")
        if MODE == "cpu":
            raise SystemExit(f"flow-kernels: {reason}")
        for stale in report.parent.glob("_cpu*.so"):
            stale.unlink()
        print(f"flow-kernels: pure-Python install: {reason}")
        report.write_text(reason + "\n", encoding="utf-8")

    def run_cuda(self) -> None:
        folder = Path(self.get_ext_fullpath("flow_kernels._cpu")).parent
        folder.mkdir(parents=True, exist_ok=True)
        report, built = folder / CUDA_REPORT, folder / "_cuda.so"
        reason = why_not_cuda()
        if reason is None:
            # Under another name first: a process may have the old file loaded.
            fresh = folder / "_cuda.so.new"
            done = run(nvcc_command(fresh))
            if done.returncode == 0:
                fresh.replace(built)
                report.unlink(missing_ok=True)
                print("flow-kernels: CUDA kernels compiled")
                return
            print(done.stdout + done.stderr)
            reason = "nvcc failed: " + next(
                (x for x in done.stderr.splitlines() if "error" in x or "fatal" in x), "see the build log"
            )
        if MODE == "cuda":
            raise SystemExit(f"flow-kernels: {reason}")
        # Of an earlier build: it would be loaded beside a report that says there is none.
        built.unlink(missing_ok=True)
        report.write_text(reason + "\n", encoding="utf-8")

    def compile(self) -> None:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

        # -O3 only: each instruction set is chosen inside its own file (csrc/cpu/isa_*.cpp), never for all of them.
        # The uninitialised values that GCC 12 warns of are its own, in _mm512_undefined_ps.
        # at::parallel_for is serial without -fopenmp. It is not given to the linker: the runtime must be the one inside
        # torch, or torch.set_num_threads would not reach it.
        flags = ["-O3", "-g0", "-fopenmp", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
        # For ninja, which compiles again where the command differs: another torch's headers may be older than the objects.
        flags += [f"-DFLOW_KERNELS_TORCH={torch.__version__}"]
        extension = CppExtension(
            "flow_kernels._cpu",
            SOURCES,
            extra_compile_args=flags + os.environ.get("FLOW_KERNELS_CXXFLAGS", "").split(),
            extra_link_args=os.environ.get("FLOW_KERNELS_CXXFLAGS", "").split(),
        )
        command = BuildExtension(self.distribution, use_ninja=is_ninja_available(), no_python_abi_suffix=True)
        command.initialize_options()
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "parallel", "force"):
            setattr(command, option, getattr(self, option))
        self.distribution.ext_modules = [extension]
        command.ensure_finalized()
        command.extensions = [extension]
        # Without ninja, objects of an earlier build would be taken whatever headers, torch's among them, have changed.
        command.force = True
        command.run()
        print(f"flow-kernels: CPU kernels compiled against torch {torch.__version__}")

    def get_outputs(self) -> list[str]:
        folder = Path(self.get_ext_fullpath("flow_kernels._cpu")).parent
        built = (*folder.glob("_cpu*.so"), *folder.glob("_cpu*.pyd"), folder / "_cuda.so")
        return [str(p) for p in (*built, folder / REPORT, folder / CUDA_REPORT) if p.exists()]


setup(ext_modules=[Extension("flow_kernels._cpu", SOURCES)], cmdclass={"build_ext": BuildKernels})
