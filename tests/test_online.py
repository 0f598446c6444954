"""Online weights: the frozen model's losses on the batch being trained give the weights that scoring gives."""

import json

import numpy as np
import oracle
import pytest
import tiny_model
import torch
import training
from accelerate import Accelerator
from flow_finetune.adapters import prepare_parameters
from flow_finetune.config import MethodConfig, ModelConfig, TrainConfig
from flow_finetune.methods import make_weights
from flow_finetune.models import CausalLM, load_model
from flow_finetune.online import FrozenModel, OnlineWeights
from flow_finetune.train import micro_batches, step_plan
from processes import run_python
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

ONLINE = {
    "all": {}, "all bf16": {"online_copy": "bfloat16"}, "head": {"train": "head"},
    "lora": {"train": "lora", "lora_rank": 4},
}  # fmt: skip


class Setup(training.Setup):
    """Two epochs of it, and the trained weights beside the summary."""

    def train(self, output, method, **options):
        summary = super().train(output, method, **{"epochs": 2, "batch_size": 7, "learning_rate": 1e-3, **options})
        return summary, load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def setup(tiny_model_dir, qa_file, tmp_path_factory):
    return Setup(tiny_model_dir, qa_file).score(tmp_path_factory.mktemp("online"))


@pytest.mark.parametrize("kind", ONLINE)
def test_online_weights_are_the_offline_ones_also_after_training_has_moved_the_model(setup, kind):
    method = MethodConfig(online=True, **ONLINE[kind])
    lm, _ = load_model(setup.config)
    lm.train()
    lora = prepare_parameters(lm, method)
    frozen = FrozenModel(lm, lora, method.online_copy, "full")
    weights = OnlineWeights(method, frozen, Accelerator(cpu=True), setup.found.metadata["temperature"])
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) * 0.05
    before = [p.detach().clone() for p in lm.parameters()]
    indices = list(range(3, 17))
    groups = micro_batches(indices, setup.samples.samples, 0, 1, 400)
    assert len(groups) > 2
    weights.prepare(setup.samples.samples, indices, groups)
    offline = make_weights(MethodConfig(), 24, setup.found).of(indices)
    tolerance = 2e-2 if "bf16" in kind else 1e-5
    torch.testing.assert_close(weights.of(indices), offline, rtol=tolerance, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(lm.parameters(), before, strict=True))
    assert lm.training
    assert weights.mean == pytest.approx(float(offline.mean()), rel=tolerance)
    assert weights.temperature == setup.found.metadata["temperature"]


def test_a_rounded_copy_rounds_the_weights_and_not_where_the_tokens_stand(tmp_path):
    """Rotary frequencies in bf16 would turn positions 300 apart by 0.4 rad. A head that is tied stays so."""
    directory = tiny_model.build(tmp_path, bos=True, tied=True)
    lm, _ = load_model(ModelConfig(str(directory), precision="full", device="cpu"))
    frozen = FrozenModel(lm, None, "bfloat16", "full")._lm
    buffers, kept = dict(lm.named_buffers()), dict(frozen.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert all(torch.equal(kept[name], buffer) and kept[name].dtype == buffer.dtype for name, buffer in buffers.items())
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert frozen.head.weight is frozen.model.get_input_embeddings().weight
    assert frozen.head.weight is not lm.head.weight


def test_a_rounded_copy_leaves_the_trained_models_frozen_parts_alone():
    """A vision part is frozen in both and held once."""
    lm = CausalLM(tiny_model.with_vision(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, vocab_size=64))  # fmt: skip
    prepare_parameters(lm, MethodConfig(online=True))
    shared = {id(p) for p in lm.parameters() if not p.requires_grad}
    before = {name: parameter.clone() for name, parameter in lm.named_parameters()}
    frozen = FrozenModel(lm, None, "bfloat16", "full")._lm
    assert all(torch.equal(before[n], p) and p.dtype == torch.float32 for n, p in lm.named_parameters())
    assert {p.dtype for p in frozen.parameters() if id(p) not in shared} == {torch.bfloat16}
    assert shared < {id(p) for p in frozen.parameters()}


def test_only_what_is_trained_is_kept_twice(setup):
    def extra(method):
        lm, _ = load_model(setup.config)
        frozen = FrozenModel(lm, prepare_parameters(lm, method), method.online_copy, "full")
        known = {p.data_ptr() for p in lm.parameters()}
        return sum(p.nbytes for p in frozen._lm.parameters() if p.data_ptr() not in known)

    lm, _ = load_model(setup.config)
    num = sum(p.numel() for p in lm.parameters())
    assert extra(MethodConfig(online=True)) == 4 * num
    assert extra(MethodConfig(online=True, online_copy="bfloat16")) == 2 * num
    assert extra(MethodConfig(online=True, train="head")) == 4 * lm.head.weight.numel()
    assert extra(MethodConfig(online=True, train="lora")) == 0


@pytest.mark.parametrize(("kind", "precision"), [("all", "full"), ("lora", "bf16")])
def test_training_online_with_the_scores_temperature_is_training_offline(
    tiny_model_dir, qa_file, tmp_path, kind, precision
):
    """Under bf16 autocast too, where weights cast without a graph must not serve the forward pass that needs one."""
    setup = Setup(tiny_model_dir, qa_file, precision).score(tmp_path)
    offline, a = setup.train(tmp_path / "a", MethodConfig(**ONLINE[kind]), scores=setup.scores)
    online, b = setup.train(tmp_path / "b", MethodConfig(online=True, **ONLINE[kind]), scores=setup.scores)
    assert online["temperature"] == pytest.approx(offline["temperature"], rel=1e-12)
    assert online["mean_weight"] == pytest.approx(offline["mean_weight"], rel=1e-2 if precision == "bf16" else 1e-5)
    base = load_file(tiny_model_dir / "model.safetensors")
    for name, start in base.items():
        moved = float((a[name] - start).norm())
        # AdamW turns a gradient near 0 into a step of full size whatever its rounding, so single weights differ.
        assert float((a[name] - b[name]).norm()) <= (0.1 if precision == "bf16" else 0.01) * moved, name
    assert any(not torch.equal(a[name], base[name]) for name in base)


def test_without_scores_the_temperature_is_the_median_of_all_losses_seen(setup, tmp_path):
    summary, _ = setup.train(tmp_path / "out", MethodConfig(online=True, quantile=0.3), epochs=1)
    plan = step_plan(24, TrainConfig(epochs=1, batch_size=7))
    losses, seen, expected = setup.found.loss.numpy(), [], []
    for indices in plan:
        seen += list(losses[indices])
        expected.append(float(np.exp(-losses[indices] / np.quantile(seen, 0.3)).mean()))
    log = [json.loads(line) for line in (tmp_path / "out/train/log.jsonl").read_text().splitlines()]
    assert [line["mean_weight"] for line in log] == pytest.approx(expected, rel=1e-5)
    assert summary["temperature"] == pytest.approx(float(np.quantile(losses, 0.3)), rel=1e-5)
    assert len(set(expected)) > 1


def test_a_given_temperature_needs_no_quantile_and_a_first_step_of_one_sample_is_its_own(setup, tmp_path):
    summary, _ = setup.train(tmp_path / "a", MethodConfig(online=True, temperature=2.5), epochs=2)
    assert summary["temperature"] == 2.5
    weights = torch.exp(-setup.found.loss / 2.5)
    assert summary["mean_weight"] == pytest.approx(float(weights.mean()), rel=1e-5)
    # Of the data, as offline, however often it was gone through.
    expected = oracle.effective_sample_size(weights.numpy())
    assert summary["effective_sample_size"] == pytest.approx(expected, rel=1e-5)
    setup.train(tmp_path / "b", MethodConfig(online=True), epochs=1, batch_size=1)
    first = json.loads((tmp_path / "b/train/log.jsonl").read_text().splitlines()[0])
    assert first["mean_weight"] == pytest.approx(np.exp(-1), rel=1e-6)


def test_two_processes_weigh_and_train_as_one(setup, qa_file, tmp_path):
    """With LoRA, whose adapters are switched off and on between DDP's forward passes."""
    command = [
        "-m", "flow_finetune.cli", "train", "-m", setup.config.source, "-d", str(qa_file), "--prompt-field", "question",
        "--response-field", "answer", "--method", "flow-online+lora", "--lora-rank", "4", "--precision", "full",
        "--device", "cpu", "--lr", "1e-3", "--epochs", "1", "--batch-size", "5",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run_python(*launcher, *command, "-o", tmp_path / "two")
    setup.train(tmp_path / "one", MethodConfig(online=True, **ONLINE["lora"]), epochs=1, batch_size=5)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "train/log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for x, y in zip(*logs, strict=True):
        for key in ("loss", "weighted_loss", "mean_weight", "distance"):
            assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-4), key
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)
