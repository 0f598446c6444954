"""Losses of samples, and FLOW's weights of them, as a column of a tokenised data set."""

import datasets
import peft
import pytest
import torch
from flow_finetune.errors import InputError
from flow_finetune.integrations import add_sample_weights, sample_losses, use_weighted_loss
from tokenised_rows import new_model, padding, rows, shifted_losses
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, default_data_collator

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_model_dir, qa_file):
    return rows(tiny_model_dir, qa_file)


@pytest.fixture(scope="module")
def collator(tiny_model_dir):
    return padding(tiny_model_dir)


def test_losses_are_means_over_targets_and_weights_are_flows(tiny_model_dir, plain, collator):
    untouched = new_model(tiny_model_dir).eval()
    expected = []
    for row in plain:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        nll = shifted_losses(untouched(ids).logits, labels)
        expected.append(float(nll.sum() / (labels[:, 1:] != -100).sum()))
    expected = torch.tensor(expected)
    model = new_model(tiny_model_dir).train()
    losses = sample_losses(plain, model, collator, batch_size=5)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert model.training
    assert all(module.training for module in model.modules())
    data_set = add_sample_weights(plain, model, collator)
    expected = torch.exp(-expected.double() / expected.double().quantile(0.5))
    torch.testing.assert_close(torch.tensor(data_set["sample_weight"][:]).double(), expected, rtol=1e-5, atol=0)
    assert data_set["id"][:] == plain["id"][:]
    mean = add_sample_weights(plain, model, collator, quantile=0.25, normalize="mean")["sample_weight"][:]
    assert sum(mean) / len(mean) == pytest.approx(1.0)


def test_adapters_are_off_while_their_base_model_is_scored(tiny_model_dir, plain, collator):
    before = sample_losses(plain, new_model(tiny_model_dir), collator)
    adapted = peft.get_peft_model(new_model(tiny_model_dir), peft.LoraConfig(target_modules="all-linear", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.testing.assert_close(sample_losses(plain, adapted, collator), before, rtol=1e-6, atol=0)
    row = {name: torch.tensor([plain[0][name]]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert abs(float(adapted.eval()(**row).loss) - float(before[0])) > 1e-3


def test_adapters_that_took_a_part_of_the_model_are_refused(tiny_model_dir, plain, collator):
    for initialisation in ("pissa", "olora"):
        adapted = peft.get_peft_model(
            new_model(tiny_model_dir),
            peft.LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], r=2, init_lora_weights=initialisation),
        )  # fmt: skip
        with pytest.raises(InputError, match=rf"init_lora_weights='{initialisation}' changes the matrices"):
            sample_losses(plain, adapted, collator)
    gaussian = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights="gaussian")
    expected = sample_losses(plain, new_model(tiny_model_dir), collator)
    found = sample_losses(plain, peft.get_peft_model(new_model(tiny_model_dir), gaussian), collator)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_what_is_frozen_stays_frozen(tiny_model_dir, plain, collator):
    adapted = peft.get_peft_model(new_model(tiny_model_dir), peft.LoraConfig(target_modules="all-linear", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in adapted.parameters()]
    assert any(before)
    sample_losses(plain.select([0, 1]), adapted, collator)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == before


def test_a_collator_sees_the_columns_that_it_sees_in_training(tiny_model_dir, plain, collator):
    """`remove_unused_columns` as the trainer has it: here a collator that masks the prompt by a column of its own."""
    model = new_model(tiny_model_dir)
    lengths = [sum(label == -100 for label in row["labels"]) for row in plain]
    whole = plain.remove_columns("labels").add_column("prompt_length", lengths)

    def masks(features):
        rows = [dict(row) for row in features]
        for row in rows:
            hidden = row.pop("prompt_length", 0)
            row.pop("id", None)
            row["labels"] = [-100] * hidden + row["input_ids"][hidden:]
        return collator(rows)

    expected = sample_losses(plain, model, collator)
    torch.testing.assert_close(sample_losses(whole, model, masks, remove_unused_columns=False), expected)
    assert (sample_losses(whole, model, masks) - expected).abs().max() > 1e-2
    found = add_sample_weights(whole, model, masks, remove_unused_columns=False)["sample_weight"][:]
    wanted = add_sample_weights(plain, model, collator)["sample_weight"][:]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_data_that_gives_no_weights_is_refused(tiny_model_dir, plain, collator):
    model = new_model(tiny_model_dir)
    with pytest.raises(InputError, match="column sample_weight already"):
        add_sample_weights(plain.add_column("sample_weight", [1.0] * len(plain)), model, collator)
    with pytest.raises(InputError, match="takes no new column"):
        add_sample_weights([{"input_ids": [1, 2]}], model, collator)
    with pytest.raises(InputError, match="has no length"):
        sample_losses(plain.to_iterable_dataset(), model, collator)
    with pytest.raises(InputError, match="data set is empty"):
        sample_losses([], model, collator)
    with pytest.raises(InputError, match="batch_size"):
        sample_losses(plain, model, collator, batch_size=0)
    with pytest.raises(InputError, match="at least 2 losses"):
        add_sample_weights(plain.select([0]), model, collator)
    without = [{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [1, 5, 7], "labels": [4, -100, -100]}]
    with pytest.raises(InputError, match=r"1 samples have no target token, the first are \[1\]"):
        sample_losses(without, model, default_data_collator)
    with pytest.raises(InputError, match="makes no labels"):
        sample_losses([{"input_ids": [1, 2]}], model, default_data_collator)

    def tokenises(features):
        return collator([{k: v for k, v in plain[int(row["row"])].items() if k != "id"} for row in features])

    numbered = datasets.Dataset.from_dict({"row": ["0", "5", "2"]})
    expected = sample_losses(plain.select([0, 5, 2]), model, collator)
    torch.testing.assert_close(sample_losses(numbered, model, tokenises), expected)

    def packs(features):
        ids = torch.tensor([[token for f in features for token in f["input_ids"]]])
        return {"input_ids": ids, "labels": ids}

    with pytest.raises(InputError, match="1 rows of 2 samples"):
        sample_losses(plain.select([0, 1]), model, packs)


@pytest.mark.parametrize("made", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_what_needs_data_to_be_made_of_is_refused_by_name(tiny_model_dir, plain, collator, made):
    adapted = peft.get_peft_model(new_model(tiny_model_dir), peft.LoraConfig(target_modules="all-linear", r=2))
    adapted.peft_config["default"].init_lora_weights = made
    with pytest.raises(InputError, match=f"init_lora_weights='{made}' changes the matrices"):
        sample_losses(plain, adapted, collator)


SMALL = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "initializer_range": 0.5}  # fmt: skip


@pytest.mark.parametrize("name", ["softcap", "scale"])
def test_losses_are_of_the_models_own_logits(name):
    torch.manual_seed(0)
    if name == "softcap":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.5))
    else:
        model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))
    ids = (torch.arange(6) * 7 % 97).tolist()
    data = [{"input_ids": ids, "labels": list(ids)} for _ in range(2)]
    data[1]["labels"][:3] = [-100] * 3
    batch = default_data_collator(data)
    with torch.no_grad():
        losses = shifted_losses(model.eval()(batch["input_ids"]).logits, batch["labels"])
    expected = losses.sum(1) / torch.tensor([5.0, 3.0])
    torch.testing.assert_close(sample_losses(data, model, default_data_collator), expected)


def test_modules_in_eval_mode_that_are_trained_keep_their_weights(tiny_model_dir, plain):
    """Dropout may be off in training; without gradients it is an evaluation."""
    batch = {name: torch.tensor([plain[0][name]]) for name in ("input_ids", "labels")}
    model = use_weighted_loss(new_model(tiny_model_dir)).eval()
    batch["sample_weight"] = torch.tensor([0.25])
    weighted = model(**batch).loss
    with torch.no_grad():
        torch.testing.assert_close(weighted, 0.25 * model(**batch).loss, rtol=1e-5, atol=0)
