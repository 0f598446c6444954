"""What the benchmarks compute themselves: cases, the gate before timing, exponents, sums of parts."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path():
    sys.path.insert(0, BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


HEAD = {"name": "test", "num_rows": 48, "dim": 64, "num_classes": 997}


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent):
    import harness

    assert harness.fit_exponent([(n, 3 * n**exponent) for n in (1, 2, 4, 8)]) == pytest.approx(exponent)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_confident_rows_have_the_probability_they_are_named_after(p, softcap):
    import cases

    torch.manual_seed(0)
    weight = torch.randn(8209, 256) / 16
    target = torch.randint(0, 8209, (32,))
    logits = cases.confident_input(weight, target, p, softcap) @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    # The variance of the other logits is that of a sample, and moves 1 - p by some per cent.
    missing = 1 - torch.softmax(logits.double(), 1).gather(1, target[:, None]).mean()
    assert float(missing) == pytest.approx(1 - p, rel=0.1)


def test_cases_of_a_head_share_its_tensors_and_differ_as_named():
    import cases
    from shapes import Head

    head = Head(**HEAD)
    plain, half = cases.tensors(head, "train"), cases.tensors(head, "train half ignored")
    assert plain[1].data_ptr() == half[1].data_ptr()
    assert int((half[2] == -100).sum()) == 24
    assert int((plain[2] == -100).sum()) == 0
    assert not cases.tensors(head, "train frozen head")[1].requires_grad
    assert cases.tensors(head, "train weighted")[3].shape == (48,)
    assert not any(t.requires_grad for t in cases.tensors(head, "score")[:3])


@pytest.mark.parametrize("case", ["score", "train", "train weighted", "train half ignored", "train frozen head"])
def test_uncompiled_baselines_are_right(case):
    """In fp32, where the gate's bounds for bf16 would let much pass, they agree with torch's own expression."""
    import cases
    from implementations import IMPLEMENTATIONS
    from shapes import Head

    head = Head(**HEAD, dtype="float32", chunks=(16, 16))
    inputs = cases.tensors(head, case)
    input, weight, target, sample_weight = inputs
    losses = F.cross_entropy(input @ weight.T, target, reduction="none")
    if case == "score":
        expected = (losses.detach(),)
    else:
        loss = (losses if sample_weight is None else sample_weight * losses).sum() / (target != -100).sum()
        expected = (loss, *torch.autograd.grad(loss, [t for t in (input, weight) if t.requires_grad]))
    names = [n for n in IMPLEMENTATIONS if not n.startswith(("compiled", "cut", "Liger", "torch.mm", "flow cpu"))]
    for name in names:
        for actual, wanted in zip(cases.call_of(name, case, head, inputs)(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        (lambda r: (r[0] + 0.5, *r[1:]), "loss"),
        (lambda r: (r[0], 2 * r[1], r[2]), "dH"),
        (lambda r: (r[0], r[1], -r[2]), r"dW\[target\]"),
        (lambda r: (r[0], r[1], r[2] + (r[2].abs() < r[2].abs().amax(1, True) / 2) * 1e-3), "dW"),
        (lambda r: (r[0] * float("nan"), *r[1:]), "loss"),
        (lambda r: (r[0], r[1] * float("nan"), r[2]), "dH"),
    ],
)
def test_the_gate_names_what_is_wrong(mistake, reason):
    import cases
    from shapes import Head

    head = Head(**HEAD)
    inputs = cases.tensors(head, "train")
    right = cases.call_of("flow reference", "train", head, inputs)()
    expected = cases._samples(right, inputs[2])
    assert cases.why_wrong(right, expected, inputs[2]) is None
    assert reason.replace("\\", "") in cases.why_wrong(mistake(right), expected, inputs[2])


def test_parts_of_an_end_to_end_run_are_summed():
    import end_to_end

    part = {"tokens": "100", "targets": "50", "compared": "2", "largest_difference": "1.0e-02"}
    parts = [
        part | {"flow_seconds": "1", "transformers_seconds": "2", "difference_sum": "2e-3"},
        part
        | {"flow_seconds": "3", "transformers_seconds": "8", "difference_sum": "-6e-3", "largest_difference": "2e-2"},
    ]
    row = end_to_end.total(parts)
    assert (row["tokens"], row["targets"], row["ratio"]) == (200, 100, 2.5)
    assert (row["flow_tokens_per_second"], row["transformers_tokens_per_second"]) == (50.0, 20.0)
    assert float(row["mean_loss_difference"]) == pytest.approx(1e-3)
    assert float(row["largest_loss_difference"]) == 2e-2


def test_the_gradient_filter_is_measured_on_a_models_own_hidden_states(tiny_model_dir):
    import grad_filter

    hidden, weight, target = grad_filter.real_head(str(tiny_model_dir), "examples/data/gsm8k_train.jsonl.gz", 100)
    assert hidden.shape == (100, weight.shape[1])
    assert hidden.dtype == weight.dtype == torch.bfloat16
    assert target.shape == (100,)
    assert bool((target >= 0).all())
    assert bool((target < len(weight)).all())
    with pytest.raises(SystemExit, match="fewer than 1000000 target tokens"):
        grad_filter.real_head(str(tiny_model_dir), "examples/data/gsm8k_train.jsonl.gz", 10**6)


def test_commands_name_a_model_without_its_place(monkeypatch):
    import harness

    monkeypatch.setattr("sys.argv", ["end_to_end.py", "train", "--model", "some/where/model.gguf", "--steps", "2"])
    command = harness.provenance_of_model("end_to_end.py", "some/where/model.gguf")["command"]
    assert command == "python benchmarks/end_to_end.py train --model model.gguf --steps 2"
