"""What the Triton kernels become on GPUs that are not here: every kernel and configuration, compiled and read back.

    python benchmarks/gpu_static.py                 all targets, into benchmarks/results/gpu_static.{csv,md}
    python benchmarks/gpu_static.py --target sm_90  one target's rows of them; each row is written as it is done

Nothing runs. From the machine code of each kernel (cuobjdump from the triton package; the compiler's own assembly for
AMD) it reads:

    registers, stack, shared   per thread and per block; stack > 0 means spilled registers
    wide                       share of the global bytes moved by 16-byte instructions
    instructions per logit     threads * (instructions outside loops + loop bodies * trips) / V; outside loops both sides
                               of a branch count, and columns from V on count too, so an upper bound

Loops that compute no exponential (they write the zeros of a skipped row) are left out. Narrow accesses outside loops are
the row's scalars, one per block and not one per thread, up to the number the kernel's source has (MAX_ROW_SCALARS).
Liger's cross-entropy kernel, where `liger-kernel` is installed, is measured beside them at the launch parameters that its
own launcher would choose.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flow_kernels.kernels import configs
from flow_kernels.kernels import cross_entropy as kernels
from flow_kernels.kernels.flow_weights import BLOCK_SAMPLES, BLOCK_TOKENS, NUM_WARPS, flow_weights_kernel

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
LONG_ROW = 262144
MAX_ROW_SCALARS = 12
COLUMNS = (
    "kernel", "dtype", "options", "V", "block_v", "num_blocks", "threads", "target",
    "registers", "stack_bytes", "shared_bytes", "wide_share", "instructions_per_logit",
)  # fmt: skip


@dataclass
class Instruction:
    """One machine instruction: its name, the address it jumps to (if it does), the bytes a thread moves in global memory."""

    name: str
    address: int
    jump: int | None = None
    global_bytes: int = 0


@dataclass
class Binary:
    """A compiled kernel as counted here."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    code: list[Instruction] = field(default_factory=list)

    def loops(self) -> list[list[Instruction]]:
        """Loop bodies by their backward jumps; of two jumps to one head, the nearer one closes the common path."""
        ends = {}
        for i in self.code:
            if i.jump is not None and i.jump < i.address:
                ends.setdefault(i.jump, i.address)
        return [[i for i in self.code if head <= i.address <= end] for head, end in ends.items()]


def trip_length(body: list[Instruction]) -> int:
    """Instructions of one trip through a loop, without branches over code that computes no exponential.

    Such a branch holds what only the block with the target does, once a row.
    """
    end, skipped = body[-1].address, set()
    for i in body:
        if i.jump is not None and i.address < i.jump <= end:
            region = [other for other in body if i.address < other.address < i.jump]
            if not any(map(_is_exponential, region)):
                skipped |= {other.address for other in region}
    return len(body) - len(skipped)


def _is_exponential(instruction: Instruction) -> bool:
    return "EX2" in instruction.name or "v_exp_f32" in instruction.name


SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def read_cuda(compiled) -> Binary:
    """Count a cubin through cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([tool, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, shared = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups())
    binary = Binary(registers, stack, shared)
    for address, name, operands in SASS.findall(sass):
        instruction = Instruction(name, int(address, 16))
        if name.startswith("NOP"):
            continue
        if name.startswith("BRA"):
            target = re.search(r"0x([0-9a-f]+)", operands)
            instruction.jump = int(target.group(1), 16)
        if name.startswith(("LDG", "STG")):
            bits = re.search(r"\.(128|64|U?S?16|U?S?8)\b", name)
            width = re.sub(r"\D", "", bits.group(1)) if bits else "32"
            instruction.global_bytes = int(width) // 8
        binary.code.append(instruction)
    return binary


AMD_BYTES = {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b64": 8, "b32": 4,
    "ushort": 2, "short": 2, "ubyte": 1, "byte": 1,
}  # fmt: skip


def read_amd(compiled) -> Binary:
    """Count the assembly that the AMD compiler prints."""
    text = compiled.asm["amdgcn"]
    value = {n: int(v) for n, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    binary = Binary(value["vgpr_count"], value["private_segment_fixed_size"], compiled.metadata.shared)
    labels = {}
    for line in text[: text.index(".section")].splitlines() if ".section" in text else text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            labels[label.group(1)] = len(binary.code)
        found = re.match(r"\s+([a-z]+_\w+)\s*(.*)", line)
        if found:
            name, operands = found.groups()
            instruction = Instruction(name, len(binary.code))
            jump = re.match(r"(\.LBB\w+)", operands)
            if jump and name.startswith(("s_cbranch", "s_branch")) and jump.group(1) in labels:
                instruction.jump = labels[jump.group(1)]
            access = re.match(r"(?:global|buffer)_(?:load|store)_(?:short_d16|\w+?_d16_hi|)(\w*)", name)
            if name.startswith(("global_load", "global_store", "buffer_load", "buffer_store")):
                unit = next((u for u in AMD_BYTES if name.endswith(u) or f"_{u}_" in name), "dword")
                instruction.global_bytes = AMD_BYTES[unit] if access else 4
            binary.code.append(instruction)
    return binary


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

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def source(self) -> ASTSource:
        """Arguments as at a call whose pointers, strides and V are multiples of 16."""
        signature = {}
        for argument in self.kernel.arg_names:
            if argument in self.constants:
                signature[argument] = "constexpr"
            else:
                signature[argument] = self._type(argument)
        attributes = {}
        for i, argument in enumerate(self.kernel.arg_names):
            if argument == "row_strides":
                attributes |= {(i, j): [["tt.divisibility", 16]] for j in (0, 1)}
            elif argument in ("V", "logits_row_stride", "n_cols", "X_stride") or signature[argument][0] == "*":
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, self.constants, attributes)

    def _type(self, argument: str):
        types = {
            "target_ptr": "*i64", "Y_ptr": "*i64", "cu_seqlens_ptr": "*i64", "correct_ptr": "*u8",
            "row_strides": ("i32", "i32"), "options": ("i32", "fp32", "fp32", "fp32"), "sum_non_ignore_weight": "fp32",
            "weight_sum": "fp32", "softcap": "fp32",
        }  # fmt: skip
        if argument in ("logits_ptr", "dlogits_ptr", "bias_ptr", "X_ptr"):
            return POINTERS[self.dtype]
        return types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")

    def compile(self, target: GPUTarget) -> Binary:
        """Compile for `target` and read the machine code."""
        options = {"num_warps": self.threads // target.warp_size, "enable_fp_fusion": True}
        compiled = triton.compile(self.source(), target=target, options=options)
        return read_cuda(compiled) if target.backend == "cuda" else read_amd(compiled)

    def measure(self, target_name: str) -> dict:
        """One row of the table."""
        binary = self.compile(TARGETS[target_name])
        loops = binary.loops()
        counted = [body for body in loops if any(map(_is_exponential, body))]
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
                    self.name, str(self.dtype).split(".")[-1], self.options, self.num_classes, self.block,
                    self.num_blocks, self.threads, target_name, binary.registers, binary.stack_bytes,
                    binary.shared_bytes, round(wide / max(wide + narrow, 1), 4),
                    round(executed * self.threads / self.num_classes, 2),
                ),
                strict=True,
            )
        )  # fmt: skip


def our_cases() -> list[Case]:
    """Every kernel and entry of `configs`, plain and with every option; fp16 differs from bf16 in conversions only."""
    cases = []
    for kernel, table in (
        (kernels.cross_entropy_fwd_kernel, configs.WALK),
        (kernels.cross_entropy_fwd_bwd_kernel, configs.ONE_PASS),
        (kernels.cross_entropy_walk_kernel, configs.WALK),
        (kernels.cross_entropy_bwd_kernel, configs.ELEMENTWISE),
    ):
        for dtype in configs.DTYPES:
            for largest, config in table[dtype.itemsize].items():
                for options in ("plain", "all") if dtype != torch.float16 else ("plain",):
                    if table is configs.ONE_PASS and configs.one_pass(dtype, largest, options == "all") is None:
                        continue
                    constants = {"HAS_SMOOTHING": options == "all", "HAS_SOFTCAP": options == "all"}
                    if options == "plain":
                        constants |= {"bias_ptr": None, "class_weight_ptr": None}
                    num_classes = min(largest, LONG_ROW)
                    # One program of the backward kernel works on one block of a row.
                    if kernel is kernels.cross_entropy_bwd_kernel:
                        num_classes = min(num_classes, config.block_v)
                    cases.append(
                        Case(
                            kernel, dtype, num_classes, config.block_v, config.threads, options,
                            constants | config.constants, max(config.num_blocks, 1),
                        )
                    )  # fmt: skip
    for packed in (False, True):
        constants = {"IS_NORMALIZED": True, "BLOCK_SAMPLES": BLOCK_SAMPLES, "BLOCK_TOKENS": BLOCK_TOKENS}
        constants |= {} if packed else {"cu_seqlens_ptr": None}
        block = BLOCK_SAMPLES * BLOCK_TOKENS
        options = "packed" if packed else "padded"
        cases.append(Case(flow_weights_kernel, torch.float32, block, block, NUM_WARPS * 32, options, constants))
    return cases


def liger_cases(target_name: str) -> list[Case]:
    """Liger's kernel as its launcher runs it: blocks of up to 32768 columns, 32 warps (8 on Blackwell in 16 bits)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return []
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    constants = {
        "weight_ptr": None, "z_loss_ptr": None, "token_accuracy_ptr": None, "predicted_tokens_ptr": None,
        "Y_stride": 1, "loss_stride": 1, "token_accuracy_stride": 0, "predicted_tokens_stride": 0,
        "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "softcap": None, "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False, "weight_sum": 0.0,
    }  # fmt: skip
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        threads = 256 if target_name == "sm_100" and dtype == torch.bfloat16 else 1024
        for num_classes in (4096, 32768, 65536, LONG_ROW):
            block = min(32768, triton.next_power_of_2(num_classes))
            for options, gradients in (("gradient", True), ("loss only", False)):
                sizes = {"BLOCK_SIZE": block, "HAS_GRADIENTS": gradients}
                cases.append(
                    Case(liger_cross_entropy_kernel, dtype, num_classes, block, threads, options, constants | sizes)
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
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    path = RESULTS / "gpu_static.csv"
    for target_name in arguments.target or TARGETS:
        cases = [*our_cases(), *liger_cases(target_name)]
        # The format most used comes first, for whoever stops early.
        for case in sorted(cases, key=lambda case: (case.dtype != torch.bfloat16, case.options == "all")):
            if arguments.kernel in case.name:
                row = case.measure(target_name)
                print(*row.values(), sep="\t", flush=True)
                _write(path, row)
    return 0


def _write(path: Path, new: dict) -> None:
    """Put one row into the CSV, over the one it replaces, and write the Markdown anew."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))

    def key(row):
        return tuple(str(row[c]) for c in ("target", "kernel", "dtype", "options", "V"))

    rows = sorted([row for row in rows if key(row) != key(new)] + [new], key=lambda row: (key(row)[:4], int(row["V"])))
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".md").write_text(_markdown(rows))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter cannot compile: unset TRITON_INTERPRET")
    sys.exit(main())
