"""What is trained: LoRA beside the frozen model, or the head alone with the body bit-equal."""

import json
import math

import pytest
import tiny_model
import torch
from flow_finetune.adapters import Lora, untie_head
from flow_finetune.config import DataConfig, MethodConfig, ModelConfig, TrainConfig
from flow_finetune.data import PAD_ID, collate, load_samples
from flow_finetune.models import load_model, save_model
from flow_finetune.train import train
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


class Setup:
    """A tiny model, its samples, and training of it without scores."""

    def __init__(self, model_dir, qa_file):
        self.config = ModelConfig(str(model_dir), precision="full", device="cpu")
        _, self.tokenizer = load_model(self.config)
        data = DataConfig(str(qa_file), prompt_field="question", response_field="answer")
        self.samples = load_samples(data, self.tokenizer)

    def train(self, output, method, **options):
        config = TrainConfig(**{"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, **options})
        train(
            load_model(self.config)[0], self.tokenizer, self.samples, output,
            method=MethodConfig(name="m", weights="none", **method), config=config, model_config=self.config,
        )  # fmt: skip
        return output

    def losses(self, lm):
        batch = collate(self.samples.samples[:6], PAD_ID)
        return lm.eval().score(batch).loss


@pytest.fixture(scope="module")
def setup(tiny_model_dir, qa_file):
    return Setup(tiny_model_dir, qa_file)


@pytest.fixture(scope="module")
def tied(qa_file, tmp_path_factory):
    return Setup(tiny_model.build(tmp_path_factory.mktemp("tied"), bos=True, tied=True), qa_file)


def with_adapters(setup, seed=0):
    """A model with adapters that are not the start's (B is 0 there)."""
    lm, _ = load_model(setup.config)
    before = {name: t.clone() for name, t in lm.model.state_dict().items()}
    lora = Lora(lm, rank=4, alpha=8)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return lm, lora, before


def test_adapters_are_in_every_linear_layer_but_the_head_and_train_alone(setup):
    lm, _, _ = with_adapters(setup)
    layers = {
        name.removesuffix(".lora_A.default.weight") for name, p in lm.model.named_parameters() if "lora_A" in name
    }
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                   "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    assert layers == {f"model.layers.{i}.{p}" for i in range(2) for p in projections}
    assert type(lm.head) is nn.Linear
    assert all(p.requires_grad == ("lora_" in name) for name, p in lm.model.named_parameters())


def test_the_model_with_its_adapters_off_is_the_base_model(setup):
    base = setup.losses(load_model(setup.config)[0])
    lm, lora, _ = with_adapters(setup)
    with_them = setup.losses(lm)
    with lora.off():
        assert torch.equal(setup.losses(lm), base)
    assert torch.equal(setup.losses(lm), with_them)
    assert float((with_them - base).abs().max()) > 0.1
    assert all(p.requires_grad == ("lora_" in name) for name, p in lm.model.named_parameters())


def test_the_merged_model_is_the_model_with_adapters_in_plain_transformers_files(setup, tmp_path):
    lm, lora, before = with_adapters(setup)
    with_them, distance = setup.losses(lm), lora.distance()
    updates = {}
    for name, p in lm.model.named_parameters():
        if "lora_A" in name:
            b = lm.model.get_parameter(name.replace("lora_A", "lora_B"))
            updates[name.removesuffix(".lora_A.default.weight") + ".weight"] = 8 / 4 * b.double() @ p.double()
    lora.merge()
    torch.testing.assert_close(setup.losses(lm), with_them, rtol=1e-4, atol=1e-5)
    save_model(lm.model, setup.tokenizer, tmp_path / "merged")
    saved = load_file(tmp_path / "merged/model.safetensors")
    assert saved.keys() == before.keys()
    assert not list((tmp_path / "merged").glob("adapter*"))
    for name, tensor in before.items():
        if name in updates:
            torch.testing.assert_close(saved[name].double(), tensor.double() + updates[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(saved[name], tensor), name
    assert distance == pytest.approx(math.sqrt(sum(float(u.square().sum()) for u in updates.values())), rel=1e-6)
    reloaded = load_model(ModelConfig(str(tmp_path / "merged"), precision="full", device="cpu"))[0]
    assert torch.equal(setup.losses(reloaded), setup.losses(lm))


def test_lora_trains_into_a_merged_directory(setup, tmp_path):
    setup.train(tmp_path / "out", {"train": "lora", "lora_rank": 4, "lora_alpha": 4}, epochs=3)
    base = AutoModelForCausalLM.from_pretrained(setup.config.source).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == base.keys()
    assert {name for name in base if not torch.equal(base[name], found[name])} == {n for n in base if "_proj." in n}
    log = [json.loads(line) for line in (tmp_path / "out/train/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    moved = math.sqrt(sum(float((base[n] - found[n]).double().square().sum()) for n in base))
    assert log[-1]["distance"] == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_linear_probe_leaves_the_body_bit_equal(setup, tied, tmp_path, is_tied):
    setup = tied if is_tied else setup
    setup.train(tmp_path / "out", {"train": "head"}, epochs=2)
    base = AutoModelForCausalLM.from_pretrained(setup.config.source)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert base.config.tie_word_embeddings == is_tied
    assert not found.config.tie_word_embeddings
    for name, tensor in base.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(found.state_dict()[name], tensor), name
    head = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    assert torch.equal(found.lm_head.weight, head)
    assert not torch.equal(head, base.lm_head.weight)
    log = [json.loads(line) for line in (tmp_path / "out/train/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    moved = float((head - base.lm_head.weight).double().norm())
    assert log[-1]["distance"] == pytest.approx(moved, rel=1e-5)
    lm, _ = load_model(ModelConfig(str(tmp_path / "out"), precision="full", device="cpu"))
    assert torch.equal(lm.head.weight, head)


def test_untying_changes_no_loss(tied, setup):
    lm, _ = load_model(tied.config)
    before = tied.losses(lm)
    assert untie_head(lm)
    assert torch.equal(tied.losses(lm), before)
    assert not untie_head(lm)
    assert not untie_head(load_model(setup.config)[0])
