"""Keep your transformers.Trainer: weights per sample as a column of the data set, and a loss that holds no logits.

Before:  Trainer(model=model, train_dataset=dataset, ...).train()
After:   dataset = add_sample_weights(dataset, model, data_collator)
         Trainer(model=use_weighted_loss(model), train_dataset=dataset, ...).train()

Trains a small random model on made-up sequences.
"""

import tempfile

import torch
from datasets import Dataset
from flow_finetune.integrations import add_sample_weights, use_weighted_loss
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator


def main(epochs: int = 20) -> tuple[float, float]:
    """Returns the weighted loss of the first and of the last step, in nats per target token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    tokens = torch.randint(0, 500, (16, 12))
    labels = tokens.clone()
    labels[:, :4] = -100  # the prompt has no loss
    dataset = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})

    # Once, before training: a column sample_weight with exp(-loss / median loss) of the pre-trained model.
    dataset = add_sample_weights(dataset, model, default_data_collator)

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, num_train_epochs=epochs, per_device_train_batch_size=4, gradient_accumulation_steps=4,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model=use_weighted_loss(model), args=arguments, train_dataset=dataset, data_collator=default_data_collator
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses[0], losses[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"weighted loss {first:.3f} -> {last:.3f} nats/token")
