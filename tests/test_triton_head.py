"""What a linear head on a GPU does around its row kernels: chunks and their size, products, a bias in parts."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
from test_triton_kernels import DEVICE, PLAIN, head

from flow_kernels import chunks, kernels, products


def test_the_gradient_of_a_bias_in_several_parts(monkeypatch):
    """Of three rows each, the last of fewer, where 128 MiB hold more."""
    input, linear_weight, target, row_weight, linear_bias, _ = head(torch.bfloat16)
    arguments = (input, linear_weight, target, row_weight, linear_bias, None, *PLAIN, 8, True, True, True)
    whole = kernels.linear_cross_entropy_fwd_bwd(*arguments)
    monkeypatch.setattr(chunks, "WIDE_BUFFER_BYTES", 3 * 4 * linear_weight.shape[0])
    parts = kernels.linear_cross_entropy_fwd_bwd(*arguments)
    for one, other in zip(whole[1:4], parts[1:4], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(parts[4], whole[4], rtol=2**-7, atol=0)
    lse = kernels.linear_cross_entropy_fwd(input, linear_weight, target, linear_bias, None, *PLAIN, 8)[1]
    again = kernels.linear_cross_entropy_bwd(
        row_weight, input, linear_weight, target, lse, linear_bias, None, *PLAIN, 8, True, True, True
    )
    torch.testing.assert_close(again[2], whole[4], rtol=2**-6, atol=0)


def test_a_lack_of_memory_is_told_and_not_made_worse(monkeypatch):
    """It is a RuntimeError, too; widening the factors would take more."""

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(products, "takes_out_dtype", lambda tensor: True)
    monkeypatch.setattr(products.torch, "mm", out_of_memory)
    monkeypatch.setattr(products.torch, "addmm", out_of_memory)
    a = torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError):
        products.wide_product(a, a, torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        products.add_product(torch.zeros(2, 2), a, a)


def test_chunk_size_follows_the_budget():
    def size(*arguments, num_rows=8192):
        return chunks.default_chunk_size(num_rows, *arguments)

    least, most = 2**28, 2**30
    assert [size(262144, 2, rows, most) for rows in (1024, 2048)] == [1024, 2048]
    assert [size(262144, 2, rows, least) for rows in (1024, 2048)] == [512, 512]  # a GPU of 16 GB
    assert size(49152, 2, 2048, most) == 4096  # 512 MiB are 5376 rows: two chunks
    assert size(49152, 2, 2048, least) == 2048  # 256 MiB are 2560 rows: four
    assert size(262144, 2, 2048, most, num_rows=5000) == 1792  # three of 1667, in steps of 256
    assert size(262144, 2, 2048, most, num_rows=100) == 256
    assert size(262144, 2, 2048, most, num_rows=0) == 2048
    assert size(262144, 4, 2048, most) == 1024
    assert size(10**6, 2, 2048, most) == 512
    assert size(10**8, 2, 2048, most) == 256
    assert size(0, 4, 1024, least) >= 1024


def test_the_buffer_follows_the_memory_of_the_device(monkeypatch):
    for memory, mib in ((8, 256), (24, 384), (40, 640), (80, 1024), (192, 1024)):
        properties = SimpleNamespace(total_memory=memory * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert chunks.buffer_limit(torch.device("cuda", 0)) == mib * 2**20
    assert chunks.buffer_limit(torch.device("cpu")) == 256 * 2**20


def test_products_are_added_in_fp32_where_torch_can(monkeypatch):
    """`out_dtype` exists on CUDA only; elsewhere a stand-in for it shows how it is called."""
    calls = []

    def addmm(total, a, b, *, out_dtype, out):
        calls.append(("addmm", out_dtype))
        return torch.add(total, a.float() @ b.float(), out=out)

    def mm(a, b, *, out_dtype):
        calls.append(("mm", out_dtype))
        return a.float() @ b.float()

    if DEVICE == "cpu":
        monkeypatch.setattr(products, "takes_out_dtype", lambda tensor: True)
        monkeypatch.setattr(products.torch, "addmm", addmm)
        monkeypatch.setattr(products.torch, "mm", mm)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=generator).bfloat16().to(DEVICE) for _ in range(2))
    exact = a.float() @ b.float()
    total = torch.full((8, 8), 1e-3, device=DEVICE)
    products.add_product(total, a, b)
    torch.testing.assert_close(total, exact + 1e-3)
    torch.testing.assert_close(products.wide_product(a, b, torch.float32), exact)
    assert products.wide_product(a, b, torch.float32).dtype == torch.float32
    torch.testing.assert_close(products.rounded_product(a, b), exact.bfloat16(), rtol=2**-7, atol=0)

    def refuse(*_, **__):
        raise RuntimeError("gemm input type at::BFloat16 and output type float is not supported")

    monkeypatch.setattr(products.torch, "addmm", refuse)
    monkeypatch.setattr(products.torch, "mm", refuse)
    products.add_product(total, a, b)
    torch.testing.assert_close(total, 2 * exact + 1e-3)
    torch.testing.assert_close(products.wide_product(a, b, torch.float32), exact)
    expected = [("addmm", torch.float32), *[("mm", torch.float32)] * 3]
    assert calls == (expected if DEVICE == "cpu" else [])
