"""What is trained: LoRA beside the frozen model, or the head alone with the body bit-equal."""

import json
import math

import pytest
import tiny_model
import torch
import training
from flow_finetune.adapters import Lora, untie_head
from flow_finetune.config import MethodConfig, ModelConfig
from flow_finetune.data import PAD_ID, collate
from flow_finetune.models import CausalLM, load_model, save_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Setup(training.Setup):
    """Training without scores, by the entries of the method that differ."""

    def train(self, output, method, **options):
        options = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, **options}
        super().train(output, MethodConfig(name="m", weights="none", **method), **options)

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


def gemma3():
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0,
        )
    )  # fmt: skip


def gpt2():
    """Its linear layers are transformers' Conv1D, whose matrices are transposed."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, **tokens))


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def with_random_adapters(model):
    """Its adapters far from the start's, and the matrices before."""
    lm = CausalLM(model.eval())
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    lora = Lora(lm, rank=4, alpha=4)
    with torch.no_grad():
        for p in lm.model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return lm, lora, before


def test_experts_that_peft_adapts_count_in_the_distance(capfd):
    config = AutoConfig.for_model(
        "qwen3_next", **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    lm, lora, before = with_random_adapters(AutoModelForCausalLM.from_config(config))
    assert any(isinstance(layer, ParamWrapper) for layer in lm.model.modules())
    distance = lora.distance()
    lora.merge()
    after = dict(lm.model.named_parameters())
    assert after.keys() == before.keys()
    moved = math.sqrt(sum(float((after[n] - before[n]).double().square().sum()) for n in before))
    assert distance == pytest.approx(moved, rel=1e-5)


def test_matrices_without_adapters_are_told_of(capfd):
    config = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config)
    shapes = {
        n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and "embed" not in n and "head" not in n
    }
    share = sum(size for n, size in shapes.items() if "self_attn" not in n) / sum(shapes.values())
    with_random_adapters(model)
    said = " ".join(capfd.readouterr().err.split())
    assert f"LoRA leaves out {share:.0%} of the body's matrix elements" in said
    assert "model.layers.0.mlp.experts" in said
    with_random_adapters(gemma3())
    assert "leaves out" not in capfd.readouterr().err


def test_vision_parts_get_no_adapters():
    lm, _, _ = with_random_adapters(tiny_model.with_vision(**SIZES))
    adapters = [name for name, _ in lm.model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 14
    assert all("language_model" in name for name in adapters)


@pytest.mark.parametrize(("build", "num_adapters"), [(gemma3, 14), (gpt2, 8)])
def test_other_architectures_take_adapters_and_a_head_of_their_own(setup, tmp_path, build, num_adapters):
    lm = CausalLM(build().eval())
    ids = torch.arange(12)[None]

    @torch.no_grad()
    def logits(model):
        return model(input_ids=ids).logits

    base = logits(lm.model)
    lora = Lora(lm, rank=4, alpha=4)
    with torch.no_grad():
        adapters = [p for name, p in lm.model.named_parameters() if "lora_B" in name and p.normal_(std=0.1) is not None]
    assert len(adapters) == num_adapters
    with_them = logits(lm.model)
    with lora.off():
        assert torch.equal(logits(lm.model), base)
    lora.merge()
    torch.testing.assert_close(logits(lm.model), with_them, rtol=1e-5, atol=1e-5)
    assert float((with_them - base).abs().max()) > 0.1
    assert untie_head(lm)
    with torch.no_grad():
        lm.head.weight += torch.randn_like(lm.head.weight)
    save_model(lm.model, setup.tokenizer, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(reloaded), logits(lm.model))
    assert not reloaded.config.tie_word_embeddings


def test_adapters_of_16_bit_models_are_fp32():
    small = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    lm = CausalLM(LlamaForCausalLM(LlamaConfig(**small)).to(torch.bfloat16))
    Lora(lm, 4, 4)
    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lm.parameters() if not p.requires_grad} == {torch.bfloat16}
