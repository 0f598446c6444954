"""Texts that are run once and continued, over architectures that keep more than keys and values."""

import numpy as np
import pytest
import torch
from flow_finetune import choices, generate
from flow_finetune.context import continues_contexts
from flow_finetune.data import Sample, collate
from flow_finetune.models import CausalLM
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 16, "num_local_experts": 2, "shared_intermediate_size": 32, "num_experts_per_tok": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    # Of these some do not continue a padded batch of texts rightly, in some versions of transformers.
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
}  # fmt: skip


def model_of(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = BASE | ARCHITECTURES.get(name, {}) | options
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for peaked predictions, so an error in a state shows.
            if parameter.dim() >= 2 and float(parameter.std()) < 0.05:
                parameter.normal_(0, 0.2)
    return CausalLM(model.to(dtype))


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def questions():
    """Choices of three questions, after contexts of 9, 17 and 5 tokens."""
    rng = np.random.default_rng(0)
    groups = []
    for length in (9, 17, 5):
        context = rng.integers(3, 128, length)
        rests = [rng.integers(3, 128, k) for k in (2, 4, 3)]
        groups.append([Sample("", np.concatenate([context, r]).astype(np.int32), length, "", "", False) for r in rests])
    return groups


def test_choices_are_those_of_each_text_alone(name):
    lm, groups = model_of(name), questions()
    alone = [lm.score(collate([sample], 0)).loss.double().sum().item() for group in groups for sample in group]
    found = choices.score_groups(lm, groups, 0, 4096, "full", "questions")
    np.testing.assert_allclose(found.loss_sum, alone, rtol=1e-4)


def test_greedy_texts_are_those_of_running_everything_again(name):
    lm = model_of(name)
    prompts = [group[0].input_ids[:length] for group in questions() for length in (4, group[0].start)]
    stop_ids = set(range(3, 30))  # some end early, so rows leave the batch
    expected = []
    for prompt in prompts:
        ids, new = prompt.tolist(), []
        while len(new) < 12:
            with torch.no_grad():
                token = int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stop_ids:
                break
            ids.append(token)
            new.append(token)
        expected.append(new)
    assert len({len(new) for new in expected}) > 1
    found = generate.generate_greedily(
        lm, prompts, stop_ids=stop_ids, pad_id=0, max_new_tokens=12, batch_tokens=1000, precision="full"
    )
    assert found == expected


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_a_mistake(name, dtype):
    assert continues_contexts(model_of(name, dtype))


def _raises(cache, rows):
    raise AttributeError("a layer of this cache has no such thing")


def _forgets_the_order(cache, rows):
    for layer in cache.layers:
        layer.reorder_cache(torch.arange(len(rows)) % layer.keys.shape[0])


@pytest.mark.parametrize("mistake", [_raises, _forgets_the_order], ids=["error", "in silence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_do_not_continue_are_found_and_run_as_a_whole(mistake, dtype, monkeypatch, capfd):
    lm, groups = model_of("llama", dtype), questions()
    expected = choices.score_groups(model_of("llama", dtype), groups, 0, 4096, "full", "questions").loss_sum
    monkeypatch.setattr(DynamicCache, "reorder_cache", mistake)
    assert not continues_contexts(lm)
    assert "does not continue a batch of texts" in capfd.readouterr().err
    assert not continues_contexts(lm)
    assert capfd.readouterr().err == ""  # told once
    found = choices.score_groups(lm, groups, 0, 4096, "full", "questions").loss_sum
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2)
