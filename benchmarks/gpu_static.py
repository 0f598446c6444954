"""What the Triton kernels become on GPUs that are not here: every kernel and configuration, compiled and read back.

    python benchmarks/gpu_static.py                 all targets, into benchmarks/results/gpu_static.{csv,md}
    python benchmarks/gpu_static.py --target sm_90  one target's rows of them
    python benchmarks/gpu_static.py --check         which rows break a promise or are missing; compiles nothing

Each row is written as it is done, and one whose kernel has not changed since is not made again. Nothing runs. From the
machine code of each kernel (cuobjdump from the triton package; the compiler's own assembly for AMD) it reads:

    registers, stack, shared   per thread and per block; stack > 0 means spilled registers
    wide                       share of the global bytes moved by 16-byte instructions
    instructions per logit     threads * (instructions outside loops + loop bodies * trips) / V; outside loops both sides
                               of a branch count, and columns from V on count too, so an upper bound

Loops that compute no exponential (they write the zeros of a skipped row) are left out. Narrow accesses outside loops are
the row's scalars, one per block and not one per thread, up to the number the kernel's source has (MAX_ROW_SCALARS).
"rows" says what is known of them, in elements:

    aligned      V and the strides are multiples of 16, as most vocabularies are
    padded       the strides are; the linear head's own buffer of logits goes on behind any other V
    unaligned    neither, as logits that somebody else has made, of a vocabulary with one more token. All accesses are one
                 element wide, in Liger's kernel as in ours, and the kernels keep shorter rows in registers
flow_weights_kernel reads row losses, 4 bytes each from offsets that need not be aligned; its accesses are narrow, and its
bytes a V-th of the logits'.

"all" is soft-cap, smoothing, z-loss and class weights together, with a bias in our kernels where the logits are their
own (unaligned ones are not). Liger's cross-entropy kernel,
where `liger-kernel` is installed, is measured beside them at the launch parameters that its own launcher would choose;
its rows "gradient" and "loss only" are the counterparts of ours that make a gradient and that do not.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import importlib.util
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent))
import machine_code
from machine_code import Binary, is_exponential, read_amd, read_cuda, trip_length

from flow_kernels.kernels import configs, score, softmax_row
from flow_kernels.kernels import cross_entropy as kernels
from flow_kernels.kernels.flow_weights import BLOCK_SAMPLES, BLOCK_TOKENS, NUM_WARPS, flow_weights_kernel

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROWS = ("aligned", "padded", "unaligned")
ODD_TARGETS = ("sm_90", "gfx942")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
LONG_ROW = 262144
# The program that counts is part of what a row depends on.
COUNTING = Path(machine_code.__file__).read_bytes()
MAX_ROW_SCALARS = 12
MIN_WIDE_SHARE = 0.95
# What Liger's kernel does where ours does the same. It has no backward pass from a saved lse.
COUNTERPARTS = {
    "cross_entropy_fwd_kernel": "loss only",
    "cross_entropy_fwd_bwd_kernel": "gradient",
    "cross_entropy_walk_kernel": "gradient",
}
COLUMNS = (
    "kernel", "dtype", "options", "rows", "V", "block_v", "num_blocks", "threads", "target",
    "registers", "stack_bytes", "shared_bytes", "wide_share", "instructions_per_logit", "source",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel with the launch parameters that serve rows of `num_classes` logits."""

    kernel: object
    dtype: torch.dtype
    num_classes: int
    block: int
    threads: int
    options: str
    constants: dict
    num_blocks: int = 1
    rows: str = "aligned"
    max_registers: int = 0

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def source(self) -> ASTSource:
        """Arguments as at a call whose pointers are multiples of 16 bytes, and strides and V what `rows` says."""
        # Of our kernels' sizes: V, the end where there is one, the strides.
        places = {"aligned": (0, 2, 3), "padded": (1, 2, 3), "unaligned": ()}[self.rows]
        known = ("n_cols", "X_stride") if self.rows == "aligned" else ()
        signature, attributes, constants = {}, {}, dict(self.constants)
        for i, argument in enumerate(self.kernel.arg_names):
            signature[argument] = "constexpr" if argument in constants else self._type(argument)
            if argument == "sizes":
                if self.rows != "padded":
                    constants[(i, 1)] = None
                attributes |= {(i, j): [["tt.divisibility", 16]] for j in places if j < len(signature[argument])}
            elif argument in known or signature[argument][0] == "*":
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def _type(self, argument: str):
        is_forward = self.kernel in (kernels.cross_entropy_fwd_kernel, score.cross_entropy_score_kernel)
        strides = ("i32",) if is_forward else ("i32", "i32")
        row_options = ("i32", "fp32") if self.kernel is score.cross_entropy_score_kernel else ("i32", *["fp32"] * 3)
        types = {
            "target_ptr": "*i64", "Y_ptr": "*i64", "cu_seqlens_ptr": "*i64", "correct_ptr": "*u8",
            "lse_ptr": "*fp64",
            "sizes": ("i32", "i32" if self.rows == "padded" else "constexpr", *strides),
            "row_options": row_options, "sum_non_ignore_weight": "fp32", "weight_sum": "fp32",
            "softcap": "fp32",
        }  # fmt: skip
        if argument in ("logits_ptr", "dlogits_ptr", "bias_ptr", "X_ptr"):
            return POINTERS[self.dtype]
        return types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")

    def digest(self) -> str:
        """What the row depends on: the kernel with all it calls, its launch parameters, the compiler and this program."""
        # Not the compiler's own key, which changes with a line above the kernel.
        helpers = [f.src for f in vars(softmax_row).values() if isinstance(f, triton.JITFunction)]
        code = (self.kernel.src, *(helpers if self.kernel.__module__.startswith("flow_kernels") else ()))
        launch = (sorted(self.constants.items(), key=str), self.threads, self.num_classes, self.dtype, self.rows)
        launch += (self.max_registers,) if self.max_registers else ()
        parts = (code, launch, triton.__version__, COUNTING)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def compile(self, target: GPUTarget) -> Binary:
        """Compile for `target` and read the machine code."""
        config = configs.Config(self.block, self.threads, max_registers=self.max_registers)
        options = config.compiler_options(target.warp_size, target.backend == "cuda")
        compiled = triton.compile(self.source(), target=target, options=options)
        return read_cuda(compiled) if target.backend == "cuda" else read_amd(compiled)

    def measure(self, target_name: str) -> dict:
        """One row of the table."""
        binary = self.compile(TARGETS[target_name])
        loops = binary.loops()
        counted = [body for body in loops if any(map(is_exponential, body))]
        in_loops = {i.address for body in loops for i in body}
        straight = [i for i in binary.code if i.address not in in_loops]
        trips = -(-self.num_classes // (self.block * self.num_blocks))
        once = len(straight) + sum(len(body) - trip_length(body) for body in counted)
        executed = once + trips * sum(map(trip_length, counted))
        # Bytes of one block of threads: wide and looped accesses by every thread, the row's scalars once.
        wide = narrow = 0
        scalars = 0
        for i in [*straight, *(i for body in counted for i in body)]:
            if i.global_bytes == 16:
                wide += 16 * self.threads
            elif i.global_bytes and i.address not in in_loops and scalars < MAX_ROW_SCALARS:
                scalars += 1
                narrow += i.global_bytes
            else:
                narrow += i.global_bytes * self.threads
        return dict(
            zip(
                COLUMNS,
                (
                    self.name, str(self.dtype).split(".")[-1], self.options, self.rows, self.num_classes,
                    self.block, self.num_blocks, self.threads, target_name, binary.registers, binary.stack_bytes,
                    binary.shared_bytes, round(wide / max(wide + narrow, 1), 4),
                    round(executed * self.threads / self.num_classes, 2), self.digest(),
                ),
                strict=True,
            )
        )  # fmt: skip


def our_cases(target_name: str) -> list[Case]:
    """Every kernel and entry of `configs`, plain and with every option; rows of an odd length for two targets of four."""
    cases = []
    tables = (
        (kernels.cross_entropy_fwd_kernel, configs.WALK),
        (score.cross_entropy_score_kernel, configs.WALK),
        (kernels.cross_entropy_fwd_bwd_kernel, configs.ONE_PASS),
        (kernels.cross_entropy_walk_kernel, configs.WALK),
        (kernels.cross_entropy_bwd_kernel, configs.ELEMENTWISE),
    )
    for rows, (kernel, table), dtype in itertools.product(
        ROWS if target_name in ODD_TARGETS else ROWS[:1], tables, configs.DTYPES
    ):
        if table is configs.ONE_PASS and rows == "unaligned":
            table = configs.ONE_PASS_UNALIGNED
        for (largest, config), options in itertools.product(table[dtype.itemsize].items(), ("plain", "all")):
            if kernel is kernels.cross_entropy_fwd_bwd_kernel:
                config = configs.one_pass(dtype, largest, options == "all", rows != "unaligned")
                if config is None:
                    continue
            if table is configs.WALK:
                config = configs.walk(dtype, largest, options == "all" and "HAS_SMOOTHING" in kernel.arg_names)
            # Short rows never get here: they fit in registers.
            if kernel is kernels.cross_entropy_walk_kernel and largest != configs.MAX_CLASSES:
                continue
            constants = {"HAS_SOFTCAP": options == "all"}
            if "HAS_SMOOTHING" in kernel.arg_names:
                constants["HAS_SMOOTHING"] = options == "all"
            constants["ALIGNED"] = rows != "unaligned"
            if options == "plain" or rows == "unaligned":
                constants["bias_ptr"] = None
            if options == "plain" and "class_weight_ptr" in kernel.arg_names:
                constants["class_weight_ptr"] = None
            num_classes = min(largest, LONG_ROW)
            # One program of the backward kernel works on one block of a row.
            if kernel is kernels.cross_entropy_bwd_kernel:
                num_classes = min(num_classes, config.block_v)
            cases.append(
                Case(
                    kernel, dtype, num_classes, config.block_v, config.threads, options,
                    constants | config.constants, max(config.num_blocks, 1), rows, config.max_registers,
                )
            )  # fmt: skip
    for packed, normalized in itertools.product((False, True), (False, True)):
        constants = {"IS_NORMALIZED": normalized, "BLOCK_SAMPLES": BLOCK_SAMPLES, "BLOCK_TOKENS": BLOCK_TOKENS}
        constants |= {} if packed else {"cu_seqlens_ptr": None}
        block = BLOCK_SAMPLES * BLOCK_TOKENS
        options = ("packed" if packed else "padded") + (", normalized" if normalized else "")
        cases.append(Case(flow_weights_kernel, torch.float32, block, block, NUM_WARPS * 32, options, constants))
    return cases


LIGER_FLAGS = {
    "weight_ptr": None, "z_loss_ptr": None, "token_accuracy_ptr": None, "predicted_tokens_ptr": None, "Y_stride": 1,
    "loss_stride": 1, "token_accuracy_stride": 0, "predicted_tokens_stride": 0, "lse_square_scale": 0.0,
    "label_smoothing": 0.0, "reduction": "mean", "softcap": None, "RETURN_Z_LOSS": False,
    "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False,
    "weight_sum": 0.0,
}  # fmt: skip
LIGER_ALL = {"lse_square_scale": 1e-4, "label_smoothing": 0.1, "HAS_WEIGHT": True, "HAS_SOFTCAPPING": True}
LIGER_ARGUMENTS = ("weight_ptr", "weight_sum", "softcap")


def liger_cases(target_name: str) -> list[Case]:
    """Liger's kernel as its launcher runs it: blocks of up to 32768 columns, 32 warps (8 on Blackwell in 16 bits)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return []
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    with_all = {k: v for k, v in (LIGER_FLAGS | LIGER_ALL).items() if k not in LIGER_ARGUMENTS}
    cases = []
    for dtype in configs.DTYPES:
        threads = 256 if target_name == "sm_100" and dtype.itemsize == 2 else 1024
        kinds = ("aligned", "unaligned") if target_name in ODD_TARGETS else ("aligned",)
        for num_classes, rows in itertools.product((*configs.ONE_PASS[dtype.itemsize], LONG_ROW), kinds):
            block = min(32768, triton.next_power_of_2(num_classes))
            for options, flags in (("gradient", LIGER_FLAGS), ("gradient, all", with_all), ("loss only", LIGER_FLAGS),
                                   ("loss only, all", with_all)):  # fmt: skip
                # Only what has a counterpart among ours: two configurations that score, short rows with every option.
                if options.startswith("loss only") and num_classes not in (min(configs.WALK[dtype.itemsize]), LONG_ROW):
                    continue
                if (
                    options.startswith("gradient")
                    and num_classes != LONG_ROW
                    and not configs.one_pass(dtype, num_classes, options.endswith("all"), rows == "aligned")
                ):
                    continue
                sizes = {"BLOCK_SIZE": block, "HAS_GRADIENTS": options.startswith("gradient")}
                constants = flags | sizes
                cases.append(
                    Case(liger_cross_entropy_kernel, dtype, num_classes, block, threads, options, constants, rows=rows)
                )
    return cases


def _markdown(rows: list[dict]) -> str:
    lines = [
        "# Compiled kernels, read back",
        "",
        f"`python benchmarks/gpu_static.py`, triton {triton.__version__}, torch {torch.__version__}; nothing ran on a GPU.",
        "Columns are explained at the head of the program. Kernels of `liger_*` are liger-kernel's.",
        f"{len(rows)} rows; what is not listed has not been compiled in the run that wrote this.",
        "",
        "| " + " | ".join(COLUMNS[:-1]) + " |",
        "|" + " --- |" * len(COLUMNS[:-1]),
    ]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS[:-1]) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--check", action="store_true", help="only look at the rows that are there")
    arguments = parser.parse_args()
    path = RESULTS / "gpu_static.csv"
    if arguments.check:
        broken = broken_promises(_read(path))
        print("\n".join(broken) or f"{len(_read(path))} rows keep every promise")
        is_complete = True
        for target_name in TARGETS:
            done = {row["source"] for row in _read(path) if row["target"] == target_name}
            cases = [*our_cases(target_name), *liger_cases(target_name)]
            current = sum(case.digest() in done for case in cases)
            print(f"{target_name}: {current} of {len(cases)} rows are there and of the kernels as they are now")
            is_complete &= current == len(cases)
        return 1 if broken or not is_complete else 0
    for target_name in arguments.target or TARGETS:
        cases = [*our_cases(target_name), *liger_cases(target_name)]
        done = {row["source"] for row in _read(path) if row["target"] == target_name}
        # The format most used comes first, for whoever stops early.
        for case in sorted(cases, key=lambda case: (case.rows, case.dtype != torch.bfloat16, "all" in case.options)):
            if arguments.kernel in case.name and case.digest() not in done:
                row = case.measure(target_name)
                print(*row.values(), sep="\t", flush=True)
                _write(path, row)
    return 0


def broken_promises(rows: list[dict]) -> list[str]:
    """In words: spilled registers, narrow accesses, and more instructions a logit than Liger's kernel at the same V.

    Unaligned rows have narrow accesses, and with every option at once no promise about instructions.
    """
    liger = {
        (row["target"], row["dtype"], row["options"], row["rows"], row["V"]): float(row["instructions_per_logit"])
        for row in rows
        if row["kernel"].startswith("liger")
    }
    broken = []
    for row in rows:
        name = " ".join(row[c] for c in ("target", "kernel", "dtype", "options", "rows", "V"))
        if row["kernel"].startswith("liger"):
            continue
        if int(row["stack_bytes"]):
            broken.append(f"{name}: {row['stack_bytes']} bytes of stack")
        if row["kernel"] in COUNTERPARTS:
            if row["rows"] != "unaligned" and float(row["wide_share"]) < MIN_WIDE_SHARE:
                broken.append(f"{name}: {row['wide_share']} of the bytes in 16-byte accesses")
            options = COUNTERPARTS[row["kernel"]] + (", all" if row["options"] == "all" else "")
            # All options together on unaligned rows, forward only, take up to 8 % more: no promise.
            if row["rows"] == "unaligned" and row["options"] == "all":
                continue
            theirs = liger.get((row["target"], row["dtype"], options, row["rows"], row["V"]))
            if theirs is not None and float(row["instructions_per_logit"]) > theirs:
                broken.append(f"{name}: {row['instructions_per_logit']} instructions a logit, Liger's {theirs}")
    return broken


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{"source": "", "rows": "aligned"} | row for row in csv.DictReader(file)]


def _write(path: Path, new: dict) -> None:
    """Put one row into the CSV, over the one it replaces, and write the Markdown anew."""

    def key(row):
        return tuple(str(row[c]) for c in ("target", "kernel", "dtype", "options", "rows", "V"))

    path.parent.mkdir(exist_ok=True)
    # Runs of several targets at a time share the file.
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [row for row in _read(path) if key(row) != key(new)] + [new]
        rows = sorted(rows, key=lambda row: (key(row)[:5], int(row["V"])))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".md").write_text(_markdown(rows))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter cannot compile: unset TRITON_INTERPRET")
    sys.exit(main())
