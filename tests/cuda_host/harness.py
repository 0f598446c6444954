"""Runs csrc/cuda/cross_entropy.cuh on the CPU: compiles it with host_cuda.h and calls it through ctypes.

As a program, `python harness.py LIBRARY` runs a set of rows of every shape, dtype and option through a library that
was compiled with AddressSanitizer, whose runtime must be preloaded into the process.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc" / "cuda"
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Args(ctypes.Structure):
    """CrossEntropyArgs of csrc/cuda/row.cuh."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "target", "row_weight", "class_weight")),
        *((name, c_void_p) for name in ("dlogits", "loss", "lse", "correct")),
        *((name, c_int64) for name in ("logits_row_stride", "dlogits_row_stride", "ignore_index")),
        ("num_classes", c_int), ("cluster_size", c_int),
        *((name, c_float) for name in ("label_smoothing", "softcap", "z_loss", "bad_gradient")),
    )  # fmt: skip


class HostLaunch(ctypes.Structure):
    _fields_ = (
        *((name, c_int) for name in ("element_type", "is_forward", "is_held", "num_threads", "shared_bytes")),
        ("num_rows", c_int64), ("seed", c_uint64),
    )  # fmt: skip


class Counters(ctypes.Structure):
    _fields_ = tuple((name, c_uint64) for name in ("bytes_loaded", "bytes_stored", "unit_loads", "unit_stores"))


class Device(NamedTuple):
    """Shared memory of a block and of an SM in bytes, and the largest cluster."""

    per_block: int
    per_sm: int
    max_cluster_size: int


A100 = Device(163 * 1024, 164 * 1024, 1)
H100 = Device(227 * 1024, 228 * 1024, 16)
RTX_5090 = Device(99 * 1024, 100 * 1024, 8)


class Plan(NamedTuple):
    """`Plan` of csrc/cuda/plan.h."""

    held: bool
    cluster_size: int
    num_threads: int
    shared_bytes: int


class Options(NamedTuple):
    """The options of the operator, in the order of `flow_kernels.reference`."""

    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0


def build(library: Path, *flags: str, sources: Path = SOURCES) -> Path:
    """Compile the harness with the kernels in `sources`."""
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-Wno-unknown-pragmas", *flags, f"-I{HERE}", f"-I{sources}"]
    subprocess.run([*command, str(HERE / "cross_entropy_host.cpp"), "-o", str(library)], check=True)
    return library


class Host:
    """A compiled harness."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.flow_host_plan.argtypes = [c_int64, c_int, c_void_p, c_void_p]
        self.counters = Counters()

    def plan(self, num_classes: int, element_bytes: int, device: Device) -> Plan:
        found = (c_int * 4)()
        self.library.flow_host_plan(num_classes, element_bytes, (c_int * 3)(*device), found)
        return Plan(bool(found[0]), *found[1:])

    def shape(self, num_classes: int, element_bytes: int, held: bool, cluster_size: int, num_threads=128) -> Plan:
        """A plan with a given cluster size, with exactly the shared memory it needs."""
        lanes = 16 // element_bytes
        units = -(-(num_classes + lanes - 1) // lanes)
        return Plan(held, cluster_size, num_threads, 1024 + 16 * -(-units // cluster_size) * held)

    def _run(self, logits, target, options, plan, seed, is_forward, bad_gradient=float("nan"), **pointers):
        class_weight = options.class_weight
        args = Args(
            logits=logits.data_ptr(), target=target.data_ptr(), logits_row_stride=logits.stride(0),
            dlogits_row_stride=pointers["dlogits"].stride(0) if "dlogits" in pointers else 0,
            class_weight=None if class_weight is None else class_weight.data_ptr(), ignore_index=options.ignore_index,
            num_classes=logits.shape[1], cluster_size=plan.cluster_size, label_smoothing=options.label_smoothing,
            softcap=options.softcap, z_loss=options.z_loss, bad_gradient=bad_gradient, **{k: v.data_ptr() for k, v in pointers.items()},
        )  # fmt: skip
        how = HostLaunch(
            element_type=ELEMENT_TYPES[logits.dtype], is_forward=is_forward, is_held=plan.held, seed=seed,
            num_threads=plan.num_threads, shared_bytes=plan.shared_bytes, num_rows=logits.shape[0],
        )  # fmt: skip
        self.library.flow_host_cross_entropy(ctypes.byref(args), ctypes.byref(how), ctypes.byref(self.counters))

    def fwd_bwd(self, logits, target, row_weight, options, plan, seed=0) -> tuple[Tensor, Tensor]:
        """`(loss [N], dlogits [N, V])`; outputs start as NaN, so what is not written shows."""
        loss = torch.full(target.shape, float("nan"))
        dlogits = torch.full(logits.shape, float("nan"), dtype=logits.dtype)
        self._run(logits, target, options, plan, seed, False, row_weight=row_weight, loss=loss, dlogits=dlogits)
        return loss, dlogits

    def fwd_bwd_in_place(self, logits, target, row_weight, options, plan, seed=0) -> Tensor:
        """`loss [N]`; the gradient takes the place of `logits`."""
        loss = torch.full(target.shape, float("nan"))
        pointers = {"row_weight": row_weight, "loss": loss, "dlogits": logits}
        self._run(logits, target, options, plan, seed, False, bad_gradient=0.0, **pointers)
        return loss

    def fwd(self, logits, target, options, plan, seed=0) -> tuple[Tensor, Tensor, Tensor]:
        """`(loss, lse, correct)`, each `[N]`."""
        loss = torch.full(target.shape, float("nan"))
        lse = torch.full(target.shape, float("nan"), dtype=torch.float64)
        correct = torch.zeros(target.shape, dtype=torch.bool)
        plan = plan._replace(held=False, cluster_size=1)
        self._run(logits, target, options, plan, seed, True, loss=loss, lse=lse, correct=correct)
        return loss, lse, correct


def options_of(name: str, num_classes: int) -> Options:
    """The option sets of the oracle matrix."""
    weight = torch.linspace(0.25, 2.0, num_classes)
    return {
        "plain": Options(),
        "smoothing": Options(label_smoothing=0.1),
        "softcap": Options(softcap=20.0),
        "z_loss": Options(z_loss=1e-3),
        "class_weight": Options(class_weight=weight),
        "all": Options(weight, -100, 0.1, 20.0, 1e-3),
    }[name]


OPTION_NAMES = ("plain", "smoothing", "softcap", "z_loss", "class_weight", "all")


def batch(num_classes: int, dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that hurt: an ordinary one, a confident one of negative weight, NaN under weight 0 and under ignore_index.

    A large V comes without the two ordinary rows.
    """
    generator = torch.Generator().manual_seed(num_classes)
    storage = torch.randn(5, num_classes + 2 * offset, generator=generator).mul_(3).to(dtype)
    logits = storage[:, offset : offset + num_classes]
    target = torch.randint(0, num_classes, (5,), generator=generator)
    # p of the target is 0.99 to 1 - 1e-7, depending on V.
    logits[1, target[1]] = 22.0
    logits[2:4] = float("nan")
    target[3] = -100
    target[4] = num_classes - 1
    row_weight = torch.tensor([1.0, -0.5, 0.0, 1.0, 0.25])
    rows = slice(1, 4) if num_classes > 200000 else slice(None)
    return logits[rows], target[rows], row_weight[rows]


def sanitized_cases(host: Host) -> int:
    """Shapes at which an access could leave a row or a block's shared memory; returns how many calls were made."""
    calls = 0
    for dtype in ELEMENT_TYPES:
        for num_classes in (1, 2, 7, 31, 33, 1000, 4097):
            for offset in (0, 1):
                logits, target, row_weight = batch(num_classes, dtype, offset)
                target[0] = num_classes  # out of range: nothing may be read for it
                rows = [logits[i : i + 1].clone() if offset == 0 else logits[i : i + 1] for i in range(5)]
                for name in ("plain", "all"):
                    options = options_of(name, num_classes)
                    for held, cluster_size in ((True, 1), (True, 4), (False, 1)):
                        plan = host.shape(num_classes, dtype.itemsize, held, cluster_size, 64)
                        for i, row in enumerate(rows):
                            host.fwd_bwd(row, target[i : i + 1], row_weight[i : i + 1], options, plan, seed=calls)
                            calls += 1
                    host.fwd(logits, target, options, plan)
    return calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("calls", sanitized_cases(Host(Path(sys.argv[1]))))
