"""The CPU's forward pass in parts: rows in blocks, and the vocabulary in stretches that end in any order."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_cpu_kernels import PLAIN, head, kernels

from flow_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"no compiled CPU kernels: {cpu.why_not()}")

SMOOTHED = (torch.rand(1201, generator=torch.Generator().manual_seed(3)), 7, 0.1, 4.0, 1e-3)


@pytest.mark.parametrize(("dtype", "name"), kernels())
@pytest.mark.parametrize("options", [PLAIN, SMOOTHED], ids=["plain", "options"])
def test_rows_of_any_block_have_the_bits_of_rows_alone(dtype, name, options):
    """5000 rows are more than are scored at a time; a third do not count, so blocks are of rows that do."""
    input, weight, target, _ = head(5000, 40, 1201, dtype)
    target[::3] = options[1]
    whole = cpu.linear_cross_entropy_fwd(input, weight, target, None, *options, 0, kernels=name)
    scores = cpu.linear_cross_entropy_score(input, weight, target, None, options[1], options[3], 0, kernels=name)
    for start in (0, 1240, 2490, 3740, 4980):
        rows = slice(start, start + 20)
        alone = cpu.linear_cross_entropy_fwd(input[rows], weight, target[rows], None, *options, 0, kernels=name)
        assert all(torch.equal(part[rows], one) for part, one in zip(whole, alone, strict=True))
        alone = cpu.linear_cross_entropy_score(
            input[rows], weight, target[rows], None, options[1], options[3], 0, kernels=name
        )
        assert all(torch.equal(part[rows], one) for part, one in zip(scores, alone, strict=True))


def test_a_bad_target_is_named_by_its_row_of_all():
    input, weight, target, _ = head(5000, 8, 40, torch.float32)
    target[4321] = 40
    with pytest.raises(IndexError, match="the target of row 4321 is 40"):
        cpu.linear_cross_entropy_fwd(input, weight, target, None, *PLAIN, 0)


@pytest.mark.parametrize(("dtype", "name"), kernels((torch.float32, torch.bfloat16)))
def test_no_stretch_is_lost(dtype, name):
    """More threads than cores: stretches wait for those in front of them."""
    input, weight, target, _ = head(70, 64, 40_000, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = cpu.linear_cross_entropy_score(input, weight, target, None, -100, 30.0, 0, kernels=name)
        torch.set_num_threads(13)
        for _ in range(20):
            found = cpu.linear_cross_entropy_score(input, weight, target, None, -100, 30.0, 0, kernels=name)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_stretches_are_merged_in_their_order(tmp_path):
    """Bit for bit in fp64, which no loss in fp32 would show, whatever the order in which they end."""
    program = Path(__file__).with_name("stretches_in_any_order.cpp")
    built = tmp_path / "program"
    include = f"-I{Path(__file__).parents[1] / 'csrc' / 'cpu'}"
    subprocess.run(["g++", "-std=c++17", "-O1", "-pthread", include, program, "-o", built], check=True)
    done = subprocess.run([built], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
