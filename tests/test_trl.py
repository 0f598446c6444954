"""TRL's SFTTrainer with weights: its data preparation, our loss, and the steps that follow from both."""

import datasets
import pytest
import torch
from flow_finetune.errors import InputError
from tokenised_rows import new_model, shifted_losses
from transformers import AutoTokenizer, DataCollatorForSeq2Seq
from trl import SFTConfig

from flow_finetune.integrations.trl import WeightedSFTTrainer  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"prompt": f"How many are {i} and {i}?" * (1 + i % 3), "completion": f" It is {2 * i}." * (1 + i % 4)}
    for i in range(8)
]


def trainer(model_dir, output, rows=ROWS, model=None, config=None, **options):
    arguments = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": None, "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optim": "sgd",
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    return WeightedSFTTrainer(
        new_model(model_dir) if model is None else model,
        args=SFTConfig(output_dir=str(output), **{**arguments, **(config or {})}),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(model_dir),
        **options,
    )  # fmt: skip


def losses_of(trained):
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def sums_of(model, row):
    """A prepared row's summed loss and its number of targets."""
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    nll = shifted_losses(model(ids).logits, labels)
    return nll.sum(), int((labels[:, 1:] != -100).sum())


def test_steps_are_those_of_the_weighted_loss(tiny_model_dir, tmp_path):
    made = trainer(tiny_model_dir, tmp_path)
    model = new_model(tiny_model_dir)
    rows = list(made.train_dataset)
    with torch.no_grad():
        means = torch.stack([total / count for total, count in (sums_of(model, row) for row in rows)])
    weights = torch.exp(-means.double() / means.double().quantile(0.5))
    torch.testing.assert_close(torch.tensor([r["sample_weight"] for r in rows]).double(), weights, rtol=1e-4, atol=0)
    assert any(label == -100 for label in rows[0]["labels"]), "TRL masks the prompt"
    made.train()
    expected = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(2):
        sums = [sums_of(model, row) for row in rows[4 * step : 4 * step + 4]]
        count = sum(count for _, count in sums)
        loss = (
            sum(w * total for w, (total, _) in zip(weights[4 * step : 4 * step + 4].float(), sums, strict=True)) / count
        )
        expected.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses_of(made) == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(model.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)


def test_samples_end_to_end_without_padding_take_the_same_steps(tiny_model_dir, tmp_path):
    padded = trainer(tiny_model_dir, tmp_path)
    flat = trainer(tiny_model_dir, tmp_path, config={"padding_free": True})
    padded.train()
    flat.train()
    assert losses_of(flat) == pytest.approx(losses_of(padded), rel=1e-4)


def test_adapters_train_and_weights_are_those_of_the_model_below_them(tiny_model_dir, tmp_path):
    from peft import LoraConfig

    plain = trainer(tiny_model_dir, tmp_path)
    adapted = trainer(
        tiny_model_dir, tmp_path,
        peft_config=LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert adapted.train_dataset["sample_weight"][:] == pytest.approx(plain.train_dataset["sample_weight"][:], rel=1e-5)
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    adapted.train()
    moved = {n for n, p in adapted.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert all("lora_" in name for name in moved)


def test_weights_of_ones_own_and_an_evaluation_without(tiny_model_dir, tmp_path):
    weighted = [{**row, "sample_weight": 0.5 + i} for i, row in enumerate(ROWS)]
    made = trainer(
        tiny_model_dir, tmp_path, weighted, loss_options={"z_loss": 0.0}, eval_dataset=datasets.Dataset.from_list(ROWS)
    )
    assert made.train_dataset["sample_weight"][:] == [0.5 + i for i in range(8)]
    model = new_model(tiny_model_dir)
    with torch.no_grad():
        sums = [sums_of(model, row) for row in made.train_dataset]
    by_batch = [sum(s for s, _ in sums) / sum(c for _, c in sums)]
    found = made.evaluate()["eval_loss"]
    assert made.args.per_device_eval_batch_size >= 8
    assert found == pytest.approx(float(by_batch[0]), rel=1e-4)


def test_a_collator_that_pads_sees_what_trainer_shows_it(tiny_model_dir, tmp_path):
    """TRL leaves the texts in its data, which Trainer hides from the collator."""
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(tiny_model_dir))
    made, plain = trainer(tiny_model_dir, tmp_path, data_collator=collator), trainer(tiny_model_dir, tmp_path)
    assert {"prompt", "completion", "sample_weight"} <= set(made.train_dataset.column_names)
    assert made.train_dataset["sample_weight"][:] == pytest.approx(plain.train_dataset["sample_weight"][:], rel=1e-5)
    made.train()
    plain.train()
    assert losses_of(made) == pytest.approx(losses_of(plain), rel=1e-4)


def test_evaluation_data_that_lack_their_labels_are_refused_as_by_trl(tiny_model_dir, tmp_path):
    prepared = trainer(tiny_model_dir, tmp_path).train_dataset
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in prepared]
    made = trainer(tiny_model_dir, tmp_path, rows, config={"dataset_kwargs": {"skip_prepare_dataset": True}})
    masked = [
        {"input_ids": row["input_ids"], "completion_mask": [int(n != -100) for n in row["labels"]]} for row in rows
    ]
    with pytest.raises(ValueError, match="mask columns but no 'labels'"):
        made.evaluate(datasets.Dataset.from_list(masked))
    assert made.evaluate(datasets.Dataset.from_list(rows))["eval_loss"] > 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"packing": True, "max_length": 64}, {}, "packing puts samples together"),
        ({"loss_type": "dft"}, {}, "stands for loss_type 'nll'"),
        ({"label_smoothing_factor": 0.1}, {}, "give label_smoothing in loss_options"),
        ({}, {"rows": [{**row, "sample_weight": 1.0} for row in ROWS], "weight_options": {"quantile": 0.9}}, "change nothing"),
        ({}, {"compute_metrics": dict}, "compute_metrics would not be called, as the weighted loss makes no logits"),
    ],
)  # fmt: skip
def test_what_would_lose_the_weights_is_refused(tiny_model_dir, tmp_path, config, options, message):
    with pytest.raises(InputError, match=message):
        trainer(tiny_model_dir, tmp_path, config=config, **options)
