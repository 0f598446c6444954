"""Training: the gradient of the paper's loss, the whole trajectory, and a run that continues where it was killed."""

import copy
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from accelerate import Accelerator
from flow_finetune import checkpoint as checkpoint_module
from flow_finetune.config import MethodConfig, TrainConfig
from flow_finetune.errors import InputError
from flow_finetune.methods import make_weights
from flow_finetune.models import load_model
from flow_finetune.train import Meter, accumulate_gradients, micro_batches, step_plan
from processes import kill_when, run_python
from run_files import assert_same_files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from flow_kernels import cpu

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {
    "standard": MethodConfig("standard", "none"),
    "sequence": MethodConfig("sequence", "sequence"),
    "token": MethodConfig("token", "token"),
}


class Setup(training.Setup):
    """Methods by their names here, and the formula that training is to follow."""

    def weights(self, method):
        return make_weights(METHODS[method], len(self.samples.samples), self.found)

    def train(self, output, method="sequence", **options):
        return super().train(output, METHODS[method] if isinstance(method, str) else method, **options)

    def independent_loss(self, model, indices, method):
        """`sum_i w_i sum_t nll_it / number of targets of the step`, from the formulas alone."""
        per_token = [np.asarray(v, dtype=np.float64) for v in self.found.token_losses]
        tau = np.median([v.mean() for v in per_token]) if method == "sequence" else np.median(np.concatenate(per_token))
        total, count = 0.0, 0
        for i in indices:
            sample = self.samples.samples[i]
            ids = torch.from_numpy(sample.input_ids).long()
            logits = model(input_ids=ids[None]).logits[0].double()
            nll = F.cross_entropy(logits[sample.start - 1 : -1], ids[sample.start :], reduction="none")
            weight = {
                "standard": 1.0,
                "sequence": math.exp(-per_token[i].mean() / tau),
                "token": torch.from_numpy(np.exp(-per_token[i] / tau)),
            }[method]
            total, count = total + (weight * nll).sum(), count + len(nll)
        return total / count


@pytest.fixture(scope="module")
def setup(tiny_model_dir, qa_file, tmp_path_factory):
    return Setup(tiny_model_dir, qa_file).score(tmp_path_factory.mktemp("train"), tokens=True)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_step_are_those_of_the_formula(setup, method, num_micro_batches):
    indices = list(range(4, 16))
    lengths = [len(setup.samples.samples[i].input_ids) for i in indices]
    assert len(set(lengths)) > 4
    budget = next(
        b for b in range(max(lengths), 10**5)
        if len(micro_batches(indices, setup.samples.samples, 0, 1, b)) == num_micro_batches
    )  # fmt: skip
    lm, oracle = copy.deepcopy(setup.lm).train(), copy.deepcopy(setup.lm.model)
    meter = Meter()
    accumulate_gradients(
        lm, setup.samples.samples, indices, setup.weights(method), Accelerator(cpu=True),
        TrainConfig(micro_batch_tokens=budget), setup.config, meter,
    )  # fmt: skip
    expected = setup.independent_loss(oracle, indices, method)
    expected.backward()
    plain = setup.independent_loss(oracle, indices, "standard").item()
    assert float(meter.weighted_sum) / meter.num_targets == pytest.approx(float(expected), rel=1e-5)
    assert float(meter.loss_sum) / meter.num_targets == pytest.approx(plain, rel=1e-5)
    for (name, p), q in zip(lm.model.named_parameters(), oracle.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("method", METHODS)
def test_trained_weights_equal_a_plain_torch_loop(setup, tmp_path, method):
    options = {"epochs": 2, "batch_size": 7, "learning_rate": 3e-3, "warmup": 0.25, "micro_batch_tokens": 300,
               "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 3}  # fmt: skip
    setup.train(tmp_path / "out", method, **options)
    model = AutoModelForCausalLM.from_pretrained(setup.config.source)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=3e-3,
    )  # fmt: skip
    plan = step_plan(24, TrainConfig(**options))
    assert [len(s) for s in plan] == [7, 7, 7, 3] * 2
    assert sorted(i for s in plan[:4] for i in s) == list(range(24))
    for step, indices in enumerate(plan):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (len(plan) - 2)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        optimizer.zero_grad()
        setup.independent_loss(model, indices, method).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for p, q in zip(trained.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "method",
    [
        METHODS["sequence"], MethodConfig("lora", train="lora", lora_rank=4), MethodConfig("online", online=True),
        MethodConfig("both", online=True, train="lora", lora_rank=4),
    ],
    ids=lambda method: method.name,
)  # fmt: skip
def test_gradient_checkpointing_costs_forward_passes_and_changes_nothing(setup, tmp_path, monkeypatch, method):
    options = {"epochs": 1, "batch_size": 12, "learning_rate": 1e-2, "micro_batch_tokens": 400}
    forward, calls = LlamaMLP.forward, []
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    found, with_gradients, without = {}, {}, {}
    for is_on in (False, True):
        output = tmp_path / f"{is_on}"
        setup.train(output, method, gradient_checkpointing=is_on, **options)
        log = [json.loads(line) for line in (output / "train/log.jsonl").read_text().splitlines()]
        found[is_on] = [[line[name] for name in ("loss", "weighted_loss", "grad_norm", "distance")] for line in log]
        found[is_on].append(load_file(output / "model.safetensors"))
        with_gradients[is_on], without[is_on] = calls.count(True), calls.count(False)
        calls.clear()
    *lines, weights = found[True]
    np.testing.assert_allclose(lines, found[False][:-1], rtol=1e-6)
    assert len(lines) == 2
    for name, weight in found[False][-1].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-7)
    # Every layer once more for its gradients; the frozen model of online weights has none to make.
    assert with_gradients[True] == 2 * with_gradients[False] > 0
    assert without[True] == without[False]


def test_the_head_alone_is_trained_without_gradient_checkpointing(setup, tmp_path, capfd):
    probe = MethodConfig("probe", weights="none", train="head")
    for is_on in (False, True):
        setup.train(tmp_path / f"{is_on}", probe, gradient_checkpointing=is_on, epochs=1, learning_rate=1e-2)
        assert ("gradient checkpointing is left out" in " ".join(capfd.readouterr().err.split())) == is_on
    plain, checkpointed = (load_file(tmp_path / f"{is_on}/model.safetensors") for is_on in (False, True))
    assert all(torch.equal(checkpointed[name], weight) for name, weight in plain.items())


def test_log_and_summary_hold_the_numbers_of_the_run(setup, tmp_path):
    summary = setup.train(tmp_path / "out", epochs=1, batch_size=8, learning_rate=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "out/train/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    plan = step_plan(24, TrainConfig(epochs=1, batch_size=8))
    first = lines[0]
    assert first["loss"] == pytest.approx(float(setup.independent_loss(setup.lm.model, plan[0], "standard")), rel=1e-5)
    weighted = float(setup.independent_loss(setup.lm.model, plan[0], "sequence"))
    assert first["weighted_loss"] == pytest.approx(weighted, rel=1e-5)
    batch_weights = setup.weights("sequence").per_sample[plan[0]].double()
    assert first["mean_weight"] == pytest.approx(float(batch_weights.mean()), rel=1e-6)
    assert first["effective_sample_size"] == pytest.approx(
        float(batch_weights.sum() ** 2 / batch_weights.square().sum()), rel=1e-6
    )
    assert first["num_targets"] == sum(setup.samples.samples[i].num_targets for i in plan[0])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    moved = sum(
        float((p - q).double().square().sum()) for p, q in zip(trained.parameters(), setup.lm.parameters(), strict=True)
    )
    assert lines[-1]["distance"] == pytest.approx(moved**0.5, rel=1e-5)
    assert lines[-1]["loss"] < first["loss"]
    assert summary["final_loss"] == lines[-1]["loss"]
    assert summary["temperature"] == pytest.approx(setup.found.metadata["temperature"], rel=1e-9)
    assert all(line["peak_memory_bytes"] > 2**20 and line["tokens_per_second"] > 0 for line in lines)
    assert list((tmp_path / "out/train/tensorboard").glob("events*"))


def test_log_lines_average_over_their_interval(setup, tmp_path):
    setup.train(tmp_path / "a", epochs=1, batch_size=8, learning_rate=1e-3)
    setup.train(tmp_path / "b", epochs=1, batch_size=8, learning_rate=1e-3, log_every=2)
    every, second = (
        [json.loads(line) for line in (tmp_path / name / "train/log.jsonl").read_text().splitlines()] for name in "ab"
    )
    assert [line["step"] for line in second] == [2, 3]
    pooled = sum(line["loss"] * line["num_targets"] for line in every[:2]) / sum(
        line["num_targets"] for line in every[:2]
    )
    assert second[0]["loss"] == pytest.approx(pooled, rel=1e-5)


def test_the_plain_loss_is_of_the_samples_that_are_kept(setup, tmp_path):
    """A weight of exactly 0 skips its sample, and its loss: it must not count as a loss of 0 either."""
    method = MethodConfig("easiest", "none", keep_easiest=0.25)
    setup.train(tmp_path / "out", method, epochs=1, batch_size=24, learning_rate=1e-3, micro_batch_tokens=200)
    (line,) = (json.loads(text) for text in (tmp_path / "out/train/log.jsonl").read_text().splitlines())
    kept = setup.found.loss.argsort(stable=True)[:6].tolist()
    num_kept = sum(setup.samples.samples[i].num_targets for i in kept)
    expected = float(setup.independent_loss(setup.lm.model, kept, "standard"))
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert line["weighted_loss"] == pytest.approx(expected * num_kept / line["num_targets"], rel=1e-5)


def test_no_clipping_is_clipping_at_infinity(setup, tmp_path):
    for name, norm in (("none", 0.0), ("huge", 1e9), ("small", 1e-3)):
        setup.train(tmp_path / name, epochs=1, learning_rate=1e-3, max_grad_norm=norm)
    none, huge, small = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("none", "huge", "small"))
    assert none == huge
    assert none != small


@pytest.mark.skipif(cpu.why_not() is not None, reason=f"no compiled CPU kernels: {cpu.why_not()}")
def test_small_gradients_are_left_out_when_asked(setup, tmp_path):
    def weights(name, eps):
        setup.train(tmp_path / name, epochs=1, learning_rate=1e-3, grad_filter_eps=eps)
        return load_file(tmp_path / name / "model.safetensors")

    exact, nearly, hardly = weights("exact", 0.0), weights("nearly", 1e-12), weights("hardly", 0.5)
    for name, weight in exact.items():
        torch.testing.assert_close(nearly[name], weight, rtol=1e-3, atol=1e-5)
    # A bound that leaves out nearly everything moves the head elsewhere.
    assert any((hardly[name] - weight).abs().max() > 1e-4 for name, weight in exact.items())


def test_a_filter_that_would_do_nothing_is_refused(setup, tmp_path):
    reference = load_model(dataclasses.replace(setup.config, backend="reference"))[0]
    with pytest.raises(InputError, match="grad_filter_eps saves nothing with backend 'reference'"):
        setup.train(tmp_path / "no", lm=reference, grad_filter_eps=1e-6)


def test_saved_directory_is_what_transformers_loads(setup, tmp_path):
    lm = load_model(setup.config)[0]
    setup.train(tmp_path / "out", lm=lm, epochs=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), lm.model.parameters(), strict=True))
    assert tokenizer("How many?").input_ids == setup.tokenizer("How many?").input_ids
    assert not (tmp_path / "out/checkpoints").exists()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".") or p.name == "saved"]


def test_standard_needs_no_scores_and_flow_does(setup, tmp_path):
    setup.scores, kept = None, setup.scores
    try:
        setup.train(tmp_path / "a", "standard", epochs=1)
        with pytest.raises(InputError, match="needs the pre-trained model's scores"):
            setup.train(tmp_path / "b", epochs=1)
    finally:
        setup.scores = kept
    assert not (tmp_path / "b").exists()


def test_another_run_or_other_files_are_never_overwritten(setup, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="used by something else"):
            setup.train(tmp_path / "used", epochs=1, overwrite=overwrite)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.txt"]
    first = setup.train(tmp_path / "out", epochs=1)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"differs in train\.learning_rate"):
        setup.train(tmp_path / "out", epochs=1, learning_rate=1.0)
    assert setup.train(tmp_path / "out", epochs=1) == first
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    setup.train(tmp_path / "out", epochs=1, learning_rate=1e-3, overwrite=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() != before


def test_a_disk_that_is_too_small_is_refused_before_training(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InputError, match="MiB of disk space"):
        setup.train(tmp_path / "out", epochs=1)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(setup, tmp_path):
    lm = load_model(setup.config)[0]
    with torch.no_grad():
        lm.model.model.norm.weight[0] = float("inf")
    with pytest.raises(InputError, match=r"loss is nan .* at step 1; lower the learning rate"):
        setup.train(tmp_path / "out", "standard", lm=lm, epochs=1)
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "epochs"), ({"batch_size": 0}, "batch_size"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup": 2.0}, "warmup"), ({"log_every": 0}, "log_every"), ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
        # Clipped to a negative norm, every step would go up the gradient.
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"), ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"grad_filter_eps": 1.0}, "grad_filter_eps must be in"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(setup, tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        setup.train(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_interrupted_training_continues_to_the_same_weights(setup, tmp_path, monkeypatch):
    options = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_every": 3, "log_every": 2}
    setup.train(tmp_path / "undisturbed", **options)
    save = checkpoint_module.TrainDirectory.save_checkpoint

    def interrupt(self, step, *rest):
        save(self, step, *rest)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.TrainDirectory, "save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.train(tmp_path / "continued", **options)
    assert [p.name for p in (tmp_path / "continued/checkpoints").iterdir()] == ["step-00000006"]
    # Lines past the checkpoint, as a later kill would leave them, are made again.
    with open(tmp_path / "continued/train/log.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 99.0}\n{"step": 9, "lo')
    setup.train(tmp_path / "continued", **options)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "continued")


def test_a_kill_between_the_summary_and_the_removal_of_checkpoints_loses_nothing(setup, tmp_path, monkeypatch):
    """The run is finished: it is not trained again."""
    options = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 1}
    expected = setup.train(tmp_path / "undisturbed", **options)
    remove = shutil.rmtree

    def interrupt(path, *rest, **options):
        if path.name == "checkpoints":
            raise KeyboardInterrupt
        remove(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.train(tmp_path / "killed", **options)
    assert [p.name for p in (tmp_path / "killed/checkpoints").iterdir()] == ["step-00000002"]
    summary = (tmp_path / "killed/train/summary.json").read_bytes()
    assert setup.train(tmp_path / "killed", **options)["final_loss"] == expected["final_loss"]
    assert (tmp_path / "killed/train/summary.json").read_bytes() == summary
    assert not (tmp_path / "killed/checkpoints").exists()
    assert_same_files(tmp_path / "undisturbed", tmp_path / "killed")


def _command(setup, qa_file, output, *extra):
    return [
        "-m", "flow_finetune.cli", "train", "-m", setup.config.source, "-d", str(qa_file), "--prompt-field", "question",
        "--response-field", "answer", "--scores", str(setup.scores), "--precision", "full", "--device", "cpu",
        "--lr", "1e-3", "-o", output, *extra,
    ]  # fmt: skip


def test_killed_training_continues_to_the_same_weights(setup, qa_file, tmp_path):
    extra = ["--epochs", "12", "--batch-size", "4", "--checkpoint-every", "4"]
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    run_python(*_command(setup, qa_file, undisturbed, *extra))
    kill_when(lambda: any(killed.glob("checkpoints/step-*")), *_command(setup, qa_file, killed, *extra))
    assert not (killed / "train/summary.json").exists()
    result = run_python(*_command(setup, qa_file, killed, *extra))
    assert "after step" in result.stderr
    assert_same_files(undisturbed, killed)


def test_two_processes_train_as_one(setup, qa_file, tmp_path):
    # Batches of 5 over 24 samples: uneven shares, and a last step of 4; --batch-size 1 leaves a process without any.
    for batch_size in ("5", "1"):
        extra = ["--epochs", "1", "--batch-size", batch_size, "--micro-batch-tokens", "200"]
        one, two = tmp_path / f"one-{batch_size}", tmp_path / f"two-{batch_size}"
        run_python(*_command(setup, qa_file, one, *extra))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run_python(*launcher, *_command(setup, qa_file, two, *extra))
        a, b = (load_file(d / "model.safetensors") for d in (one, two))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)
        logs = [[json.loads(line) for line in (d / "train/log.jsonl").read_text().splitlines()] for d in (one, two)]
        assert len(logs[0]) == len(logs[1])
        for x, y in zip(*logs, strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
            assert x["weighted_loss"] == pytest.approx(y["weighted_loss"], rel=1e-4)
            assert x["num_targets"] == y["num_targets"]
