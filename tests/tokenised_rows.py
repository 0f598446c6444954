"""A tiny model's tokenised data set as transformers.Trainer takes it, and the loss written out from logits."""

from pathlib import Path

import datasets
import torch
from flow_finetune.config import DataConfig, ModelConfig
from flow_finetune.data import load_samples
from flow_finetune.models import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq


def rows(model_dir: Path, qa_file: Path) -> datasets.Dataset:
    """Samples of very different lengths; the prompt has no labels."""
    _, tokenizer = load_model(ModelConfig(str(model_dir), device="cpu"))
    data = DataConfig(str(qa_file), prompt_field="question", response_field="answer")
    samples = load_samples(data, tokenizer).samples
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": s.input_ids.tolist(),
                "attention_mask": [1] * len(s.input_ids),
                "labels": [-100] * s.start + s.input_ids[s.start :].tolist(),
                "id": s.id,
            }
            for s in samples
        ]
    )


def padding(model_dir: Path) -> DataCollatorForSeq2Seq:
    """The collator that pads a batch to its longest row."""
    return DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_dir), padding="longest")


def new_model(directory: Path):
    """The saved model in fp32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def shifted_losses(logits, labels):
    """Loss of every label but the first, `[B, T - 1]`, 0 where it is ignored."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
