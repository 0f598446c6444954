"""The CUDA kernels on a GPU against the reference in fp64; collected by `make test DEVICE=cuda` only (conftest.py)."""

import shutil

import pytest
import torch

import flow_kernels
from flow_kernels import backends, cuda, ops, reference

# Where there is a compiler for them, kernels that did not compile are a failure.
pytestmark = pytest.mark.skipif(
    cuda.why_not() is not None and (torch.version.hip is not None or shutil.which("nvcc") is None),
    reason=f"no CUDA kernels, and no nvcc to compile them: {cuda.why_not()}",
)

OPTIONS = {
    "plain": (False, -100, 0.0, 0.0, 0.0),
    "all": (True, -100, 0.2, 15.0, 1e-3),
}
EPS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def batch(num_rows, num_classes, dtype, has_class_weight):
    generator = torch.Generator().manual_seed(num_classes)
    logits = (torch.randn(num_rows, num_classes, generator=generator) * 3).to(dtype)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    target[::5] = -100
    row_weight = torch.rand(num_rows, generator=generator)
    class_weight = torch.rand(num_classes, generator=generator) if has_class_weight else None
    return logits, target, row_weight, class_weight


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("num_classes", [1, 7, 50257, 65536, 262144, 1_000_003])
def test_against_the_reference(num_classes, dtype, options):
    has_class_weight, *numbers = options
    logits, target, row_weight, class_weight = batch(7, num_classes, dtype, has_class_weight)
    wide = None if class_weight is None else class_weight.double()
    total, loss, gradient = reference.cross_entropy_fwd_bwd(
        logits.double(), target, row_weight.double(), wide, *numbers
    )
    _, lse, correct = reference.cross_entropy_fwd(logits.double(), target, wide, *numbers)
    tensors = [None if t is None else t.cuda() for t in (logits, target, row_weight, class_weight)]
    got = ops.cross_entropy_fwd_bwd(*tensors, *numbers, "cuda")
    scored = ops.cross_entropy_fwd(tensors[0], tensors[1], tensors[3], *numbers, "cuda")
    torch.testing.assert_close(got[0].cpu().double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].cpu().double(), loss, rtol=1e-5, atol=1e-5)
    assert float((got[2].cpu().double() - gradient).abs().max()) <= EPS[dtype] * float(gradient.abs().max()) + 1e-7
    torch.testing.assert_close(scored[0].cpu().double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored[1].cpu().double(), lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(scored[2].cpu(), correct)
    assert all(map(torch.equal, got, ops.cross_entropy_fwd_bwd(*tensors, *numbers, "cuda")))


def test_a_training_call_on_a_stream_of_its_own():
    logits, target, row_weight, _ = batch(64, 32001, torch.bfloat16, False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Ordered after the copies by the stream alone: a launch on another one would read zeros.
        device_logits = torch.zeros(64, 32001, dtype=torch.bfloat16, device="cuda")
        torch.cuda._sleep(50_000_000)
        device_logits.copy_(logits.cuda())
        device_logits.requires_grad_()
        loss = flow_kernels.cross_entropy(device_logits, target.cuda(), sample_weight=row_weight.cuda(), backend="cuda")
        loss.backward()
    stream.synchronize()
    expected = flow_kernels.cross_entropy(logits.double(), target, sample_weight=row_weight, backend="reference")
    torch.testing.assert_close(loss.detach().cpu().double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_what_auto_chooses():
    has_clusters = torch.cuda.get_device_capability() >= backends.CLUSTER_CAPABILITY
    chosen = {
        name: backends.resolve("auto", "cuda", torch.bfloat16, name)
        for name in ("cross_entropy_fwd", "cross_entropy_fwd_bwd", "cross_entropy_bwd", "linear_cross_entropy_fwd_bwd")
    }
    for name in ("cross_entropy_fwd_bwd", "linear_cross_entropy_fwd_bwd"):
        assert chosen.pop(name) == ("cuda" if has_clusters else "triton")
        assert backends.resolve("auto", "cuda", torch.bfloat16, name, has_softcap=True) == "triton"
        assert backends.resolve("auto", "cuda", torch.bfloat16, name, has_bias=True) == "triton"
    assert set(chosen.values()) == {"triton"}
    assert backends.resolve("auto", "cuda", torch.float64, "cross_entropy_fwd_bwd") == "reference"


@pytest.mark.parametrize("factor", [1.0, 0.3])  # which 16 bits do not hold
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_upstream_gradient_is_multiplied(backend, factor):
    # Weights of all sizes: gradients of one size would all be rounded the same way.
    logits, target, weight, _ = batch(1024, 1000, torch.bfloat16, False)
    wide = logits.double().requires_grad_()
    (factor * flow_kernels.cross_entropy(wide, target, sample_weight=weight.double(), backend="reference")).backward()
    logits = logits.cuda().requires_grad_()
    (
        factor * flow_kernels.cross_entropy(logits, target.cuda(), sample_weight=weight.cuda(), backend=backend)
    ).backward()
    found = logits.grad.cpu().double()
    torch.testing.assert_close(found, wide.grad, rtol=2**-7, atol=1e-7)
    assert float(found.norm() / wide.grad.norm()) == pytest.approx(1, abs=3e-4)  # 0.3 rounded is 1.0013 times as much


@pytest.mark.parametrize(("has_bias", "backend"), [(False, "cuda"), (False, "triton"), (True, "auto")])
@pytest.mark.parametrize("num_classes", [50257, 262144])
def test_a_head_of_several_chunks(num_classes, has_bias, backend):
    """Chunks as they are by default; a V that is no multiple of 16 has a buffer that goes on behind it."""
    torch.manual_seed(0)
    num_rows = 12000 if num_classes < 100000 else 5000
    tensors = [torch.randn(num_rows, 64, device="cuda"), torch.randn(num_classes, 64, device="cuda") / 8]
    tensors += [torch.randn(num_classes, device="cuda")] if has_bias else []
    target = torch.randint(num_classes, (num_rows,), device="cuda")
    target[::7] = -100
    sample_weight = torch.rand(num_rows, device="cuda")
    results = []
    for dtype, by in ((torch.bfloat16, backend), (torch.float64, "reference")):
        own = [t.bfloat16().to(dtype).requires_grad_() for t in tensors]
        loss = flow_kernels.linear_cross_entropy(
            *own[:2], target, linear_bias=own[2] if has_bias else None, sample_weight=sample_weight, backend=by
        )
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in own)])
    for found, exact in zip(*results, strict=True):
        assert float((found.double() - exact).norm() / exact.norm()) < 4e-3
