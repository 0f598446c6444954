"""The static report of the Triton kernels: how machine code is counted, and what the committed report promises."""

import csv
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_static  # noqa: E402
from machine_code import Instruction, read_amd, trip_length  # noqa: E402

# A loop whose head lies behind a block of it and whose rare branch lies behind its end, as AMD's compiler writes it.
AMD_CODE = """
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_4
; %bb.1:                                ; %.preheader
	v_mov_b32_e32 v0, 0
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=1
	v_exp_f32_e32 v1, v1
	s_cbranch_scc0 .LBB0_4
.LBB0_3:                                ; %.loop
                                        ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v[4:5], off
	v_add_f32_e32 v0, v0, v1
	s_cbranch_vccnz .LBB0_2
; %bb.5:                                ;   in Loop: Header=BB0_3 Depth=1
	v_cmp_eq_u32_e32 vcc, v0, v1
	v_cndmask_b32_e32 v0, v0, v1
	s_branch .LBB0_2
.LBB0_4:
	global_store_short v[0:1], v2, off
	s_cbranch_execz .LBB0_6
; %bb.7:
	v_mov_b32_e32 v0, 0
	s_branch .LBB0_4
.LBB0_6:
	s_endpgm
	.section	.rodata
  .vgpr_count:     42
  .private_segment_fixed_size: 16
"""


def amd(text):
    return read_amd(SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=32)))


def test_amd_code_is_read_with_its_loops():
    binary = amd(AMD_CODE)
    assert (binary.registers, binary.stack_bytes, binary.shared_bytes) == (42, 16, 32)
    (body,) = binary.loops()
    assert [i.name for i in body][:3] == ["v_exp_f32_e32", "s_cbranch_scc0", "global_load_dwordx4"]
    # The branch that one block of a row takes is not part of a trip; a jump back that is no loop's is none either.
    assert len(body) == 8
    assert trip_length(body) == 6
    assert [i.global_bytes for i in binary.code if i.global_bytes] == [16, 2]


def test_branches_with_work_in_them_count():
    def body(inside):
        return [Instruction("BRA", 0, jump=3), Instruction(inside, 1), Instruction("FADD", 2), Instruction("BRA", 3, 0)]

    assert trip_length(body("FSEL")) == 2
    assert trip_length(body("MUFU.EX2")) == 4


def report_row(**changes):
    row = {
        "kernel": "cross_entropy_fwd_kernel",
        "target": "sm_90",
        "dtype": "bfloat16",
        "options": "plain",
        "rows": "aligned",
        "V": "2048",
    }
    return row | {"stack_bytes": "0", "wide_share": "0.99", "instructions_per_logit": "7.0"} | changes


LIGER_ROW = report_row(kernel="liger_cross_entropy_kernel", options="loss only", stack_bytes="64", wide_share="0.1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"stack_bytes": "16"}, "16 bytes of stack"),
        ({"wide_share": "0.94"}, "0.94 of the bytes in 16-byte accesses"),
        ({"wide_share": "0.94", "rows": "padded"}, "0.94 of the bytes in 16-byte accesses"),
        ({"wide_share": "0.0", "rows": "unaligned"}, None),
        ({"stack_bytes": "16", "rows": "unaligned"}, "16 bytes of stack"),
        ({"instructions_per_logit": "7.1", "rows": "padded"}, None),
        ({"instructions_per_logit": "9.9", "rows": "unaligned", "options": "all"}, None),
        ({"instructions_per_logit": "7.1"}, "7.1 instructions a logit, Liger's 7.0"),
        ({"instructions_per_logit": "7.1", "V": "4096"}, None),
        ({"instructions_per_logit": "7.1", "options": "all"}, None),
        ({"instructions_per_logit": "7.1", "kernel": "cross_entropy_bwd_kernel"}, None),
    ],
)
def test_broken_promises_are_named(changes, message):
    broken = gpu_static.broken_promises([report_row(**changes), LIGER_ROW])
    assert [message in text for text in broken] == ([True] if message else [])


@pytest.fixture(scope="module")
def report():
    with open(BENCHMARKS / "results" / "gpu_static.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_committed_report_is_of_the_kernels_as_they_are(report):
    """By their sources; compiling them again takes minutes."""
    compiler = re.search(r"triton ([\d.]+),", (BENCHMARKS / "results" / "gpu_static.md").read_text())[1]
    if metadata.version("triton") != compiler:
        pytest.skip(f"the report was made with triton {compiler}, here is {metadata.version('triton')}")
    # Under the interpreter kernels have no source that a launch would compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = (
        "import gpu_static as g; print(*[f'{t} {c.digest()}' for t in g.TARGETS for c in g.our_cases(t)], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = set(done.stdout.split("\n")) - {""}
    missing = wanted - {f"{row['target']} {row['source']}" for row in report}
    assert len(wanted) > 300
    assert not missing, f"{len(missing)} of {len(wanted)} rows are of other sources: run benchmarks/gpu_static.py"


def test_the_committed_report_keeps_every_promise(report):
    """Of the rows that are there; `gpu_static.py --check` also says how many are missing."""
    assert gpu_static.broken_promises(report) == []
    assert any(row["target"] == "gfx942" for row in report)
