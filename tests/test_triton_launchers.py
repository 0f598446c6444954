"""What the Triton launchers do whatever the numbers: repeat, trace, never synchronise, refuse what they cannot serve."""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch
import triton
from test_triton_kernels import DEVICE, OPTIONS, PLAIN, batch, head, samples, weighting
from torch.utils._python_dispatch import TorchDispatchMode

import flow_kernels
from flow_kernels import backends, kernels, ops, reference
from flow_kernels.kernels import configs, cross_entropy, linear_cross_entropy, softmax_row


def every_launcher():
    """One call of each launcher, as functions."""
    logits, target, row_weight, class_weight = batch(6, 300, torch.bfloat16)
    lse = kernels.cross_entropy_fwd(logits, target, None, *PLAIN)[1]
    input, linear_weight, head_target, head_row_weight, linear_bias, _ = head(torch.bfloat16)
    head_lse = kernels.linear_cross_entropy_fwd(input, linear_weight, head_target, None, None, *PLAIN, 0)[1]
    loss, sample_target = samples()
    temperature = torch.tensor(0.7, device=DEVICE)
    common = (linear_bias, None, *PLAIN, 8)
    needs = (True, True, True)
    return [
        lambda: kernels.cross_entropy_fwd(logits, target, class_weight, *OPTIONS["all"][1]),
        lambda: (kernels.cross_entropy_bwd(row_weight, logits, target, lse, None, *PLAIN),),
        lambda: kernels.cross_entropy_fwd_bwd(logits, target, row_weight, None, *PLAIN),
        lambda: kernels.linear_cross_entropy_fwd(input, linear_weight, head_target, *common),
        lambda: kernels.linear_cross_entropy_bwd(
            head_row_weight, input, linear_weight, head_target, head_lse, *common, *needs
        ),
        lambda: kernels.linear_cross_entropy_fwd_bwd(
            input, linear_weight, head_target, head_row_weight, *common, *needs
        ),
        lambda: kernels.cross_entropy_score(logits, target, PLAIN[0], 5.0),
        lambda: kernels.linear_cross_entropy_score(input, linear_weight, head_target, linear_bias, PLAIN[0], 0.0, 8),
        lambda: kernels.flow_weights(loss, sample_target, temperature, None, PLAIN[0], "simplex"),
    ]


def test_results_are_bit_equal_from_run_to_run():
    for call in every_launcher():
        for first, second in zip(call(), call(), strict=True):
            assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


class _Synchronisations(TorchDispatchMode):
    """Collects the operators that make the host wait for a GPU."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        to_cpu = name in ("_to_copy", "copy_") and str((kwargs or {}).get("device", "")) == "cpu"
        if name in self.OPERATORS or to_cpu:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_launchers_do_not_synchronise(monkeypatch):
    # The bounds check of the CPU looks at values; on a GPU it is not made.
    monkeypatch.setattr(cross_entropy, "check_target", lambda *args: None)
    forbidden = []
    package = str(Path(flow_kernels.__file__).parent)
    assert kernels.cross_entropy_fwd.__code__.co_filename.startswith(package)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(package):
                forbidden.append((_name, caller))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    for call in every_launcher():
        with _Synchronisations() as synchronisations:
            call()
        assert not synchronisations.found
    assert not forbidden
    with _Synchronisations() as planted:
        torch.ones(2).nonzero()
        torch.ones(1).item()
    assert planted.found == ["nonzero", "_local_scalar_dense"]


def test_opcheck():
    logits, target, row_weight, class_weight = batch(3, 40, torch.float32)
    logits.requires_grad_()
    input, linear_weight, head_target, head_row_weight, linear_bias, _ = (
        t[:3] for t in head(torch.float32, num_classes=3)
    )
    head_target = head_target.clamp(0, 2)
    parameters = [t.detach().clone().requires_grad_() for t in (input, linear_weight, linear_bias)]
    lse = torch.ones(3, device=DEVICE)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    input, linear_weight, linear_bias = parameters
    head_arguments = (linear_bias, None, *PLAIN, 2)
    for operator, arguments in (
        (ops.cross_entropy_fwd, (logits, target, class_weight, *PLAIN)),
        (ops.cross_entropy_bwd, (row_weight, logits.detach(), target, lse, class_weight, *PLAIN)),
        (ops.cross_entropy_fwd_bwd, (logits, target, row_weight, class_weight, *PLAIN)),
        (ops.linear_cross_entropy_fwd, (input, linear_weight, head_target, *head_arguments, 0.0)),
        (ops.cross_entropy_score, (logits, target, PLAIN[0], 5.0)),
        (ops.linear_cross_entropy_score, (input, linear_weight, head_target, linear_bias, PLAIN[0], 0.0, 2)),
        (
            ops.linear_cross_entropy_fwd_bwd,
            (input, linear_weight, head_target, head_row_weight, *head_arguments, True, True, True, 0.0),
        ),
    ):
        torch.library.opcheck(operator, (*arguments, "triton"), test_utils=tests)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_public_functions_trace_with_fake_tensors(reduction):
    """`torch.compile(fullgraph=True)` through the operators' fake kernels, forward and backward."""

    def both(logits, hidden, linear_weight, target):
        options = {"reduction": reduction, "backend": "triton"}
        loss = flow_kernels.cross_entropy(logits, target, softcap=9.0, **options).sum()
        return loss + flow_kernels.linear_cross_entropy(hidden, linear_weight, target, **options).sum()

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 50), (2, 3, 8), (50, 8))
    tensors = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    target = torch.randint(0, 50, (2, 3), generator=generator).to(DEVICE)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*tensors, target)
    grads = torch.autograd.grad(compiled, tensors)
    eager = both(*tensors, target)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grads, torch.autograd.grad(eager, tensors))


def test_scoring_traces_with_fake_tensors():
    def score(logits, hidden, linear_weight, target):
        given = [f(logits, target, backend="triton") for f in (flow_kernels.score_samples, flow_kernels.score_tokens)]
        linear = (flow_kernels.linear_score_samples, flow_kernels.linear_score_tokens)
        of_head = [f(hidden, linear_weight, target, backend="triton") for f in linear]
        return tuple(tensor for scores in (*given, *of_head) for tensor in scores)

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 3, 50), (2, 3, 8), (50, 8))]
    target = torch.randint(0, 50, (2, 3), generator=generator).to(DEVICE)
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")(*tensors, target)
    torch.testing.assert_close(compiled, score(*tensors, target))


@pytest.mark.skipif(DEVICE != "cpu", reason="bytes are counted in the interpreter")
@pytest.mark.parametrize(("num_classes", "training"), [(4096, 4.0), (65536, 4.0), (65552, 6.0)])
def test_bytes_per_logit(num_classes, training):
    path = Path(__file__).parent.parent / "benchmarks" / "traffic.py"
    spec = importlib.util.spec_from_file_location("traffic", path)
    traffic = importlib.util.module_from_spec(spec)
    sys.modules["traffic"] = traffic
    spec.loader.exec_module(traffic)
    logits, target, _, _ = batch(2, num_classes, torch.bfloat16)
    row_weight = torch.ones(2)
    with traffic.count_traffic() as scored:
        kernels.cross_entropy_fwd(logits, target, None, *PLAIN)
    with traffic.count_traffic() as trained:
        kernels.cross_entropy_fwd_bwd(logits, target, row_weight, None, *PLAIN)
    assert (scored.read + scored.written) / logits.numel() == pytest.approx(2.0, rel=0.01)
    assert (trained.read + trained.written) / logits.numel() == pytest.approx(training, rel=0.01)


def test_kernels_keep_the_house_limits():
    """At most 14 arguments, 4 compile-time flags (block sizes are none) and 60 lines a kernel, 400 lines a file."""
    sizes = {"BLOCK_V", "DEPTH", "NUM_BLOCKS", "BLOCK_SAMPLES", "BLOCK_TOKENS"}
    for module in (softmax_row, cross_entropy, linear_cross_entropy, weighting, configs):
        path = Path(module.__file__)
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 400, path.name
        for function in tree.body:
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                arguments = function.args.args
                assert len(arguments) <= 14, function.name
                flags = {a.arg for a in arguments if a.annotation and "constexpr" in ast.unparse(a.annotation)} - sizes
                assert len(flags) <= 4, (function.name, flags)
                assert function.end_lineno - function.lineno < 60, function.name


@pytest.mark.parametrize("name", kernels.__all__)
def test_launchers_have_the_signatures_of_the_reference(name):
    got, expected = (inspect.signature(getattr(module, name)) for module in (kernels, reference))
    assert list(got.parameters) == list(expected.parameters)


class TestBackend:
    def test_fp64_is_refused_with_a_reason(self):
        logits, target = torch.zeros(2, 5, dtype=torch.float64, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
        with pytest.raises(
            flow_kernels.BackendUnavailable, match=r"not torch.float64; backend='auto' would use '(cpu|reference)'"
        ):
            flow_kernels.cross_entropy(logits, target, backend="triton")

    def test_tensors_on_different_devices_are_refused(self):
        logits, target = torch.zeros(2, 5, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
        with pytest.raises(ValueError, match=f"target is on meta but input is on {DEVICE}"):
            flow_kernels.cross_entropy(logits, target.to("meta"), backend="triton")
        for elsewhere in ({"linear_weight": torch.zeros(5, 5, device="meta")}, {"linear_bias": logits[0].to("meta")}):
            arguments = {"linear_weight": torch.zeros(5, 5, device=DEVICE), **elsewhere}
            with pytest.raises(ValueError, match=f"{next(iter(elsewhere))} is on meta but input is on {DEVICE}"):
                flow_kernels.linear_cross_entropy(logits, target=target, backend="triton", **arguments)

    def test_other_devices_are_refused(self):
        assert "no Triton kernels for mps" in backends.status("triton", "mps").reason

    @pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU")
    def test_without_a_driver(self):
        with pytest.raises(flow_kernels.BackendUnavailable, match="no usable GPU driver"):
            backends.resolve("triton", "cuda")
        assert backends.resolve("auto", "cuda") == "reference"

    @pytest.mark.skipif(DEVICE == "cuda", reason="there the CPU is served by the GPU's kernels")
    def test_the_cpu_needs_the_interpreter(self, monkeypatch):
        import triton

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(flow_kernels.BackendUnavailable, match=r"TRITON_INTERPRET=1.*would use '(cpu|reference)'"):
            backends.resolve("triton", "cpu")

    def test_old_triton(self, monkeypatch):
        import triton

        monkeypatch.delattr(triton, "knobs")
        assert (
            backends.status("triton", "cpu").reason == f"triton {triton.__version__} is installed, the kernels need 3.4"
        )

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
        assert backends.status("triton", "cpu").reason == "triton is not installed"

    def test_the_interpreter_does_not_serve_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(backends, "_why_no_launch", lambda: "")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        found = backends.status("triton", "cuda")
        assert found.available == (not triton.knobs.runtime.interpret)
        assert found.available or "start without it" in found.reason

    @pytest.mark.parametrize(("capability", "available"), [((7, 5), False), ((8, 0), True), ((10, 0), True)])
    def test_old_gpus_are_refused(self, capability, available, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(backends, "_why_no_launch", lambda: "")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        found = backends.status("triton", "cuda")
        assert found.available == available
        assert available or "compute capability 7.5" in found.reason
