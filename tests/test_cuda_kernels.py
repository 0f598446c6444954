"""The CUDA cross-entropy kernels without a GPU: their source, compiled for the host, against the reference in fp64.

tests/cuda_host runs the threads of a cluster as fibers, in any order; see host_cuda.h for what it makes visible.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_host.harness import (
    A100,
    ELEMENT_TYPES,
    H100,
    OPTION_NAMES,
    RTX_5090,
    SOURCES,
    Device,
    Host,
    Options,
    batch,
    build,
    options_of,
)  # fmt: skip

from flow_kernels import cuda, reference

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = tuple(ELEMENT_TYPES)
SIZES = (1, 2, 7, 31, 32, 33, 1000, 4097, 50257, 65536, 262144, 1000003)
# Half a unit in the last place of what is written; fp32 logits get the arithmetic's error alone.
UNIT_ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Half the smallest step of fp16; the others' subnormals are out of reach here.
SMALLEST = {torch.float32: 1e-38, torch.bfloat16: 1e-38, torch.float16: 2**-25}

# A mistake in the kernels, as a replacement in their source, and what must come out differently because of it.
MISTAKES = {
    "no barrier before the constants are read": (
        "cross_entropy.cuh", "  }\n  __syncthreads();\n  // A block's", "  }\n  // A block's",
    ),
    "a block leaves while others read its statistics": (
        "cross_entropy.cuh", "  if (args.cluster_size > 1) cluster_wait();\n", "",
    ),
    "the last copies are not waited for": ("row.cuh", "    copy_wait<0>();\n", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Every library of this file by name, compiled two at a time."""
    folder = tmp_path_factory.mktemp("cuda_host")
    jobs = {"host": ("-O1",), "asan": ("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")}
    sources = {name: SOURCES for name in jobs}
    for i, (name, (file, right, wrong)) in enumerate(MISTAKES.items()):
        sources[name] = Path(shutil.copytree(SOURCES, folder / f"mistake_{i}"))
        text = (sources[name] / file).read_text()
        assert text.count(right) == 1, f"the mistake no longer fits the source: {name}"
        (sources[name] / file).write_text(text.replace(right, wrong))
        jobs[name] = ("-O0", "-DONLY_BFLOAT16")
    with ThreadPoolExecutor(2) as pool:
        found = {
            name: pool.submit(build, folder / f"{i}.so", *flags, sources=sources[name])
            for i, (name, flags) in enumerate(jobs.items())
        }
        return {name: job.result() for name, job in found.items()}


@pytest.fixture(scope="module")
def host(libraries):
    return Host(libraries["host"])


def wide(*values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check_fwd_bwd(host, logits, target, row_weight, options, plan, seed=1):
    """Loss within fp32's rounding and every gradient within one rounding to its dtype, relative to each of them."""
    loss, dlogits = host.fwd_bwd(logits, target, row_weight, options, plan, seed)
    arguments = wide(logits, target, row_weight)
    _, wanted_loss, wanted = reference.cross_entropy_fwd_bwd(*arguments, *wide(*options))
    torch.testing.assert_close(loss, wanted_loss.float(), rtol=1e-5, atol=1e-6)
    kept = torch.where(row_weight == 0, -100, target)
    _, lse, _ = reference.cross_entropy_fwd(arguments[0], kept, *wide(*options))
    # Where the terms of a gradient cancel, its error is that of the terms: the smoothing share at every column, hit and
    # spread at the target.
    terms = torch.full_like(wanted, options.label_smoothing / logits.shape[1])
    rows = (kept != -100).nonzero().squeeze(1)
    terms[rows, target[rows]] += options.label_smoothing + 2 * options.z_loss * lse[rows].abs()
    if options.class_weight is not None:
        terms *= float(options.class_weight.max())
    bound = (UNIT_ROUNDOFF[logits.dtype] + 1e-5) * wanted.abs() + SMALLEST[logits.dtype]
    bound += 1e-5 * terms * row_weight[:, None].double().abs()
    excess = (dlogits.double() - wanted).abs() - bound
    assert float(excess.max()) <= 0, (
        f"off by {float(excess.max()):.2e} at {divmod(int(excess.argmax()), wanted.shape[1])}"
    )


@pytest.mark.parametrize("name", OPTION_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("num_classes", SIZES)
def test_against_fp64(host, num_classes, dtype, name):
    """With the plan of an H100, but 128 threads a block: fibers cost time, and the code knows no number of threads."""
    plan = host.plan(num_classes, dtype.itemsize, H100)._replace(num_threads=128)
    check_fwd_bwd(host, *batch(num_classes, dtype), options_of(name, num_classes), plan)


@pytest.mark.parametrize(("held", "cluster_size"), [(True, 1), (True, 2), (True, 16), (False, 1)])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("num_classes", [1, 2, 7, 33, 1000, 4097])
def test_unaligned_rows_and_every_way_to_hold_them(host, num_classes, dtype, offset, held, cluster_size):
    """Rows of a view start anywhere; a small row leaves blocks of a cluster without columns."""
    plan = host.shape(num_classes, dtype.itemsize, held, cluster_size, num_threads=64)
    for name in ("plain", "all"):
        check_fwd_bwd(host, *batch(num_classes, dtype, offset), options_of(name, num_classes), plan)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("num_classes", [1, 2, 33, 4097, 50257, 262144])
def test_forward_only(host, num_classes, dtype, name):
    logits, target, _ = batch(num_classes, dtype, offset=1)
    target[logits.isnan().all(1)] = -100
    options = options_of(name, num_classes)
    found = host.fwd(logits, target, options, host.shape(num_classes, dtype.itemsize, False, 1), seed=1)
    wanted = reference.cross_entropy_fwd(*wide(logits, target), *wide(*options))
    torch.testing.assert_close(found[0], wanted[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2], wanted[2])


def test_first_of_equal_maxima_is_the_prediction(host):
    logits = torch.zeros(3, 100)
    logits[:, 40] = logits[:, 60] = 5.0
    _, _, correct = host.fwd(logits, torch.tensor([40, 60, 0]), Options(), host.shape(100, 4, False, 1))
    assert correct.tolist() == [True, False, False]


@pytest.mark.parametrize(("held", "cluster_size"), [(True, 1), (True, 8), (False, 1)])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_thread_orders(host, name, held, cluster_size):
    """24 orders in which threads run give the same bits."""
    logits, target, row_weight = batch(4097, torch.bfloat16, offset=1)
    options, plan = options_of(name, 4097), host.shape(4097, 2, held, cluster_size)
    loss, dlogits = host.fwd_bwd(logits, target, row_weight, options, plan, seed=0)
    for seed in range(1, 25):
        other_loss, other = host.fwd_bwd(logits, target, row_weight, options, plan, seed)
        assert torch.equal(loss.view(torch.int32), other_loss.view(torch.int32))
        assert torch.equal(dlogits.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize(("held", "cluster_size"), [(True, 1), (True, 8), (False, 1)])
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_gradient_in_the_place_of_its_logits(host, offset, dtype, name, held, cluster_size):
    """The same bits, whatever the order of the threads, and nothing beside the rows."""
    logits, target, row_weight = batch(4097, dtype, offset)
    options, plan = options_of(name, 4097), host.shape(4097, dtype.itemsize, held, cluster_size, num_threads=64)
    for seed in range(4):
        buffer = torch.full((5, 4112 + offset), 7.0, dtype=dtype)
        rows = buffer[:, offset : offset + 4097]
        rows.copy_(logits)
        loss, dlogits = host.fwd_bwd(rows, target, row_weight, options, plan)
        found = host.fwd_bwd_in_place(rows, target, row_weight, options, plan, seed)
        assert torch.equal(found, loss)
        assert torch.equal(rows, dlogits)
        assert (buffer[:, :offset] == 7).all()
        assert (buffer[:, offset + 4097 :] == 7).all()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(libraries, mistake):
    """A missing barrier or wait changes the result under at least one of the orders that the right code passes."""
    host = Host(libraries[mistake])
    # Large enough for all stages of the copy to have something.
    logits, target, row_weight = batch(50257, torch.bfloat16)
    plan = host.shape(50257, 2, True, 4)

    def is_wrong(seed):
        try:
            check_fwd_bwd(host, logits, target, row_weight, Options(), plan, seed)
        except AssertionError:
            return True
        return False

    assert any(is_wrong(seed) for seed in range(25))


@pytest.mark.parametrize("num_classes", [50257, 262144, 1000000])
def test_traffic(host, num_classes):
    """4 bytes a bf16 logit, 2 read and 2 written, with the plan and the threads an H100 gets."""
    logits = torch.randn(2, num_classes, generator=torch.Generator().manual_seed(0)).bfloat16()
    plan = host.plan(num_classes, 2, H100)
    assert plan.held
    target, row_weight = torch.tensor([5, num_classes - 1]), torch.ones(2)
    host.fwd_bwd(logits, target, row_weight, Options(), plan)
    read, written = (n / logits.numel() for n in (host.counters.bytes_loaded, host.counters.bytes_stored))
    assert 2.0 <= read < 2.02, read
    assert 2.0 <= written < 2.02, written
    by_unit = 16 * (host.counters.unit_loads + host.counters.unit_stores)
    assert by_unit / (host.counters.bytes_loaded + host.counters.bytes_stored) > 0.95
    host.fwd(logits, target, Options(), plan)
    assert host.counters.bytes_loaded / logits.numel() < 2.02


def test_skipped_rows_are_not_read(host):
    logits, target, row_weight = batch(4097, torch.bfloat16)
    target[0] = -100
    row_weight[1:] = 0.0
    loss, dlogits = host.fwd_bwd(logits, target, row_weight, Options(), host.shape(4097, 2, True, 2))
    assert host.counters.bytes_loaded <= 5 * 2 * 4 * 12  # target and weight, once a warp
    assert torch.equal(loss, torch.zeros(5))
    assert torch.equal(dlogits, torch.zeros_like(dlogits))


@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_target_out_of_range_is_nan(host, bad):
    logits, target = torch.randn(3, 100), torch.tensor([3, bad, 5])
    loss, dlogits = host.fwd_bwd(logits, target, torch.ones(3), Options(), host.shape(100, 4, True, 1))
    assert loss.isnan().tolist() == [False, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, False]
    loss, lse, correct = host.fwd(logits, target, Options(), host.shape(100, 4, False, 1))
    assert loss.isnan().tolist() == lse.isnan().tolist() == [False, True, False]
    assert not correct[1]


def test_infinite_logits(host):
    """-inf takes a column out; a NaN, an infinite maximum or a target at -inf comes out as in the reference."""
    logits = torch.randn(6, 70)
    logits[0, 10:60] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2, 5] = torch.inf
    logits[3, 3] = torch.inf
    logits[4] = -torch.inf
    logits[5, 3] = -torch.inf
    target, row_weight = torch.full((6,), 3), torch.ones(6)
    _, loss, dlogits = reference.cross_entropy_fwd_bwd(*wide(logits, target, row_weight), *Options())
    for held, cluster_size in ((True, 1), (True, 2), (False, 1)):
        found = host.fwd_bwd(logits, target, row_weight, Options(), host.shape(70, 4, held, cluster_size))
        torch.testing.assert_close(found[0], loss.float(), equal_nan=True)
        torch.testing.assert_close(found[1].isnan().any(1), dlogits.isnan().any(1))
        torch.testing.assert_close(found[1][[0, 5]], dlogits[[0, 5]].float())
    logits[:2, 3] = 9.0  # the largest number; a row that holds a NaN or infinity has no prediction
    correct = host.fwd(logits, target, Options(), host.shape(70, 4, False, 1))[2]
    assert correct.tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("device", "num_classes", "element_bytes", "held", "cluster_size"),
    [
        (H100, 1, 2, True, 1),
        (H100, 50257, 2, True, 1),
        (H100, 128256, 2, True, 4),
        (H100, 262144, 2, True, 8),
        (H100, 1000003, 2, True, 16),
        (H100, 1850000, 2, True, 16),
        (H100, 2000000, 2, False, 1),
        (H100, 262144, 4, True, 8),
        (H100, 1000003, 4, False, 1),
        (A100, 50257, 2, True, 1),
        (A100, 82000, 2, True, 1),
        (A100, 128256, 2, False, 1),
        (RTX_5090, 262144, 2, True, 8),
        (Device(48 * 1024, 64 * 1024, 1), 50257, 2, False, 1),
    ],
)
def test_plan(host, device, num_classes, element_bytes, held, cluster_size):
    plan = host.plan(num_classes, element_bytes, device)
    assert (plan.held, plan.cluster_size) == (held, cluster_size)
    assert plan.shared_bytes <= device.per_block
    assert plan.num_threads in (128, 256, 512)


def test_under_address_sanitizer(libraries):
    """Rows that end with their allocation, in a process that has AddressSanitizer's runtime."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    }
    program = Path(__file__).parent / "cuda_host" / "harness.py"
    done = subprocess.run(
        [sys.executable, str(program), str(libraries["asan"])], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) == 3 * 7 * 2 * 2 * 3 * 5


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize(
    ("dtype", "head_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("num_classes", [1000, 1008])
def test_a_linear_head_of_several_chunks(host, monkeypatch, num_classes, dtype, head_dtype, name):
    """The kernels of the host in the place of the compiled ones, the last chunk smaller, rows that do not count."""
    widths = set()

    def in_place(logits, target, row_weight, loss, *options):
        widths.add((len(logits), logits.stride(0)))
        plan = host.shape(logits.shape[1], dtype.itemsize, True, 2, num_threads=64)
        loss.copy_(host.fwd_bwd_in_place(logits, target, row_weight, Options(*options), plan))

    monkeypatch.setattr(torch.ops.flow_kernels_cuda, "cross_entropy_fwd_bwd_in_place", in_place, raising=False)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 24, generator=generator).div(2).to(dtype) for n in (20, num_classes))
    head = head.to(head_dtype)
    target = torch.randint(0, num_classes, (20,), generator=generator)
    row_weight = torch.rand(20, generator=generator)
    target[3], row_weight[9], hidden[9] = -100, 0.0, float("nan")
    options = options_of(name, num_classes)
    needs = (True, True, False)
    found = cuda.linear_cross_entropy_fwd_bwd(hidden, head, target, row_weight, None, *options, 8, *needs)
    assert widths == {(8, 1008), (4, 1008)}
    kept = hidden.nan_to_num()
    wanted = reference.linear_cross_entropy_fwd_bwd(
        *wide(kept, head, target, row_weight), None, *wide(*options), 0, *needs
    )
    bound = {torch.float32: 1e-5, torch.bfloat16: 6e-3}[dtype]
    for a, b, kind in zip(found[:4], wanted[:4], (torch.float32, torch.float32, dtype, head_dtype), strict=True):
        assert a.dtype == kind
        assert float((a.double() - b).norm() / b.norm()) < bound
    assert found[1][3] == found[1][9] == 0
    arguments = (hidden, head, target, row_weight, None, *options, 8)
    frozen = cuda.linear_cross_entropy_fwd_bwd(*arguments, True, False, False)
    assert torch.equal(frozen[2], found[2])
    assert frozen[3].numel() == 0
    with pytest.raises(NotImplementedError, match="linear head has no linear_bias; backend='auto'"):
        cuda.linear_cross_entropy_fwd_bwd(*arguments, True, True, True)
    # A bad target makes the loss NaN, and the gradients are those without its row.
    target[3] = num_classes
    bad = cuda.linear_cross_entropy_fwd_bwd(*arguments, *needs)
    assert bad[1].isnan().nonzero().tolist() == [[3]]
    assert bad[0].isnan()
    assert torch.equal(bad[2], found[2])
    assert torch.equal(bad[3], found[3])
