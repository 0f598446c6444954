"""One gradient for a matrix that is head and embeddings: the model's own, and which models keep two."""

import pytest
import tiny_model
import torch
from flow_finetune import tied
from flow_finetune.config import MethodConfig
from flow_finetune.data import Sample, collate
from flow_finetune.models import CausalLM, load_model
from safetensors.torch import load_file
from torch import nn
from training import Setup
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")

V, WEIGHT = 97, torch.tensor([0.2, 1.0, 0.5])


def _gemma3(tied_head: bool = True) -> Gemma3ForCausalLM:
    """Its embeddings are scaled, and row 0 is the padding's."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, tie_word_embeddings=tied_head, sliding_window=8,
        final_logit_softcapping=None, attn_implementation="eager",
    )  # fmt: skip
    return Gemma3ForCausalLM(config).double()


def _llama(padding: int | None) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=padding, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def _lm(model: PreTrainedModel, shares: bool) -> CausalLM:
    lm = CausalLM(model, "reference")
    lm.shares_tied_gradient = shares
    return lm


def _batch(seed: int = 0):
    """Three texts with repeated tokens, in which 0 and 90 are tokens and not padding alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (3, 12), generator=generator, dtype=torch.int32)
    ids[:, 2], ids[:, 4] = 0, 90
    return collate([Sample(str(i), row[: 8 + i], 3, "", "", False) for i, row in enumerate(ids.numpy())], 0)


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _own_gradients(model: PreTrainedModel, batches) -> dict[str, torch.Tensor]:
    """Of the model's own logits, by autograd alone."""
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1)[batch.positions], batch.target, reduction="none")
        (loss * WEIGHT.repeat_interleave(batch.cu_seqlens.diff())).sum().div(10).backward()
    return _gradients(model)


MODELS = {
    "scaled": _gemma3, "untied": lambda: _gemma3(False), "no padding": lambda: _llama(None),
    "padding at 0": lambda: _llama(0), "padding beyond the batch's rows": lambda: _llama(90),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_batches", [1, 3])
def test_gradients_are_the_models_own(name, num_batches):
    model = MODELS[name]()
    batches = [_batch(seed) for seed in range(num_batches)]
    expected = _own_gradients(model, batches)
    for batch in batches:
        _lm(model, True)(batch, WEIGHT, 10).backward()
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-11, msg=key)
    assert (tied.tied_embedding(CausalLM(model)) is None) == (name == "untied")


def test_no_gradient_of_the_whole_matrix_is_made_for_the_embeddings():
    model, made = _gemma3(), []
    weight = model.lm_head.weight
    loss = _lm(model, True)(_batch(), WEIGHT, 10)
    # What accumulates into the matrix is reached from one node alone, and that is the one that adds rows.
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        made += [type(node).__name__ for n, _ in node.next_functions if getattr(n, "variable", None) is weight]
        nodes += [n for n, _ in node.next_functions]
    assert made == ["_RowsAndMatrixBackward"]


def test_a_retained_graph_gives_the_same_gradient_again():
    model = _gemma3()
    loss = _lm(model, True)(_batch(), WEIGHT, 10)
    loss.backward(retain_graph=True)
    first = _gradients(model)
    loss.backward()
    for key, gradient in _gradients(model).items():
        assert torch.equal(gradient, first[key]), key


def test_the_rows_alone_have_a_gradient():
    """Where nothing comes back from the head, the embeddings' gradient is a matrix of zeros but for the rows."""
    embedding = nn.Embedding(V, 4)
    ids = torch.tensor([[3, 5, 3]])
    tied.embed(embedding, ids)[0].sum().backward()
    expected = torch.zeros(V, 4)
    expected[3], expected[5] = 2, 1
    assert torch.equal(embedding.weight.grad, expected)


def test_what_keeps_its_own_gradient():
    model = _gemma3()
    assert tied.tied_embedding(CausalLM(model)) is model.get_input_embeddings()
    with torch.no_grad():
        assert tied.tied_embedding(CausalLM(model)) is None
    model.lm_head.weight.requires_grad_(False)
    assert tied.tied_embedding(CausalLM(model)) is None
    for change in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        model = _gemma3()
        vars(model.get_input_embeddings()).update(change)
        assert tied.tied_embedding(CausalLM(model)) is None


def _looks_at_tokens(forward):
    def looks(input_ids=None, **options):
        hidden = forward(input_ids=input_ids, **options)
        hidden.last_hidden_state = hidden.last_hidden_state + (0 if input_ids is None else input_ids[..., None] / 50)
        return hidden

    return looks


def _finds_tokens_again(forward, matrix):
    def finds(input_ids=None, inputs_embeds=None, **options):
        if inputs_embeds is not None:
            # As Gemma 4's, whose layers have embeddings of their own.
            input_ids = (
                (inputs_embeds[:, :, None] == matrix * 32**0.5).all(3).nonzero()[:, 2].view(inputs_embeds.shape[:2])
            )
        hidden = forward(input_ids=input_ids, **options)
        hidden.last_hidden_state = hidden.last_hidden_state + input_ids[..., None] / 50
        return hidden

    return finds


@pytest.mark.parametrize("kind", ["looks at tokens", "finds them again", "takes no embeddings"])
def test_a_body_that_looks_at_the_tokens_is_given_them(kind):
    model = _gemma3()
    forward = model.model.forward
    model.model.forward = {
        "looks at tokens": _looks_at_tokens(forward), "finds them again": _finds_tokens_again(forward, model.lm_head.weight),
        "takes no embeddings": lambda input_ids, use_cache=False: forward(input_ids=input_ids, use_cache=False),
    }[kind]  # fmt: skip
    assert tied.tied_embedding(CausalLM(model)) is None
    assert model.training  # as it was before it was tried
    batch = _batch()
    loss = _lm(model, True)(batch, WEIGHT, 10)
    assert torch.equal(loss, _lm(model, False)(batch, WEIGHT, 10))
    loss.backward()


@pytest.mark.parametrize("precision", ["full", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_the_same_weights(tmp_path, qa_file, monkeypatch, checkpointing, precision):
    directory = tiny_model.build(tmp_path / "model", bos=True, tied=True)
    setup = Setup(directory, qa_file, precision)
    options = {"epochs": 1, "batch_size": 6, "micro_batch_tokens": 256, "learning_rate": 1e-2}
    options["gradient_checkpointing"] = checkpointing
    asked = []
    ask = tied.tied_embedding
    monkeypatch.setattr("flow_finetune.models.tied_embedding", lambda lm: asked.append(ask(lm)) or asked[-1])
    setup.train(tmp_path / "a", MethodConfig("m", weights="none"), **options)
    assert asked
    assert None not in asked
    monkeypatch.setattr("flow_finetune.models.tied_embedding", lambda lm: None)
    setup.train(tmp_path / "b", MethodConfig("m", weights="none"), lm=load_model(setup.config)[0], **options)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    before = load_file(directory / "model.safetensors")
    for key, weight in b.items():
        assert not torch.equal(weight, before[key]), key
        torch.testing.assert_close(a[key], weight, rtol=1e-6, atol=1e-8, msg=key)


def test_adapters_leave_the_matrix_alone(tmp_path, qa_file, monkeypatch):
    """A frozen matrix is used as it is."""
    setup = Setup(tiny_model.build(tmp_path / "model", bos=True, tied=True), qa_file)
    monkeypatch.setattr("flow_finetune.models.embed", lambda *_: pytest.fail("a frozen matrix has no gradient"))
    method = MethodConfig("m", weights="none", train="lora", lora_rank=2)
    assert setup.train(tmp_path / "out", method, epochs=1, batch_size=12)["final_loss"] > 0
