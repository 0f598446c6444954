"""A random two-layer Llama and its byte-level tokenizer, small enough to be run on every token in a plain loop.

Beside it a model with a vision part.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_SPECIALS = ["<pad>", "<s>", "</s>"]
_TRAINING_TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Response:",
    "The question is how many apples are in the basket after Anna takes 3 of the 12. The answer is 12 - 3 = 9. #### 9",
    "Question: Which of these is the best answer? Answer: the first choice, the second choice, the third choice.",
] * 4


def build(directory: Path, *, bos: bool, tied: bool = False) -> Path:
    """Save model and tokenizer (with or without a BOS in front of every text) into `directory`; returns it.

    The same seed every time. With `tied` the head shares its matrix with the embeddings. The head is large enough for
    peaked predictions, so an error in a position shows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 3
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def with_vision(**text_config) -> PreTrainedModel:
    """A random Gemma 3 with a vision part of one layer."""
    config = AutoConfig.for_model(
        "gemma3", mm_tokens_per_image=1, image_token_index=5, boi_token_index=6, eoi_token_index=7,
        text_config={**text_config, "head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)
