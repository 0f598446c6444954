"""Machine code as it is counted here: read from a compiled Triton kernel, with its registers, stack and loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton


@dataclass
class Instruction:
    """One machine instruction: name, address it jumps to (if it does), global bytes a thread moves, loop (if known)."""

    name: str
    address: int
    jump: int | None = None
    global_bytes: int = 0
    loop: str | None = None


@dataclass
class Binary:
    """A compiled kernel as counted here."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    names_loops: bool = False
    code: list[Instruction] = field(default_factory=list)

    def loops(self) -> list[list[Instruction]]:
        """Loop bodies as the compiler names them, else by their backward jumps.

        Of two jumps to one head the nearer one closes the common path.
        """
        if self.names_loops:
            names = dict.fromkeys(i.loop for i in self.code if i.loop)
            return [[i for i in self.code if i.loop == name] for name in names]
        ends = {}
        for i in self.code:
            if i.jump is not None and i.jump < i.address:
                ends.setdefault(i.jump, i.address)
        return [[i for i in self.code if head <= i.address <= end] for head, end in ends.items()]


def trip_length(body: list[Instruction]) -> int:
    """Instructions of one trip through a loop, without branches over code that neither computes an exponential nor moves
    global bytes: what only the block with the target does, once a row.
    """
    end, skipped = body[-1].address, set()
    for place, i in enumerate(body):
        if i.jump is None:
            continue
        if i.address < i.jump <= end:
            region = [other for other in body if i.address < other.address < i.jump]
        elif i.name.startswith("s_cbranch"):
            # AMD's compiler may put the branch behind the loop's end: it runs on to a jump to the same place.
            back = (at for at in range(place + 1, len(body)) if body[at].jump == i.jump)
            region = body[place + 1 : next(back, place)]
        else:
            continue
        if not any(is_exponential(other) or other.global_bytes for other in region):
            skipped |= {other.address for other in region}
    return len(body) - len(skipped)


def is_exponential(instruction: Instruction) -> bool:
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


BLOCK = re.compile(r"(?:\.L(BB\w+)|; %(bb\.\w+)):")
INNER = re.compile(r"in Loop: Header=(BB\w+)")


def read_amd(compiled) -> Binary:
    """Count the assembly that the AMD compiler prints, whose comments name the loop of each block of code."""
    text = compiled.asm["amdgcn"]
    value = {n: int(v) for n, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    binary = Binary(value["vgpr_count"], value["private_segment_fixed_size"], compiled.metadata.shared, True)
    addresses, jumps, block, loop = {}, {}, "", None
    for line in text[: text.index(".section")].splitlines() if ".section" in text else text.splitlines():
        if start := BLOCK.match(line):
            block, loop = start[1] or start[2], None
            addresses[block] = len(binary.code)
        if inner := INNER.search(line):
            loop = inner[1]
        elif "Loop Header: Depth" in line:
            loop = block
        if found := re.match(r"\s+([a-z]+_\w+)\s*(.*)", line):
            name, operands = found.groups()
            instruction = Instruction(name, len(binary.code), loop=loop)
            if name.startswith(("s_cbranch", "s_branch")):
                jumps[len(binary.code)] = operands.split()[0].removeprefix(".L")
            if name.startswith(("global_load", "global_store", "buffer_load", "buffer_store")):
                unit = next((u for u in AMD_BYTES if name.endswith(u) or f"_{u}_" in name), "dword")
                instruction.global_bytes = AMD_BYTES[unit]
            binary.code.append(instruction)
    for address, target in jumps.items():
        binary.code[address].jump = addresses.get(target)
    return binary
