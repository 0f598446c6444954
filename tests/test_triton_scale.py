"""The kernel that multiplies a finished gradient by the upstream gradient, which only the device knows."""

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
from test_triton_kernels import DEVICE

import flow_kernels
from flow_kernels import kernels
from flow_kernels.kernels import scale


@pytest.fixture
def few_programs(monkeypatch):
    """So that each of them walks over several blocks."""
    monkeypatch.setattr(scale, "MAX_PROGRAMS", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2047, 2048, 5 * 2048 + 7])
@pytest.mark.parametrize("factor", [0.3, -2.0, 0.0, 1.0, float("nan")])
def test_rounded_once(few_programs, size, dtype, factor):
    """On a GPU torch rounds the factor to 16 bits before it multiplies; here one of fp32 is taken as it is."""
    values = torch.randn(size, device=DEVICE).to(dtype)
    factor = torch.tensor(factor, device=DEVICE)
    expected = (values.float() * factor).to(dtype)
    found = kernels.scale_(values, factor)
    assert found is values
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_one_writes_nothing(few_programs, monkeypatch):
    """Not even what is there already: a NaN with a payload would come back as another."""
    if DEVICE != "cpu":
        pytest.skip("counts what the interpreter stores")
    from triton.runtime.interpreter import InterpreterBuilder

    stored = []
    store = InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        InterpreterBuilder, "create_masked_store", lambda self, *args: stored.append(1) or store(self, *args)
    )
    values = torch.ones(5000)
    kernels.scale_(values, torch.tensor(1.0))
    assert not stored
    kernels.scale_(values, torch.tensor(2.0))
    assert stored
    assert values.eq(2).all()


def test_nothing_and_any_shape():
    assert kernels.scale_(torch.zeros(0, 5, device=DEVICE), torch.tensor(2.0, device=DEVICE)).shape == (0, 5)
    assert kernels.scale_(torch.ones(3, 5, device=DEVICE), torch.tensor(2.0, device=DEVICE)).eq(2).all()


if DEVICE == "cuda":  # CPU tensors are looked at without it

    @pytest.mark.parametrize("factor", [1.0, 3.0])
    def test_backward_passes_of_losses_use_it(factor):
        logits = torch.randn(6, 300, device=DEVICE, requires_grad=True)
        target = torch.randint(300, (6,), device=DEVICE)
        (factor * flow_kernels.cross_entropy(logits, target, backend="triton")).backward()
        found, logits.grad = logits.grad, None
        (factor * flow_kernels.cross_entropy(logits, target, backend="reference")).backward()
        torch.testing.assert_close(found, logits.grad, rtol=1e-4, atol=1e-6)
