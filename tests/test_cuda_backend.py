"""The compiled CUDA backend without a GPU: what it lacks, whom it refuses and why, and what `auto` makes of it."""

import re

import pytest
import torch
from cuda_host.harness import SOURCES, Options

import flow_kernels
from flow_kernels import backends, cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_named():
    assert "CUDA memory" in backends.status("cuda", "cpu").reason
    with pytest.raises(backends.BackendUnavailable, match=r"backend='cuda' cannot serve .*; backend='auto' would use"):
        backends.resolve("cuda", "cuda")


def test_what_the_backend_lacks_is_named():
    logits, target = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"takes float32, bfloat16 and float16 logits, got torch\.float64"):
        cuda.cross_entropy_fwd(logits, target, *Options())
    with pytest.raises(NotImplementedError, match=r"the cuda backend has no scoring by a linear head; backend='auto'"):
        cuda.linear_cross_entropy_fwd(logits, logits, target)
    head, bias = torch.zeros(3, 3), torch.zeros(3)
    with pytest.raises(NotImplementedError, match="linear head has no linear_bias; backend='auto'"):
        cuda.linear_cross_entropy_fwd_bwd(
            head[:2], head, target, torch.ones(2), bias, *Options(), 0, True, True, True
        )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda z, y, b: flow_kernels.cross_entropy(z, y, reduction="none", backend=b), "cross_entropy_bwd"),
        (lambda z, y, b: flow_kernels.cross_entropy(z.half(), y, backend=b), "cross_entropy_bwd"),
        (
            lambda z, y, b: flow_kernels.linear_cross_entropy(z, z, y, reduction="none", backend=b),
            "linear_cross_entropy_bwd",
        ),
        (lambda z, y, b: flow_kernels.linear_score_tokens(z, z, y, backend=b), "linear_cross_entropy_fwd"),
        (lambda z, y, b: flow_kernels.score_tokens(z, y, return_entropy=True, backend=b), "cross_entropy_score"),
        (lambda z, y, b: flow_kernels.weigh_samples(z[:, 0], y, 1.0, backend=b), "flow_weights"),
    ],
)
def test_a_call_that_it_cannot_serve_to_the_end_is_refused_at_its_beginning(call, operator, monkeypatch):
    """On a machine that has the kernels and a GPU, which the CPU stands in for."""
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    status = backends.status
    monkeypatch.setattr(
        backends, "status", lambda b, device, *rest: status(b, "cuda" if b == "cuda" else device, *rest)
    )
    logits, target = torch.zeros(3, 3, requires_grad=True), torch.zeros(3, dtype=torch.long)
    with pytest.raises(backends.BackendUnavailable, match=f"and this call needs {operator}; backend='auto' would use"):
        call(logits, target, "cuda")
    assert backends.resolve("cuda", "cpu", torch.float32, "cross_entropy_fwd_bwd") == "cuda"
    with pytest.raises(backends.BackendUnavailable, match="the CUDA kernels have no linear_bias; backend='auto' would"):
        flow_kernels.linear_cross_entropy(logits, logits, target, linear_bias=torch.zeros(3), backend="cuda")


def test_a_row_too_long_names_the_limit_and_the_backend(monkeypatch):
    monkeypatch.setattr(cuda, "MAX_CLASSES", 9)
    logits, target = torch.zeros(1, 10), torch.zeros(1, dtype=torch.long)
    for operator in (cuda.cross_entropy_fwd, lambda z, y, *o: cuda.cross_entropy_fwd_bwd(z, y, torch.ones(1), *o)):
        with pytest.raises(ValueError, match=r"at most 9 logits, got 10; backend='reference'"):
            operator(logits, target, *Options())
    with pytest.raises(ValueError, match=r"at most 9 logits, got 10; backend='reference'"):
        cuda.linear_cross_entropy_fwd_bwd(
            logits, torch.zeros(10, 10), target, torch.ones(1), None, None, *Options()[1:], 0, True, True, False
        )  # fmt: skip


def test_the_longest_row_leaves_room_for_a_block_of_threads():
    """An int32 column of the last thread of a block, a block's step past the row's last column, does not wrap."""
    threads = int(re.search(r"kMaxThreads = (\d+);", (SOURCES / "plan.h").read_text())[1])
    unit = 16 // torch.bfloat16.itemsize
    assert cuda.MAX_CLASSES - 1 + unit + threads <= torch.iinfo(torch.int32).max
    limit = re.search(
        r"num_classes < (std::numeric_limits<int>::max\(\)[^,]*),", (SOURCES / "cross_entropy.cu").read_text()
    )
    expression = limit[1].replace("std::numeric_limits<int>::max()", "2147483647").replace("kMaxThreads", str(threads))
    assert re.fullmatch(r"[\d -]+", expression), expression
    first, *less = map(int, expression.split("-"))
    assert first - sum(less) == cuda.MAX_CLASSES + 1


@pytest.mark.parametrize(("capability", "available"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_old_gpus_are_refused(capability, available, monkeypatch):
    """On a machine that has the kernels and a driver, the GPU's age decides."""
    monkeypatch.setattr(cuda, "load", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(cuda, "_why_no_code", lambda: None)
    found = backends.status("cuda", "cuda")
    assert found.available == available
    if not available:
        with pytest.raises(
            backends.BackendUnavailable, match=r"a GPU has compute capability 7\.5, the kernels need 8\.0"
        ):
            backends.resolve("cuda", "cuda")


def test_kernels_for_other_gpus_are_no_kernels(monkeypatch):
    """A build for the GPUs of TORCH_CUDA_ARCH_LIST may have nothing for this one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for error, expected in ((209, r"other GPUs than a GPU.*CUDA error 209.*TORCH_CUDA_ARCH_LIST=9\.0"), (0, None)):
        monkeypatch.setattr(torch.ops.flow_kernels_cuda, "load_error", lambda found=error: found, raising=False)
        cuda._why_no_code.cache_clear()
        reason = cuda._why_no_code()
        assert reason is None if expected is None else re.search(expected, reason)
    cuda._why_no_code.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_triton_that_cannot_launch_says_so():
    triton = pytest.importorskip("triton", reason="no Triton for this platform")
    backends._why_no_launch.cache_clear()
    assert "Triton cannot launch here" in backends._why_no_launch(), triton.__version__
    backends._why_no_launch.cache_clear()


def test_auto_prefers_the_cuda_kernels_where_there_are_clusters(monkeypatch):
    """For training; they and Triton's have run on NVIDIA's GPUs, so AMD's keep the reference."""
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in (((9, 0), ("cuda", "triton", "reference")), ((8, 6), ("triton", "reference"))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert backends._candidates("cuda", "cross_entropy_fwd_bwd") == expected
        assert backends._candidates("cuda", "linear_cross_entropy_fwd_bwd") == expected
        # With a soft-cap after Triton's: before eager torch, where Triton cannot launch.
        with_softcap = ("triton", "cuda", "reference") if "cuda" in expected else expected
        assert backends._candidates("cuda", "cross_entropy_fwd_bwd", True) == with_softcap
        assert backends._candidates("cuda", "cross_entropy_fwd") == ("triton", "reference")
        assert backends._candidates("cuda", None) == ("triton", "reference")
    monkeypatch.setattr(cuda, "why_not", lambda: "not built")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backends._candidates("cuda", "cross_entropy_fwd_bwd") == ("triton", "reference")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends._candidates("cuda", "cross_entropy_fwd_bwd") == ("reference",)
    assert backends._candidates("cpu", "cross_entropy_fwd_bwd") == ("cpu", "reference")


def test_auto_is_told_of_a_heads_softcap_and_bias(monkeypatch):
    """On a machine whose kernels can all run: what "auto" takes for a head depends on both."""
    asked, resolve = [], backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda *arguments: asked.append(arguments) or resolve(*arguments))
    hidden, head, target = torch.zeros(2, 3, requires_grad=True), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)
    for softcap, bias in ((None, None), (4.0, None), (None, torch.zeros(5))):
        flow_kernels.linear_cross_entropy(hidden, head, target, linear_bias=bias, softcap=softcap)
    operator = "linear_cross_entropy_fwd_bwd"
    assert asked == [
        ("auto", "cpu", torch.float32, operator, *told) for told in ((False, False), (True, False), (False, True))
    ]
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(backends, "_why_no_triton", lambda device_type: "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    told = {
        words: resolve("auto", "cuda", torch.bfloat16, operator, *words)
        for words in ((False, False), (True, False), (False, True))
    }
    assert list(told.values()) == ["cuda", "triton", "triton"]
    monkeypatch.setattr(backends, "_why_no_triton", lambda device_type: "it cannot launch")
    assert resolve("auto", "cuda", torch.bfloat16, operator, True, False) == "cuda"
    assert resolve("auto", "cuda", torch.bfloat16, operator, False, True) == "reference"


def test_no_driver_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(backends.BackendUnavailable, match=r"no usable NVIDIA driver.*'auto' would use 'reference'"):
        backends.resolve("cuda", "cuda")
