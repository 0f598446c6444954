"""setup.py: what it refuses, and what it leaves of earlier builds. (Compiling is what installing for the tests did.)"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import typer
from flow_finetune.commands.messages import messages

from flow_kernels import backends, cpu
from flow_kernels.__main__ import describe

ROOT = Path(__file__).parents[1]


def build(folder: Path, mode: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "FLOW_KERNELS_BUILD": mode, **environment},
        capture_output=True,
        text=True,
        timeout=120,
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


def test_an_sdist_holds_everything_that_is_compiled(tmp_path):
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".*", "build", "runs", "results", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "-d", tmp_path]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "tests", "examples"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        files = {name for name in files if not any(part.startswith((".", "__pycache__")) for part in Path(name).parts)}
        assert len(files) > 5
        assert files <= names, sorted(files - names)
    assert {"conftest.py", "LICENSE", "README.md", "flow_kernels/py.typed"} <= names


def test_a_compiler_that_fails_is_named(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'broken compiler 1.0' && exit 0\nexit 1\n")
    compiler.chmod(0o755)
    # Where there is an nvcc, "auto" has it compile too, which takes half a minute an architecture.
    done = build(tmp_path, "auto", CXX=str(compiler), TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "lib/flow_kernels/build_report.txt").read_text()
    assert "compilation failed with broken compiler 1.0" in report
    assert "FLOW_KERNELS_BUILD=cpu pip install -v" in report
    done = build(tmp_path, "cpu", CXX=str(compiler))
    assert done.returncode != 0
    assert "compilation failed with broken compiler 1.0" in done.stderr


def test_the_command_line_names_a_missing_package():
    program = "import sys; sys.modules['typer'] = None; from flow_finetune.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "needs the package 'typer'" in done.stderr
    assert "[train,report]" in done.stderr
    assert "Traceback" not in done.stderr


def test_kernels_that_do_not_load_are_described_and_told_as_an_error(tmp_path, monkeypatch, capfd):
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"of another torch")
    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    said = describe()
    assert "cpu        no   error: the compiled CPU kernels do not load" in said
    assert "cpu: auto -> error: the compiled CPU kernels do not load" in said
    assert "reference  yes" in said
    with pytest.raises(typer.Exit), messages():
        cpu.why_not()
    assert "do not load" in capfd.readouterr().err


def test_a_compiler_that_is_named_and_not_there_is_named(tmp_path):
    done = build(tmp_path, "cpu", CXX="clang++-99")
    assert done.returncode != 0
    assert "no C++ compiler: CXX=clang++-99 is not on the PATH" in done.stderr


def test_kernels_of_other_sources_are_told_by_what_they_lack(tmp_path, monkeypatch):
    empty = tmp_path / "_cpu.so"
    subprocess.run(["cc", "-x", "c", "-shared", "-o", empty, "-"], input=b"int x;", check=True)
    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "library_path", lambda: empty)
    assert cpu.why_not() is None  # the operators of the installed file are there
    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "OPERATORS", (*cpu.OPERATORS, "of_tomorrow"))
    with pytest.raises(ImportError, match=r"lack of_tomorrow, so they are of another version; .*build them again"):
        cpu.why_not()


def test_the_linkers_words_are_told(tmp_path, monkeypatch):
    source = b"int missing_in_torch(void); int call(void) { return missing_in_torch(); }"
    broken = tmp_path / "_cpu.so"
    command = ["cc", "-x", "c", "-shared", "-fPIC", "-Wl,-z,now", "-o", broken, "-"]
    subprocess.run(command, input=source, check=True)
    monkeypatch.setattr(cpu, "_is_loaded", False)
    monkeypatch.setattr(cpu, "library_path", lambda: broken)
    with pytest.raises(ImportError, match="undefined symbol: missing_in_torch"):
        cpu.why_not()


def test_the_operators_may_be_loaded_again():
    program = (
        "import importlib, sys, torch, flow_kernels.ops; importlib.reload(flow_kernels.ops);"
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('flow_kernels')];"
        "import flow_kernels; logits = torch.zeros(2, 3, requires_grad=True);"
        "loss = flow_kernels.cross_entropy(logits, torch.tensor([0, 1])); loss.backward(); assert logits.grad.any();"
        "print(loss.grad_fn.name())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "flow_kernels_cross_entropy_fwd_bwd_Backward\n"


def test_the_import_is_light_and_so_is_the_first_call():
    """torch.compile's own modules take seconds, and an imported triton takes no TRITON_INTERPRET any more."""
    program = (
        "import sys, torch, flow_kernels; logits = torch.zeros(2, 3, requires_grad=True);"
        "flow_kernels.cross_entropy(logits, torch.tensor([0, 1])).backward(); assert logits.grad.any();"
        "print([m for m in ('torch._dynamo', 'triton', 'sympy') if m in sys.modules])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(backends.resolve).items()
