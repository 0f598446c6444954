"""The weighted loss of models that something else has a hand in: compilation, wrappers, sharding, Trainer's own counts."""

import datasets
import pytest
import torch
from flow_finetune.errors import InputError
from flow_finetune.integrations import add_sample_weights, use_weighted_loss
from tokenised_rows import new_model, padding, rows, shifted_losses
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weighted(tiny_model_dir, qa_file):
    plain = rows(tiny_model_dir, qa_file)
    return plain.remove_columns("id").add_column("sample_weight", torch.linspace(0.1, 2.0, len(plain)).numpy())


def arguments(output, **options):
    return TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", max_steps=1, logging_steps=1, **options,
    )  # fmt: skip


def test_evaluation_is_plain_unless_weights_are_asked_for(tiny_model_dir, weighted, tmp_path):
    def evaluated(model, data):
        trainer = Trainer(
            model=model, args=arguments(tmp_path), eval_dataset=data, data_collator=padding(tiny_model_dir)
        )
        return trainer.evaluate()["eval_loss"]

    expected = evaluated(new_model(tiny_model_dir), weighted.remove_columns("sample_weight"))
    assert evaluated(use_weighted_loss(new_model(tiny_model_dir)), weighted) == pytest.approx(expected, rel=1e-5)
    model = use_weighted_loss(new_model(tiny_model_dir), weights_in_eval=True)
    means = []  # of batches of 4, as the trainer takes them
    for start in range(0, len(weighted), 4):
        batch = padding(tiny_model_dir)([weighted[i] for i in range(start, start + 4)])
        weight = batch.pop("sample_weight").view(-1, 1)
        with torch.no_grad():
            nll = shifted_losses(new_model(tiny_model_dir).eval()(batch["input_ids"]).logits, batch["labels"])
        means.append(float((weight * nll).sum() / (batch["labels"][:, 1:] != -100).sum()))
    found = evaluated(model, weighted)
    assert abs(found - expected) > 0.01 * expected
    assert found == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_targets_are_counted_for_models_that_name_no_loss(tmp_path):
    """Trainer counts shifted labels only of a loss type that it knows; GPT-2 names none."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0, resid_pdrop=0,
                        attn_pdrop=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    assert model.loss_type is None
    tokens = torch.randint(64, (4, 10))
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist(),
                                       "sample_weight": [0.2, 1.0, 0.5, 2.0]})  # fmt: skip
    with torch.no_grad():
        nll = shifted_losses(model(tokens).logits, tokens)
    expected = float((torch.tensor([[0.2], [1.0], [0.5], [2.0]]) * nll).sum() / nll.numel())
    trainer = Trainer(
        model=use_weighted_loss(model), args=arguments(tmp_path), train_dataset=data,
        data_collator=default_data_collator,
    )  # fmt: skip
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)


def test_a_head_that_was_compiled_alone_is_read_through(tiny_model_dir, weighted):
    """As accelerate's regional compilation leaves it."""
    ids = torch.tensor([weighted[0]["input_ids"]])
    expected = new_model(tiny_model_dir)(input_ids=ids, labels=ids).loss
    model = use_weighted_loss(new_model(tiny_model_dir), require_weights=False)
    model.set_output_embeddings(torch.compile(model.lm_head, backend="eager"))
    assert type(model.get_output_embeddings()).__name__ == "OptimizedModule"
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=0)


def test_what_cannot_be_served_is_named(tiny_model_dir, weighted):
    def refused(model, message):
        with pytest.raises(InputError, match=message):
            use_weighted_loss(model)

    refused(torch.compile(new_model(tiny_model_dir), backend="eager"), "OptimizedModule is a wrapper; give the model")
    refused(torch.nn.DataParallel(new_model(tiny_model_dir)), "DataParallel is a wrapper; give the model")
    refused(new_model(tiny_model_dir).to("meta"), "is not whole here")
    sharded = new_model(tiny_model_dir)
    sharded.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    refused(sharded, "before its parameters are sharded")
    tuples = new_model(tiny_model_dir)
    tuples.config.return_dict = False
    refused(tuples, "return_dict is False")
    with pytest.raises(InputError, match="already"):
        add_sample_weights(weighted, new_model(tiny_model_dir), padding(tiny_model_dir))
