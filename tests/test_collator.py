"""Weights follow samples through collators that do not know them: packed rows, padded ones, one weight per token."""

import pytest
import torch
from flow_finetune.errors import InputError
from flow_finetune.integrations import KeepWeights, use_weighted_loss
from test_trainer import LogitsTrainer, assert_same_parameters, losses_of, trained
from tokenised_rows import new_model, padding, rows
from transformers import DataCollatorWithFlattening, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weighted(tiny_model_dir, qa_file):
    plain = rows(tiny_model_dir, qa_file)
    return plain.add_column("sample_weight", torch.linspace(0.1, 2.0, len(plain)).numpy())


def features(data, count, keys=("input_ids", "attention_mask", "labels", "sample_weight")):
    return [{key: data[i][key] for key in keys} for i in range(count)]


def test_weights_of_tokens_need_tokens():
    def tokenising(rows):
        return {"labels": torch.zeros(1, 4, dtype=torch.int64)}

    with pytest.raises(InputError, match="row 0 has no input_ids; tokenise rows"):
        KeepWeights(tokenising)([{"text": "a b", "sample_weight": 1.0}] * 2)


def test_rows_that_were_joined_without_a_weight_are_named(tiny_model_dir, weighted):
    """Data sets that are put end to end get None where one of them lacks the column."""
    found = features(weighted, 3)
    found[1]["sample_weight"] = None
    with pytest.raises(InputError, match="1 of 3 rows have no sample_weight"):
        KeepWeights(padding(tiny_model_dir))(found)


def test_the_tokenizer_of_the_collator_is_found_for_checkpoints(tiny_model_dir):
    collator = padding(tiny_model_dir)
    assert KeepWeights(collator).tokenizer is collator.tokenizer
    assert not hasattr(KeepWeights(DataCollatorWithFlattening()), "tokenizer")


def test_packed_rows_take_the_steps_of_padded_ones(tiny_model_dir, weighted, tmp_path):
    expected, model = (new_model(tiny_model_dir) for _ in range(2))
    padded = trained(LogitsTrainer, expected, weighted, padding(tiny_model_dir), tmp_path / "a")
    packing = KeepWeights(DataCollatorWithFlattening())
    packed = trained(Trainer, use_weighted_loss(model), weighted, packing, tmp_path / "b")
    assert losses_of(packed) == pytest.approx(losses_of(padded), rel=1e-5)
    assert_same_parameters(model, expected)


def test_a_packed_row_has_each_samples_weight_at_its_labels(weighted):
    found = features(weighted, 3)
    batch = KeepWeights(DataCollatorWithFlattening())(found)
    assert batch["sample_weight"].shape == batch["labels"].shape == batch["input_ids"].shape
    expected = [row["sample_weight"] for row in found for _ in row["input_ids"]]
    assert batch["sample_weight"][0].tolist() == pytest.approx(expected)
    assert found == features(weighted, 3), "the rows are the caller's"


@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_per_token_are_padded_as_their_tokens_are(tiny_model_dir, weighted, side):
    collator = padding(tiny_model_dir)
    collator.tokenizer.padding_side = side
    found = features(weighted, 4, ("input_ids", "attention_mask", "labels"))
    # A weight that says where it belongs: its token's own number.
    batch = KeepWeights(collator)([{**row, "sample_weight": [float(i) for i in row["input_ids"]]} for row in found])
    present = batch["attention_mask"] == 1
    assert len({len(row["input_ids"]) for row in found}) > 1
    assert torch.equal(batch["sample_weight"][present], batch["input_ids"][present].float())
    assert not batch["sample_weight"][~present].any()


def test_rows_may_be_tokenised_by_the_collator(tiny_model_dir, weighted):
    padded = padding(tiny_model_dir)
    tokens = features(weighted, 3, ("input_ids", "labels"))
    collator = KeepWeights(lambda rows: padded([tokens[row["text"]] for row in rows]))
    batch = collator([{"text": i, "sample_weight": 0.5 * i} for i in range(3)])
    assert batch["sample_weight"].tolist() == [0.0, 0.5, 1.0]


def test_one_number_a_row_stays_one_and_an_evaluation_has_none(tiny_model_dir, weighted):
    collator = KeepWeights(padding(tiny_model_dir))
    found = features(weighted, 3)
    assert collator(found)["sample_weight"].tolist() == pytest.approx([row["sample_weight"] for row in found])
    assert "sample_weight" not in collator(features(weighted, 3, ("input_ids", "labels")))


def test_weights_that_fit_no_sample_are_refused(tiny_model_dir, weighted):
    found = features(weighted, 3)
    packing = KeepWeights(DataCollatorWithFlattening())
    with pytest.raises(InputError, match="1 of 3 rows have no sample_weight"):
        packing([*found[:2], {k: v for k, v in found[2].items() if k != "sample_weight"}])
    with pytest.raises(InputError, match=r"row 1 has 2 weights for \d+ tokens"):
        packing([found[0], {**found[1], "sample_weight": [1.0, 2.0]}])
    with pytest.raises(InputError, match=r"labels of shape \(2, 8\) of 3 samples"):
        KeepWeights(lambda rows: {"labels": torch.zeros(2, 8)})(found)
    no_mask = KeepWeights(lambda rows: {"labels": torch.zeros(3, 1000)})
    with pytest.raises(InputError, match="no attention_mask, which says on which side"):
        no_mask([{**row, "sample_weight": [1.0] * len(row["input_ids"])} for row in found])
    cut = KeepWeights(lambda rows: {"labels": torch.zeros(3, 8), "attention_mask": torch.ones(3, 8)})
    with pytest.raises(InputError, match=r"row 0 has \d+ weights, and its batch 8 tokens"):
        cut([{**row, "sample_weight": [1.0] * len(row["input_ids"])} for row in found])
