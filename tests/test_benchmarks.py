"""What the benchmarks compute themselves: cases, the gate before timing, exponents, sums of parts."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
BENCHMARKS = str(ROOT / "benchmarks")
GSM8K = str(ROOT / "examples/data/gsm8k_train.jsonl.gz")


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
    input, weight = cases.tensors(Head(**HEAD, dtype="bfloat16"), cases.AUTOCAST)[:2]
    assert (input.dtype, weight.dtype, weight.requires_grad) == (torch.bfloat16, torch.float32, True)


def test_a_training_under_autocast_is_right_and_keeps_the_heads_gradient_wide():
    import cases
    from shapes import Head

    head = Head(**HEAD, dtype="bfloat16")
    calls, reasons = cases.right_calls(cases.AUTOCAST, head, ["flow cpu", "eager, fp32 logits"])
    assert reasons == {}
    loss, dinput, dweight = calls["flow cpu"]()
    assert (loss.dtype, dinput.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert not torch.equal(dweight, dweight.bfloat16().float())


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
    assert cases.why_wrong(right, expected, inputs[2], "bfloat16") is None
    assert reason.replace("\\", "") in cases.why_wrong(mistake(right), expected, inputs[2], "bfloat16")


@pytest.mark.parametrize(
    ("mistake", "reason"), [(lambda r: (r[0] + 0.01, *r[1:]), "loss"), (lambda r: (r[0], 1.01 * r[1], r[2]), "dH")]
)
def test_what_bf16_may_be_off_by_is_wrong_in_fp32(mistake, reason):
    import cases
    from shapes import Head

    head = Head(**HEAD, dtype="float32")
    inputs = cases.tensors(head, "train")
    right = cases.call_of("flow reference", "train", head, inputs)()
    expected = cases._samples(right, inputs[2])
    assert cases.why_wrong(mistake(right), expected, inputs[2], "bfloat16") is None
    assert cases.why_wrong(mistake(right), expected, inputs[2], "float32").startswith(f"{reason} off by")


def test_the_hosts_time_is_that_of_losses_that_agree(monkeypatch):
    import host

    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "REPETITIONS", 3)
    times = host.microseconds("cpu")
    assert len(times) == 8
    assert all(len(measured) == 3 and min(measured) > 1 for measured in times.values())
    monkeypatch.setattr(host, "cross_entropy", lambda *args, **options: 2 * F.cross_entropy(*args))
    with pytest.raises(AssertionError, match="given logits: "):
        host.microseconds("cpu")


def test_parts_of_an_end_to_end_run_are_summed():
    import end_to_end

    part = {"tokens": "100", "targets": "50", "compared": "2", "largest_difference": "1.0e-02", "commit": "a1"}
    parts = [
        part | {"flow_seconds": "1", "transformers_seconds": "2", "difference_sum": "2e-3"},
        part
        | {"flow_seconds": "3", "transformers_seconds": "8", "difference_sum": "-6e-3", "largest_difference": "2e-2"},
    ]
    parts[1]["commit"] = "b2+"
    row = end_to_end.total(parts)
    assert (row["tokens"], row["targets"], row["ratio"]) == (200, 100, 2.5)
    assert (row["flow_tokens_per_second"], row["transformers_tokens_per_second"]) == (50.0, 20.0)
    assert float(row["mean_loss_difference"]) == pytest.approx(1e-3)
    assert float(row["largest_loss_difference"]) == 2e-2
    assert row["commit"] == "a1 b2+"
    assert "model" in end_to_end.KEYS


def test_the_gradient_filter_is_measured_on_a_models_own_hidden_states(tiny_model_dir):
    import grad_filter

    hidden, weight, target = grad_filter.real_head(str(tiny_model_dir), GSM8K, 100)
    assert hidden.shape == (100, weight.shape[1])
    assert hidden.dtype == weight.dtype == torch.bfloat16
    assert target.shape == (100,)
    assert bool((target >= 0).all())
    assert bool((target < len(weight)).all())
    with pytest.raises(SystemExit, match="fewer than 1000000 target tokens"):
        grad_filter.real_head(str(tiny_model_dir), GSM8K, 10**6)


def test_commands_name_a_model_without_its_place(monkeypatch):
    import harness

    monkeypatch.setattr("sys.argv", ["end_to_end.py", "train", "--model", "some/where/model.gguf", "--steps", "2"])
    expected = "python benchmarks/end_to_end.py train --model model.gguf --steps 2"
    for interpreted, command in {"0": expected, "1": f"TRITON_INTERPRET=1 {expected}"}.items():
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        assert harness.provenance_of_model("end_to_end.py", "some/where/model.gguf")["command"] == command


@pytest.mark.parametrize("walls", [(3.23, 4.13), (1.0, 5.0, 2.0), (1.0, 9.0, 4.0, 2.0), (0.3, 0.1, 0.2, 0.5, 0.4)])
def test_quartiles_are_those_of_the_repetitions(walls):
    import harness

    found = harness.summary([(wall, wall) for wall in walls])
    low, middle, high = np.percentile(walls, [25, 50, 75])
    assert (found["q1_s"], found["median_s"], found["q3_s"]) == pytest.approx((low, middle, high), abs=1e-4)
    assert min(walls) <= found["q1_s"] <= found["q3_s"] <= max(walls)


def test_memory_that_was_freed_before_is_counted_again():
    import harness

    def blocks():
        return [b"x" * (65536 + i % 2) for i in range(1024)]

    held = [blocks(), b"y" * 65536]  # the last one keeps the freed ones below it in the heap
    held[0] = None
    assert harness.peak_above(lambda: len(blocks()), lambda result: 0) > 50 * 2**20


@pytest.fixture
def results(tmp_path, monkeypatch):
    import harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return harness


def head_row(name, **values):
    about = {"case": "train", "head": "gemma-3-270m", "N": 1024, "D": 640, "V": 262144, "dtype": "bfloat16"}
    return {**about, "implementation": name, "commit": "a1", "median_s": 1.0, "repetitions": 2, **values}


def test_a_row_takes_the_place_of_its_like_and_a_reason_goes_when_there_is_a_figure(results):
    import head

    results.update_measured("head", [head_row("a", over_flow=2.0)], [head_row("b", reason="no GPU")], head.KEYS)
    assert [row["reason"] for row in results.read_csv("head_left_out")] == ["no GPU"]
    results.update_measured("head", [head_row("b", over_flow=3.0)], [], head.KEYS)
    assert [(row["implementation"], row["over_flow"]) for row in results.read_csv("head")] == [
        ("a", "2.0"),
        ("b", "3.0"),
    ]
    assert results.read_csv("head_left_out") == []
    assert [path.name for path in results.RESULTS.iterdir() if not path.name.endswith(".csv")] == []


def test_a_run_in_which_we_were_slower_outlives_a_second_run(results):
    import goals
    import head

    first = [head_row("cut", over_flow=0.9), head_row("eager", over_flow=1.5), head_row("torch.mm", over_flow=0.3)]
    second = [head_row(row["implementation"], over_flow=1.2, commit="b2") for row in first]
    for rows in (first, second):
        head.record_times("head", rows, [])
    assert {row["over_flow"] for row in results.read_csv("head")} == {"1.2"}
    assert [(row["implementation"], row["commit"]) for row in results.read_csv("head_slower")] == [("cut", "a1")]
    assert goals._fastest_baseline("train", "gemma-3-270m") == ("cut", 0.9)


def test_memory_that_could_not_be_measured_is_no_figure(results, monkeypatch):
    import head
    import report
    from shapes import Head

    answers = iter(["3.4", "failed: MemoryError: 12 GiB"])
    monkeypatch.setattr(results, "in_fresh_process", lambda arguments: next(answers))
    head.memory(["score"], Head("N=256", 256, 8, 16), ["flow cpu", "Liger"], "head_memory")
    assert [(row["implementation"], row["peak_MiB"]) for row in results.read_csv("head_memory")] == [
        ("flow cpu", "3.4")
    ]
    assert results.sweeps("peak_MiB", "head_memory") == {("score", "N", "flow cpu"): [(256.0, 3.4)]}
    assert "Not measured: Liger, N=256, score, N = 256 (MemoryError: 12 GiB)" in report.memory_table()
    # One size makes no growth.
    assert report._log_plot("a.png", "memory against N", "MiB", {"score": {"flow cpu": [(256.0, 3.4)]}}) == []


def test_a_sweep_says_where_we_are_slower(results):
    import report

    rows = [
        head_row(name, head=f"N={n}", N=n, median_s=n * seconds, over_flow=seconds, command="c")
        for name, seconds in (("flow cpu", 1.0), ("eager", 0.875))
        for n in (1, 2, 4)
    ]
    results.update_csv("sweep", rows, ("head", "implementation"))
    table = report.sweep_table()[0].splitlines()
    assert table[2] == "| train | N = 1 ... 4 | eager | 1.00 | 0.875, 1.750, 3.500 | 0.88, 0.88, 0.88 |"


def test_both_sides_of_a_training_are_warm_before_they_are_timed(monkeypatch):
    import end_to_end

    sides = {name: torch.nn.Linear(2, 2) for name in ("flow", "transformers")}
    seen = []

    def accumulate(side, samples, indices, weights, accelerator, config, model_config, meter):
        seen.append((next(name for name, known in sides.items() if known is side), indices))
        side.weight.grad = torch.full((2, 2), 0.125) + (0 if side.weight.grad is None else side.weight.grad)
        meter.weighted_sum, meter.num_targets = torch.tensor(2.0), 1

    def optimizer(side, config, rate):
        # Not one gradient of the warm-up reaches a step.
        return SimpleNamespace(step=lambda: gradients.append(side.weight.grad.clone()), zero_grad=side.zero_grad)

    gradients = []
    monkeypatch.setattr(end_to_end, "accumulate_gradients", accumulate)
    monkeypatch.setattr(end_to_end, "make_optimizer", optimizer)
    samples = [SimpleNamespace(input_ids=[1, 2], num_targets=1)] * 4
    arguments = SimpleNamespace(batch_tokens=8, steps=1)
    end_to_end.bench_train(sides["flow"], sides["transformers"], samples, arguments)
    assert [name for name, _ in seen] == ["flow", "transformers", "transformers", "flow"]
    assert len({tuple(indices) for _, indices in seen}) == 1
    assert [gradient.tolist() for gradient in gradients] == [[[0.125] * 2] * 2] * 2


@pytest.mark.parametrize(("softcap", "bias"), [(30.0, None), (None, torch.zeros(3))])
def test_exact_losses_of_a_head_that_they_would_be_wrong_for_are_refused(softcap, bias):
    import end_to_end

    lm = SimpleNamespace(softcap=softcap, head=SimpleNamespace(bias=bias))
    with pytest.raises(SystemExit, match="has a soft-cap or a bias"):
        end_to_end.exact(lm, None, [], SimpleNamespace(model="m"))


def test_implementations_in_processes_of_their_own_are_timed_in_turn(tmp_path, monkeypatch):
    import harness
    import head
    from shapes import HEADS

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    asked = []

    def in_fresh_process(arguments):
        asked.append(arguments[-1])
        # Wall and CPU seconds; the second process of each is slower.
        return {0: "[[2, 9], [1, 8]]", 1: "[[4, 9], [8, 8]]", 2: "[[2, 9], [3, 8]]", 3: "[[5, 9], [9, 8]]"}[
            len(asked) - 1
        ]

    monkeypatch.setattr(harness, "in_fresh_process", in_fresh_process)
    names = ["flow cpu", "eager, fp32 logits"]
    head.time_alone("score", [HEADS["small"]], names, 2, "head_alone")
    assert asked == names * 2
    rows = {row["implementation"]: row for row in harness.read_csv("head_alone")}
    assert [float(rows[name]["median_s"]) for name in names] == [2.0, 6.5]
    assert float(rows[names[1]]["over_flow"]) == 3.25
    assert (rows[names[0]]["repetitions"], rows[names[0]]["processes"]) == ("4", "2")


def test_the_sizes_of_a_sweep_are_timed_in_turn(tmp_path, monkeypatch):
    import harness
    import head
    from shapes import Head

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    asked = []

    def in_fresh_process(arguments):
        asked.append(int(arguments[arguments.index("--rows") + 1]))
        # In proportion to the size, on a machine that is slower in the second round.
        return f"[[{asked[-1] * (1 + (len(asked) - 1) // 3)}, 1]]"

    monkeypatch.setattr(harness, "in_fresh_process", in_fresh_process)
    sizes = [Head(f"N={n}", n, 32, 500) for n in (2, 4, 8)]
    head.time_alone("score", sizes, ["flow cpu"], 2, "sweep_alone")
    assert asked == [2, 4, 8] * 2
    points = harness.sweeps(name="sweep_alone")["score", "N", "flow cpu"]
    assert [size for size, _ in points] == [2, 4, 8]
    assert harness.fit_exponent(points) == pytest.approx(1)
    assert all(row["over_flow"] == "1.0" for row in harness.read_csv("sweep_alone"))


def test_a_process_that_fails_leaves_what_the_others_measured(tmp_path, monkeypatch):
    import harness
    import head
    from shapes import Head

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "in_fresh_process", lambda words: "failed: no memory" if "4" in words else "[[1, 1]]")
    with pytest.raises(SystemExit, match=r"^score, N=4, flow cpu, in a process of its own failed: no memory$"):
        head.time_alone("score", [Head(f"N={n}", n, 32, 500) for n in (2, 4, 8)], ["flow cpu"], 2, "sweep_alone")
    assert [row["N"] for row in harness.read_csv("sweep_alone")] == ["2", "8"]


def test_ratios_within_rounds_do_not_mind_a_machine_that_changes_its_speed():
    """Of two calls of the same cost, 20 % apart in their medians; CPU seconds take no part."""
    import harness

    speeds = [1, 1, 1, 2, 2]
    plain = [(1.0 * speed, 9) for speed in speeds]
    other = [(1.0 * speed, 7) for speed in (1, 1, 1.2, 2, 2)]
    assert harness.summary(other)["median_s"] == 1.2 * harness.summary(plain)["median_s"]
    assert harness.paired_ratio(other, plain)["paired_first_case"] == 1.0
    assert harness.paired_ratio([(3, 0), (8, 0)], [(2, 0), (4, 0)])["paired_first_case"] == 1.75
    assert set(harness.paired_ratio(other, None).values()) == {""}


def test_interval_of_a_ratio_within_rounds():
    """Of 31 ratios 1 ... 31, the binomial distribution gives the median's 95 % to the 10th and the 22nd."""
    import harness

    found = harness.paired_ratio([(i * 2.0, 0) for i in range(31, 0, -1)], [(2.0, 0)] * 31)
    assert found["paired_first_case"] == 16
    assert abs(found["paired_low"] - 10) <= 1
    assert abs(found["paired_high"] - 22) <= 1
