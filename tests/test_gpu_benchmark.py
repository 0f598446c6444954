"""The GPU's programs where there is no GPU: what they would run, what they compute, and how they refuse."""

import importlib.util
import itertools
import sys
from pathlib import Path

import device_shuttle
import pytest
import torch

from flow_kernels import backends, reference

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def program(name):
    """A program of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return program("gpu")


@NO_GPU
@pytest.mark.parametrize("arguments", [[], ["--require"], ["--case", "train", "--shape", "4096x65536"]])
def test_without_a_gpu_it_stops_at_once_and_names_what_is_missing(gpu, arguments, capsys):
    assert gpu.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("DEVICE=cuda needs a GPU: ")
    assert ("is built without CUDA" in message) == (torch.version.cuda is None and torch.version.hip is None)


def test_a_missing_driver_is_named(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU, or no usable driver" in gpu.why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.why_not() is None


@pytest.mark.parametrize("arguments", [["--case", "sleep"], ["--shape", "1x1"], ["--implementation", "none"]])
def test_unknown_choices_are_refused(gpu, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_rates(gpu):
    """A row of 1000 bf16 logits in 1 us is 2 GB/s scored, 4 GB/s trained; a head makes 2 or 6 flops a logit and hidden."""
    logits = gpu.Shape(1, 1000)
    assert gpu.rates(logits, "score", 1e-6, 4.0, 1.0)["GB_s"] == 2.0
    assert gpu.rates(logits, "train", 1e-6, 4.0, 1.0) == {
        "GB_s": 4.0, "percent_of_copy": 100.0, "TFLOP_s": 0.0, "percent_of_matmul": 0.0,
    }  # fmt: skip
    head = gpu.Shape(2000, 1000, 500)
    assert gpu.rates(head, "score", 1e-3, 1.0, 4.0)["TFLOP_s"] == 2.0
    assert gpu.rates(head, "train weighted", 1e-3, 1.0, 12.0)["percent_of_matmul"] == 50.0
    assert head.work("score")[0] == 2 * 500 * (2000 + 1000)
    assert gpu.Shape(1, 1000, dtype=torch.float32).work("score")[0] == 4000


def test_cases_cover_both_kernels_and_the_heads(gpu):
    given = [shape for shape in gpu.SHAPES.values() if not shape.dim]
    assert min(s.num_classes for s in given) <= 65536 < max(s.num_classes for s in given)
    assert {"flow triton", "flow cuda", "liger", "quack", "torch.compile, fp32 logits"} <= set(gpu.names_for(given[0]))
    heads = [shape for shape in gpu.SHAPES.values() if shape.dim]
    assert {"flow triton", "cut-cross-entropy", "liger"} <= set(gpu.names_for(heads[0]))
    assert "flow cuda" in gpu.names_for(heads[0])


@pytest.mark.parametrize(
    ("case", "dim"),
    [
        *itertools.product(("score", "train", "train weighted", "train half ignored", "train frozen head"), (0, 16)),
        ("train autocast", 16),
    ],
)
def test_the_gate_knows_right_from_wrong(gpu, case, dim, monkeypatch):
    """What is timed, with the CPU in place of the GPU: equal to the reference, and a wrong one is seen."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    shape = gpu.Shape(6, 50, dim, softcap=4.0 if dim else None)
    inputs = gpu.problem(shape, case)
    wanted = gpu.expected(shape, case, inputs)
    result = gpu.call_of("torch, fp32 logits", shape, case, inputs)()
    wrong, found = gpu.errors(shape, result, wanted)
    assert wrong is None
    assert found["gradient_error"] < 0.01
    trained = {"score": [], "train frozen head": inputs[0][:1]}.get(case, inputs[0])
    assert [r.shape for r in result[1:]] == [t.shape for t in trained]
    assert all(r.dtype == t.dtype for r, t in zip(result[1:], trained, strict=True))

    monkeypatch.setitem(gpu.IMPLEMENTATIONS, "wrong", (lambda *a: 2 * gpu._eager(*a), "torch", (True, True)))
    wrong, _ = gpu.errors(shape, gpu.call_of("wrong", shape, case, inputs)(), wanted)
    assert wrong.startswith("loss off by")
    if trained:
        # The loss of the right one with the gradient of another.
        mixed = (result[0], *(2 * gradient for gradient in result[1:]))
        assert gpu.errors(shape, mixed, wanted)[0].startswith("a gradient off by")


def test_liger_gets_its_logits_back_before_the_clock_starts(gpu, monkeypatch):
    """It overwrites them when training; scoring reads them only, and no copy is counted."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    shape = gpu.Shape(6, 50)
    inputs = gpu.problem(shape, "train")
    before = inputs[0][0].detach().clone()
    call = gpu.call_of("liger", shape, "train", inputs)
    with torch.no_grad():
        inputs[0][0].zero_()
    call.prepare()
    assert torch.equal(inputs[0][0], before)
    assert not hasattr(gpu.call_of("liger", shape, "score", gpu.problem(shape, "score")), "prepare")


def test_the_peak_memory_is_that_of_a_warm_call(gpu, monkeypatch):
    """The first call compiles; and logits that it overwrote are put back before the second one."""
    seen = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + 7 * (seen[-2:] == ["reset", "call"]))

    def call():
        seen.append("call")
        return (torch.zeros(1),)

    call.prepare = lambda: seen.append("prepare")
    result, peak = gpu.first_result(call)
    assert seen == ["prepare", "call", "prepare", "reset", "call"]
    assert peak == 7
    assert len(result) == 1


def test_the_page_is_made_of_the_records():
    """Fastest first, times over the fastest of ours; and the page that is there is of the records that are."""
    page = program("gpu_report")
    common = {"device": "a GPU", "torch": "2", "machine": "a CPU", "copy_GB_s": "1", "matmul_TFLOP_s": "1", "commit": "c",
              "command": "x", "case": "train", "N": "4", "D": "0", "V": "9", "softcap": "30.0", "dtype": "bfloat16",
              "percent_of_copy": "50", "loss_error": "0.0", "gradient_error": "0.1", "peak_MiB": "7"}  # fmt: skip
    rows = [common | {"implementation": name, "ms": ms} for name, ms in (("torch", "6.0"), ("flow cuda", "2.0"))]
    text = page.report(rows)
    assert "## train, given logits: N=4, V=9, soft-cap 30, bfloat16" in text
    lines = [line for line in text.splitlines() if line.startswith(("| torch", "| flow"))]
    assert lines == ["| flow cuda | 2.0 | 1.00 | 50 | 0.0 | 0.1 | 7 |", "| torch | 6.0 | 3.00 | 50 | 0.0 | 0.1 | 7 |"]
    results = page.harness.RESULTS
    assert page.report(page.harness.read_csv("gpu")) == (results / "gpu.md").read_text()


def test_tensors_travel_to_the_device_and_back():
    seen = []

    def operator(logits, target, none, number):
        seen.append((logits.device.type, target.device.type, none, number))
        return torch.ones(logits.shape[0]), torch.zeros(2)

    loss, zeros = device_shuttle.shuttled(operator, "meta")(torch.zeros(3, 2), torch.zeros(3), None, 0.5)
    assert seen == [("meta", "meta", None, 0.5)]
    assert loss.tolist() == [1.0, 1.0, 1.0]
    assert zeros.device.type == "cpu"


def test_a_shuttled_backend_serves_the_cpu(monkeypatch):
    """With the CPU itself as the device: the operators are those of the backend, and others stay as they were."""
    monkeypatch.setattr(backends, "status", backends.status)
    monkeypatch.setattr(backends, "implementation", backends.implementation)
    device_shuttle.serve_the_cpu_from("cpu", "reference")
    served = backends.implementation("reference")
    logits, target = torch.randn(2, 5), torch.tensor([1, 4])
    options = (None, -100, 0.0, 0.0, 0.0)
    for got, expected in zip(
        served.cross_entropy_fwd(logits, target, *options), reference.cross_entropy_fwd(logits, target, *options),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, expected)


@NO_GPU
def test_without_a_gpu_there_is_no_shuttle():
    with pytest.raises(
        backends.BackendUnavailable, match="backend='triton' cannot serve tensors on cuda: no usable GPU"
    ):
        device_shuttle.serve_the_cpu_from("cuda", "triton")
