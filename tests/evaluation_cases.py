"""Rows to evaluate on, and the plain loop that evaluations are checked against."""

import json

import torch
from flow_finetune import evaluate as evaluation
from flow_finetune.config import TaskConfig
from flow_finetune.models import CausalLM
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

TEXT = "The answer is 12. The question is how many apples are in the basket? Anna takes 3 of them, naïve as ever. " * 6
QA = [
    {"question": "How many apples" + " in the basket" * n, "answer": f"There are {n}.\n#### {n},000"} for n in range(7)
]
MC = [
    {"context": "Question: Which of these?\nAnswer:", "choices": [" the first choice of them all", " b", " answer"], "answer": 1},
    {"context": "Question: the answe", "choices": ["r is 9", "ring machine is the best answer"], "answer": 1},
    {"context": "", "choices": ["Anna takes apples.", "Anna takes apple."], "answer": 0},
    {"context": "Is it naïve", "choices": [" or ïïï", " or not at all, the question is", " the basket"], "answer": 2},
    {"context": "Which?", "choices": [" a", " the answer is 12", " response that completes", " 3"], "answer": 3},
    {"context": "The answer is", "choices": [" 12 - 3 = 9", " no"], "answer": 1},
    {"context": "The best", "choices": [" instruction", " question of the task", " 9"], "answer": 0},
]  # fmt: skip


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa_task(source, **options) -> TaskConfig:
    return TaskConfig("qa", source, role="target", prompt_field="question", response_field="answer", **options)


def run(tiny, configs, output, **options) -> dict:
    lm, tokenizer = tiny
    return evaluation.evaluate(lm, tokenizer, configs, output, **{"precision": "full", "batch_tokens": 300, **options})


def metrics_of(result, name) -> dict:
    return next(task for task in result["tasks"] if task["name"] == name)["metrics"]


@torch.no_grad()
def target_log_probabilities(lm, ids, start) -> tuple[list[float], list[bool]]:
    """Log-probability of each of `ids[start:]` and whether it is the most likely token, one sequence at a time."""
    logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double()
    rows = logits.log_softmax(-1)
    return (
        [float(rows[i - 1, ids[i]]) for i in range(start, len(ids))],
        [int(rows[i - 1].argmax()) == ids[i] for i in range(start, len(ids))],
    )


def sliding_window_model() -> CausalLM:
    """A random Gemma 3 whose layers see 6 tokens or all, with a soft-cap on its logits."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, final_logit_softcapping=3.0, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=8,
    )  # fmt: skip
    return CausalLM(Gemma3ForCausalLM(config).eval())
