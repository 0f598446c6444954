"""Weights and the fused loss under transformers.Trainer, against Trainer with the loss written out from the logits."""

import copy
import json
import os
import pickle
import types
from pathlib import Path

import datasets
import pytest
import torch
from flow_finetune.errors import InputError
from flow_finetune.integrations import use_weighted_loss
from peft import LoraConfig, get_peft_model
from processes import spawn_two
from tokenised_rows import new_model, padding, rows, shifted_losses
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from flow_kernels import BackendUnavailable, cpu

pytestmark = pytest.mark.usefixtures("one_thread")


class LogitsTrainer(Trainer):
    """The oracle: the weighted loss from logits, in fp32, divided by the target count that Trainer gives."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        weight = inputs.pop("sample_weight", None)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        nll = shifted_losses(logits, labels)
        per_sample = nll.sum(1) if weight is None else weight * nll.sum(1)
        loss = per_sample.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "sample_weight"]


@pytest.fixture(scope="module")
def plain(tiny_model_dir, qa_file):
    return rows(tiny_model_dir, qa_file)


@pytest.fixture(scope="module")
def weighted(plain):
    weights = torch.linspace(0.1, 2.0, len(plain))
    weights[3] = 0.0
    return plain.add_column("sample_weight", weights.numpy())


@pytest.fixture(scope="module")
def collator(tiny_model_dir):
    return padding(tiny_model_dir)


def trained(trainer_class, model, data, collator, output, **options):
    arguments = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=1,
        learning_rate=0.2, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, seed=1, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer


def losses_of(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def assert_same_parameters(a, b):
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_trainer_takes_the_steps_of_the_weighted_loss(tiny_model_dir, weighted, collator, tmp_path):
    expected, model, start = (new_model(tiny_model_dir) for _ in range(3))
    oracle = trained(LogitsTrainer, expected, weighted, collator, tmp_path / "a")
    trainer = trained(Trainer, use_weighted_loss(model), weighted, collator, tmp_path / "b")
    assert trainer.state.global_step == 4
    assert losses_of(trainer) == pytest.approx(losses_of(oracle), rel=1e-5)
    assert_same_parameters(model, expected)
    moved = max(
        float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert moved > 1e-2


def test_weights_of_one_are_plain_fine_tuning(tiny_model_dir, plain, collator, tmp_path):
    expected, model, unweighted = (new_model(tiny_model_dir) for _ in range(3))
    ones = plain.add_column("sample_weight", [1.0] * len(plain))
    a = trained(Trainer, expected, plain, collator, tmp_path / "a")
    b = trained(Trainer, use_weighted_loss(model), ones, collator, tmp_path / "b")
    c = trained(Trainer, use_weighted_loss(unweighted, require_weights=False), plain, collator, tmp_path / "c")
    for trainer in (b, c):
        assert losses_of(trainer) == pytest.approx(losses_of(a), rel=1e-5)
        assert_same_parameters(trainer.model, expected)


@pytest.mark.parametrize("width", ["sample", "token"])
def test_one_weight_per_label_moves_with_its_label(tiny_model_dir, weighted, collator, width):
    model = use_weighted_loss(new_model(tiny_model_dir)).train()
    batch = collator([{k: v for k, v in weighted[i].items() if k != "id"} for i in range(5)])
    sample_weight = batch.pop("sample_weight")
    weight = sample_weight if width == "sample" else torch.rand(batch["labels"].shape)
    nll = shifted_losses(new_model(tiny_model_dir)(input_ids=batch["input_ids"]).logits, batch["labels"])
    per_token = weight[:, None] if width == "sample" else weight[:, 1:]
    expected = (per_token * nll).sum() / 7
    out = model(**batch, sample_weight=weight, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert out.logits is None
    # Without a count: the targets of the batch.
    alone = model(**batch, sample_weight=weight).loss
    count = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(alone, expected * 7 / count, rtol=1e-5, atol=1e-6)
    # Labels that a collator shifted already.
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    weight = sample_weight if width == "sample" else torch.nn.functional.pad(weight[:, 1:], (0, 1))
    again = model(**batch, shift_labels=shifted, sample_weight=weight).loss
    torch.testing.assert_close(again, alone, rtol=1e-6, atol=1e-7)


def test_positional_arguments_and_tuples(tiny_model_dir, plain):
    ids = torch.tensor([plain[0]["input_ids"]])
    labels = torch.tensor([plain[0]["labels"]])
    expected = new_model(tiny_model_dir)(input_ids=ids, labels=labels).loss
    model = use_weighted_loss(new_model(tiny_model_dir), require_weights=False).train()
    torch.testing.assert_close(model(ids, torch.ones_like(ids), labels=labels).loss, expected, rtol=1e-5, atol=0)
    (loss,) = model(ids, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_evaluation_needs_no_weights_and_has_logits_when_asked(tiny_model_dir, plain, weighted, collator, tmp_path):
    def evaluated(model, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "e"), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
            prediction_loss_only=not options,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, eval_dataset=plain, data_collator=collator, **options).evaluate()

    expected = evaluated(new_model(tiny_model_dir))["eval_loss"]
    assert evaluated(use_weighted_loss(new_model(tiny_model_dir)))["eval_loss"] == pytest.approx(expected, rel=1e-5)
    seen = {}

    def keep(prediction):
        seen["logits"] = prediction.predictions
        return {}

    evaluated(new_model(tiny_model_dir), compute_metrics=keep)
    theirs = seen.pop("logits")
    evaluated(use_weighted_loss(new_model(tiny_model_dir), logits_in_eval=True), compute_metrics=keep)
    assert seen["logits"].shape == theirs.shape
    assert abs(seen["logits"] - theirs).max() < 1e-4


def test_without_labels_the_model_is_what_it_was(tiny_model_dir, plain):
    ids = torch.tensor([plain[0]["input_ids"][:6]])
    untouched, model = new_model(tiny_model_dir).eval(), use_weighted_loss(new_model(tiny_model_dir)).eval()
    assert torch.equal(model(ids).logits, untouched(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), untouched.generate(ids, **options))
    del model.forward
    assert torch.equal(model(ids, labels=ids).logits, untouched(ids, labels=ids).logits)


def test_a_deep_copy_runs_itself(tiny_model_dir, plain):
    ids, labels = (torch.tensor([plain[0][name]]) for name in ("input_ids", "labels"))
    model = use_weighted_loss(new_model(tiny_model_dir), require_weights=False)
    twin = copy.deepcopy(model)
    expected = new_model(tiny_model_dir)(input_ids=ids, labels=labels)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    twin(input_ids=ids, labels=labels).loss.backward()
    torch.testing.assert_close(twin(input_ids=ids, labels=labels).loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(twin(input_ids=ids).logits, expected.logits)
    assert float(twin.lm_head.weight.grad.abs().max()) > 0
    assert model.lm_head.weight.grad is None


def test_a_model_that_lost_the_loss_does_not_train_on(tiny_model_dir, weighted, collator, tmp_path):
    model = use_weighted_loss(new_model(tiny_model_dir))
    with pytest.raises(AttributeError, match="weighted_loss"):
        pickle.loads(pickle.dumps(model))
    # As Liger's patch of an instance does it.
    model.forward = types.MethodType(type(model).forward, model)
    with pytest.raises(InputError, match="was replaced after use_weighted_loss"):
        trained(Trainer, model, weighted, collator, tmp_path / "a")


def test_trainer_counts_targets_also_for_models_that_say_they_do_not(tiny_model_dir, weighted, collator, tmp_path):
    expected, model = (new_model(tiny_model_dir) for _ in range(2))
    model.accepts_loss_kwargs = False
    oracle = trained(LogitsTrainer, expected, weighted, collator, tmp_path / "a")
    trainer = trained(Trainer, use_weighted_loss(model), weighted, collator, tmp_path / "b")
    assert losses_of(trainer) == pytest.approx(losses_of(oracle), rel=1e-5)


@pytest.mark.parametrize("first", ["loss", "adapters"])
def test_adapters_train_alone(tiny_model_dir, weighted, collator, tmp_path, first):
    def with_adapters(model):
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))

    base = new_model(tiny_model_dir)
    model = with_adapters(use_weighted_loss(base)) if first == "loss" else with_adapters(base)
    if first == "adapters":
        use_weighted_loss(model)
    expected = with_adapters(new_model(tiny_model_dir))
    oracle = trained(LogitsTrainer, expected, weighted, collator, tmp_path / "a", label_names=["labels"])
    trainer = trained(Trainer, model, weighted, collator, tmp_path / "b", label_names=["labels"])
    assert losses_of(trainer) == pytest.approx(losses_of(oracle), rel=1e-5)
    assert_same_parameters(model, expected)


def test_softcap_label_smoothing_and_z_loss():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.5, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    ids = torch.randint(0, 97, (3, 11))
    weight = torch.tensor([0.3, 0.0, 1.7])
    logits = model(ids).logits
    assert float(logits.detach().abs().max()) > 1.0
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none", label_smoothing=0.2
    )
    loss = loss + 0.3 * torch.logsumexp(logits[:, :-1], -1) ** 2
    expected = (weight[:, None] * loss).sum() / loss.numel()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    use_weighted_loss(model, label_smoothing=0.2, z_loss=0.3, logits_in_eval=True)
    found = model.train()(ids, labels=ids, sample_weight=weight).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for actual, gradient in zip(torch.autograd.grad(found, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.eval()(ids, labels=ids).logits, logits)


@pytest.mark.skipif(cpu.why_not() is not None, reason=f"no compiled CPU kernels: {cpu.why_not()}")
def test_the_gradient_filter_leaves_small_classes_out_of_the_gradients(tiny_model_dir, plain):
    """A class is left out where its logit's gradient, before weights, stays below the bound in every row."""
    eps, weight = 0.05, 0.3
    ids, labels = (torch.tensor([plain[5][name]]) for name in ("input_ids", "labels"))
    expected, model = (new_model(tiny_model_dir) for _ in range(2))
    logits = expected(input_ids=ids).logits
    free = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(shifted_losses(free, labels).sum(), free)
    largest = gradient.abs().amax((0, 1))
    left_out = largest < eps
    assert 0.1 < left_out.double().mean() < 0.9
    # None is so near that a rounding decides.
    assert float((largest / eps - 1).abs().min()) > 1e-4
    count = int((labels[:, 1:] != -100).sum())
    logits.backward(weight / count * gradient.masked_fill(left_out, 0.0))
    use_weighted_loss(model, grad_filter_eps=eps)
    model.train()(input_ids=ids, labels=labels, sample_weight=torch.tensor([weight])).loss.backward()
    assert not model.lm_head.weight.grad[left_out].any()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_mixed_precision_casts_as_the_trainer_does(tiny_model_dir, weighted, collator, tmp_path):
    model = use_weighted_loss(new_model(tiny_model_dir))
    trainer = trained(Trainer, model, weighted, collator, tmp_path / "b", bf16=True)
    exact = trained(Trainer, use_weighted_loss(new_model(tiny_model_dir)), weighted, collator, tmp_path / "c")
    assert losses_of(trainer) == pytest.approx(losses_of(exact), rel=2e-2)
    assert losses_of(trainer) != losses_of(exact)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def worker(rank: int, model_dir: str, data_dir: str, meeting: str, output: str) -> None:
    """One of two processes that train together."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    # Before the trainer would look for a port: one that was free a moment ago may not be.
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    model = use_weighted_loss(new_model(model_dir))
    collator = padding(model_dir)
    data = datasets.load_from_disk(data_dir)
    options = {"train_sampling_strategy": "sequential", "ddp_backend": "gloo"}
    trainer = trained(Trainer, model, data, collator, output, **options)
    if rank == 0:
        model.save_pretrained(output)
        Path(output, "losses.json").write_text(json.dumps(losses_of(trainer)))
    torch.distributed.barrier()
    # Not destroy_process_group: when the trainer lets go of DDP's reducer, Gloo's destructor joins a thread that may wait
    # for the GIL, which this one holds. Seen once: the process never ended, and nothing else of it was left to do.
    os._exit(0)


def test_two_processes_train_as_one(tiny_model_dir, weighted, collator, tmp_path):
    weighted.save_to_disk(tmp_path / "data")
    both = tmp_path / "both"
    spawn_two(worker, (str(tiny_model_dir), str(tmp_path / "data"), f"file://{tmp_path}/meeting", str(both)))
    # The two take batches in turn: of 3 rows each, twice, so that a step is of 12 rows, in an order of no effect.
    one = use_weighted_loss(new_model(tiny_model_dir))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "one"), per_device_train_batch_size=12, num_train_epochs=1, learning_rate=0.2,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model=one, args=arguments, train_dataset=weighted, data_collator=collator)
    trainer.train()
    assert_same_parameters(new_model(both), one)
    assert json.loads((both / "losses.json").read_text()) == pytest.approx(losses_of(trainer), rel=1e-4)


def test_a_weight_that_is_lost_is_an_error(tiny_model_dir, plain, weighted, collator, tmp_path):
    with pytest.raises(InputError, match=r"no sample_weight reached the model.*require_weights=False"):
        trained(Trainer, use_weighted_loss(new_model(tiny_model_dir)), plain, collator, tmp_path / "a")

    def forgets(features):
        return collator([{k: v for k, v in row.items() if k != "sample_weight"} for row in features])

    with pytest.raises(InputError, match="collator must keep it"):
        trained(Trainer, use_weighted_loss(new_model(tiny_model_dir)), weighted, forgets, tmp_path / "b")


def test_labels_that_the_trainer_takes_out_are_an_error(tiny_model_dir, plain, weighted, collator, tmp_path):
    model = use_weighted_loss(new_model(tiny_model_dir))
    with pytest.raises(InputError, match="give label_smoothing to use_weighted_loss"):
        trained(Trainer, model, weighted, collator, tmp_path / "a", label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="no sample_weight reached the model"):
        trained(Trainer, model, plain, collator, tmp_path / "b", label_smoothing_factor=0.1)


def test_the_count_of_data_parallel_is_refused(tiny_model_dir, plain):
    model = use_weighted_loss(new_model(tiny_model_dir), require_weights=False)
    ids = torch.tensor([plain[0]["input_ids"]])
    with pytest.raises(InputError, match="torchrun"):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor([[7]]))


def test_bad_models_are_refused(tiny_model_dir):
    model = use_weighted_loss(new_model(tiny_model_dir))
    with pytest.raises(InputError, match="once a model"):
        use_weighted_loss(model)
    with pytest.raises(InputError, match="no causal language model"):
        use_weighted_loss(torch.nn.Linear(2, 2))
    with pytest.raises(BackendUnavailable, match=r"'cuda' cannot serve tensors on cpu.*to its GPU first"):
        use_weighted_loss(new_model(tiny_model_dir), backend="cuda")
    with pytest.raises(InputError, match="merge or remove the adapter"):
        use_weighted_loss(get_peft_model(new_model(tiny_model_dir), LoraConfig(target_modules=["lm_head"])))
    with pytest.raises(ValueError, match="label_smoothing"):
        use_weighted_loss(new_model(tiny_model_dir), label_smoothing=2.0)
    spread = new_model(tiny_model_dir)
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(InputError, match="several devices"):
        use_weighted_loss(spread)
    bodiless = new_model(tiny_model_dir)
    bodiless.base_model_prefix = "nothing"
    with pytest.raises(InputError, match="no body of its own"):
        use_weighted_loss(bodiless)


def test_models_with_a_loss_of_their_own_are_refused():
    small = {"vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = MixtralConfig(
        hidden_size=16, intermediate_size=16, num_local_experts=2, output_router_logits=True, **small
    )  # fmt: skip
    with pytest.raises(InputError, match="output_router_logits=False"):
        use_weighted_loss(MixtralForCausalLM(config))
    config.output_router_logits = False
    model = use_weighted_loss(MixtralForCausalLM(config), require_weights=False)
    ids = torch.arange(6)[None]
    with pytest.raises(InputError, match="output_router_logits=False"):
        model(input_ids=ids, labels=ids, output_router_logits=True)
    torch.manual_seed(0)
    bart = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, init_std=0.3,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(InputError, match="does not shift the labels"):
        use_weighted_loss(BartForCausalLM(copy.deepcopy(bart)))  # it makes the config a decoder's
    with pytest.raises(InputError, match="encoder-decoder"):
        use_weighted_loss(BartForConditionalGeneration(bart))


def test_an_adapter_put_on_the_head_later_is_found(tiny_model_dir, plain):
    model = use_weighted_loss(new_model(tiny_model_dir), require_weights=False)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    ids = torch.tensor([plain[0]["input_ids"]])
    with pytest.raises(InputError, match="merge or remove the adapter"):
        model(input_ids=ids, labels=ids)
