"""Batches in one row without padding: the layout, and that models give packed texts what they give them alone."""

import dataclasses

import numpy as np
import pytest
import tiny_model
import torch
from evaluation_cases import sliding_window_model
from flow_finetune import choices
from flow_finetune.batches import token_batches
from flow_finetune.config import ModelConfig
from flow_finetune.data import Sample, collate
from flow_finetune.models import load_model, model_fingerprint
from flow_finetune.packing import ATTENTION, attention, num_packed_tokens, pack, packs_texts
from test_context import ARCHITECTURES, model_of, questions

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(tokens, start=1):
    return Sample("", np.asarray(tokens, np.int32), start, "", "", False)


def texts():
    """Four texts: three begin alike, two of these alike for longer; 97 tokens are known."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(3, 97, 12), rng.integers(3, 97, 9)
    ends = [rng.integers(3, 97, n) for n in (5, 11, 1)]
    return [
        sample([*first, *second, *ends[0]], 14), sample([*first, *second, *ends[1]], 21), sample([*first, *ends[2]], 12),
        sample(rng.integers(3, 97, 17), 4),
    ]  # fmt: skip


def test_the_row():
    batch = collate(texts(), 0)
    packed = pack(batch)
    a, b, c, d = (t.input_ids.tolist() for t in texts())
    # Two beginnings, then what is each text's own.
    assert packed.attention_mask[0, 0].tolist() == [
        [0, 12, -1], [12, 21, 0], [21, 26, 1], [26, 37, 1], [37, 38, 0], [38, 55, -1],
    ]  # fmt: skip
    assert packed.input_ids[0].tolist() == [*a, *b[21:], *c[12:], *d]
    assert packed.position_ids[0].tolist() == [*range(26), *range(21, 32), 12, *range(17)]
    assert num_packed_tokens(batch) == 55
    # Where each target is predicted: in the row the same token stands there.
    assert torch.equal(packed.input_ids[0][packed.positions], batch.input_ids.flatten()[batch.positions])
    assert torch.equal(packed.position_ids[0][packed.positions], batch.positions % batch.input_ids.shape[1])
    assert torch.equal(packed.target, batch.target)


def test_short_beginnings_and_whole_texts_are_not_shared():
    text = list(range(3, 23))
    for others, expected in (
        ([[*text[:7], 90, 91]], [[0, 20, -1], [20, 29, -1]]),
        # Equal texts keep their last token each; one that another begins with as well.
        ([text], [[0, 19, -1], [19, 20, 0], [20, 21, 0]]),
        ([text[:9]], [[0, 8, -1], [8, 20, 0], [20, 21, 0]]),
        ([], [[0, 20, -1]]),
    ):
        packed = pack(collate([sample(t) for t in (text, *others)], 0))
        assert packed.attention_mask[0, 0].tolist() == expected


def gradients(lm, batch, weight):
    lm.zero_grad()
    loss = lm(batch, weight, 7.0)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_losses_and_gradients_are_those_of_padded_texts(kind, tied):
    lm = sliding_window_model() if kind == "sliding" else model_of("llama")
    lm.shares_tied_gradient = tied
    batch, weight = collate(texts(), 0), torch.tensor([0.3, 1.0, 0.7, 2.0])
    expected = gradients(lm, batch, weight), lm.score(batch)
    assert lm.model.config._attn_implementation == "sdpa"
    lm.packing = True
    assert packs_texts(lm)
    assert lm.model.config._attn_implementation == ATTENTION
    found = gradients(lm, batch, weight), lm.score(batch)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    lm.packing = False  # with the attention that it has now
    torch.testing.assert_close((gradients(lm, batch, weight), lm.score(batch)), expected, rtol=2e-5, atol=2e-6)


def test_a_text_is_as_if_alone():
    lm = sliding_window_model()
    expected = [lm.score(collate([text], 0)).loss for text in texts()]
    lm.packing = True
    calls = []
    lm.model.base_model.register_forward_pre_hook(
        lambda m, a, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert packs_texts(lm)
    calls.clear()
    found = lm.score(collate(texts(), 0)).loss
    assert calls == [(1, 55)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)


# These have layers that would carry one text into the next.
RECURRENT = {"granitemoehybrid", "lfm2", "mamba", "mamba2", "jamba"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_mix_texts_are_found(name):
    lm, groups = model_of(name), questions()
    alone = [lm.score(collate([s], 0)).loss.double().sum().item() for group in groups for s in group]
    lm.packing = True
    assert packs_texts(lm) == (name not in RECURRENT)
    found = choices.score_groups(lm, groups, 0, 4096, "full", "questions")
    np.testing.assert_allclose(found.loss_sum, alone, rtol=1e-4)


@pytest.mark.parametrize("reason", ["dropout", "eager", "backend", "chunks"])
def test_models_that_are_left_as_they_are(reason, monkeypatch):
    lm = model_of("llama")
    lm.packing = True
    if reason == "dropout":
        lm.model.config.attention_dropout = 0.1
    elif reason == "eager":
        lm.model.set_attn_implementation("eager")
    elif reason == "backend":
        lm.backend = "reference"
    else:
        lm.model.config.attention_chunk_size = 64
    before = lm.model.config._attn_implementation
    assert not packs_texts(lm)
    assert lm.model.config._attn_implementation == before


WINDOW = {"sliding_window": 40, "num_key_value_heads": 2}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("kind", "options", "packs"),
    [
        ("mistral", WINDOW, True),
        # Every second layer has a window, and the other none.
        ("qwen2", {**WINDOW, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, True),
        # Their window is in the mask alone, which the segments replace.
        ("phimoe", {**WINDOW, "num_local_experts": 2}, False),
        ("qwen2_moe", {**WINDOW, **EXPERTS, "use_sliding_window": True}, False),
    ],
)
def test_windows_wider_than_a_trial(kind, options, packs):
    lm = model_of(kind, **options)
    rng = np.random.default_rng(0)
    batch = collate([sample(rng.integers(3, 128, n)) for n in (100, 80, 60)], 0)
    expected = lm.score(batch)
    lm.packing = True
    assert packs_texts(lm) == packs
    torch.testing.assert_close(lm.score(batch), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["biogpt", "opt"])
def test_models_that_drop_without_a_layer_for_it(kind):
    """Their rates are in the configuration alone; a shared beginning would lose the same for all of its texts."""
    options = {"opt": {"word_embed_proj_dim": 64, "ffn_dim": 64}}.get(kind, {})
    for rate in (0.1, 0.0):
        names = (
            "attention_dropout",
            "attention_probs_dropout_prob",
            "hidden_dropout_prob",
            "activation_dropout",
            "layerdrop",
        )
        lm = model_of(
            kind, **options, **dict.fromkeys(names, 0.0) | {"dropout": rate, "attention_probs_dropout_prob": rate}
        )
        lm.packing = True
        assert packs_texts(lm) == (rate == 0.0), rate


def test_what_an_attention_is_given_beside_a_row():
    """An option that it does not know could change what is seen, such as the blocks of keys for each query."""
    lm = model_of("llama")
    heads = [torch.zeros(1, 2, 4, 8)] * 3
    segments, layer = torch.tensor([[0, 4, -1]])[None, None], lm.model.base_model.layers[0].self_attn
    assert (
        attention(layer, *heads, segments, scaling=1.0, position_ids=torch.arange(4)[None], use_cache=False)[0]
        is not None
    )
    with pytest.raises(NotImplementedError, match="block_indices"):
        attention(layer, *heads, segments, scaling=1.0, block_indices=torch.zeros(1))


def test_loaded_models_are_packed_unless_told_not_to(tmp_path):
    model_dir = tiny_model.build(tmp_path / "model", bos=True)
    lm, _ = load_model(ModelConfig(str(model_dir)))
    fingerprint = model_fingerprint(lm.model)
    assert packs_texts(lm)
    assert model_fingerprint(lm.model) == fingerprint
    lm, _ = load_model(ModelConfig(str(model_dir), packing=False))
    assert not packs_texts(lm)


def test_a_saved_model_does_not_ask_for_this_attention(tmp_path):
    model_dir = tiny_model.build(tmp_path / "model", bos=True)
    lm, _ = load_model(ModelConfig(str(model_dir)))
    assert packs_texts(lm)
    lm.model.save_pretrained(tmp_path / "saved")
    assert ATTENTION not in (tmp_path / "saved" / "config.json").read_text()


def test_batches_of_packed_texts():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 50).tolist()
    batches = token_batches(lengths, 2048, packed=True)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    totals = [sum(lengths[i] for i in batch) for batch in batches]
    assert len(batches) == -(-sum(lengths) // 2048)
    assert max(totals) <= 2048
    assert max(totals) - min(totals) < 100
    # One that is too long is alone; an even cut that does not fit gets one more batch.
    assert token_batches([3000, 5], 2048, packed=True) == [[0], [1]]
    assert sorted(map(len, token_batches([700, 700, 700, 700, 700], 2048, packed=True))) == [1, 2, 2]
    assert token_batches([], 2048, packed=True) == []
    # Only one fits a batch, of however many; the cuts that are tried must not be as many as they.
    batches = token_batches([1500] * 20_000, 2048, packed=True)
    assert sorted(batches) == [[i] for i in range(20_000)]


def test_batches_of_packed_questions():
    shots = list(range(3, 33))
    groups = [
        [dataclasses.replace(sample([*shots, *range(40 + g, 50 + g), 60 + c, 61 + c], 40)) for c in range(3)]
        for g in range(6)
    ]
    # All begin with 30 tokens; each question has 9 before what differs, and 3 tokens a choice.
    assert choices.packed_batches(groups, 30 + 3 * 18) == [[0, 1, 2], [3, 4, 5]]
    assert choices.packed_batches(groups, 30 + 3 * 18 - 1) == [[0, 1], [2, 3], [4, 5]]
    assert choices.packed_batches(groups, 1) == [[0], [1], [2], [3], [4], [5]]
