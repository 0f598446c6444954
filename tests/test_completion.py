"""Completions against plain loops over the full logits of a tiny model."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from evaluation_cases import metrics_of, run, target_log_probabilities, write_rows
from flow_finetune.config import TaskConfig
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.tasks import prepare
from tokenizers.processors import TemplateProcessing

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"context": "How many apples are in the", "target": " basket"},
    {"context": "Is it naïve", "target": " or ïïï, the answer is 12"},
    {"context": "def a():\n", "target": "    return 3\n"},
    {"context": "", "target": "The answer is 9."},
]


def completion(source, **options) -> TaskConfig:
    return TaskConfig("completion", source, prompt_field="context", response_field="target", **options)


def test_completion(tiny, tmp_path):
    lm, tokenizer = tiny
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = list(ROWS)
    # What the model itself goes on with, so that one is right; the text must give the same tokens when read again.
    for text in ("The question", "Which of these", "Anna takes", "The first choice", "answer", "The 12"):
        ids = bos + tokenizer(text, add_special_tokens=False).input_ids
        new = lm.model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0].tolist()
        whole = tokenizer.decode(new[len(bos) :])
        if bos + tokenizer(whole, add_special_tokens=False).input_ids == new and whole.startswith(text):
            rows.append({"context": text, "target": whole[len(text) :]})
    assert len(rows) > len(ROWS)
    result = run(tiny, [completion(write_rows(tmp_path / "words.jsonl", rows))], tmp_path / "out")
    losses, counts, right = [], [], []
    for row in rows:
        whole = tokenizer(row["context"] + row["target"], add_special_tokens=False).input_ids
        # No token of these rows holds the end of a context and the start of its target.
        start = len(tokenizer(row["context"], add_special_tokens=False).input_ids)
        assert tokenizer.decode(whole[start:]) == row["target"]
        front = bos or ([] if start else [tokenizer.eos_token_id])
        log_probabilities, is_right = target_log_probabilities(lm, front + whole, len(front) + start)
        losses.append(-sum(log_probabilities))
        counts.append(len(whole) - start)
        right.append(all(is_right))
    num_bytes = [len(row["target"].encode()) for row in rows]
    assert 0 < sum(right) < len(rows)
    metrics = metrics_of(result, "words")
    assert metrics["nats_per_token"]["value"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert metrics["nats_per_byte"]["value"] == pytest.approx(sum(losses) / sum(num_bytes), rel=1e-5)
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean(right))
    items = read_items(tmp_path / "out")
    np.testing.assert_array_equal(items["words", "nats_per_byte"].weight, num_bytes)
    assert items["words", "accuracy"].value.tolist() == right


def test_template(tiny, tmp_path):
    source = write_rows(tmp_path / "words.jsonl", ROWS[:2])
    wrapped = [{**row, "context": f"Question: {row['context']}\nAnswer:"} for row in ROWS[:2]]
    other = write_rows(tmp_path / "wrapped.jsonl", wrapped)
    result = run(tiny, [completion(source, template="Question: {prompt}\nAnswer:"), completion(other)], tmp_path / "o")
    first, second = (task["metrics"] for task in result["tasks"])
    assert first == second
    assert json.loads((tmp_path / "o" / "evaluation.json").read_text())["tasks"][0]["kind"] == "completion"


def test_a_chat_template_that_writes_the_bos_gets_no_second_one(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}:"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    source = write_rows(tmp_path / "words.jsonl", ROWS[:1])
    for template, text in (("chat", "How many apples are in the:"), ("{prompt}:", "How many apples are in the:")):
        (sample,) = prepare([completion(source, template=template)], tokenizer)[0].samples
        assert sample.input_ids.tolist() == tokenizer(text + ROWS[0]["target"]).input_ids
        assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    # A context that is cut at its beginning keeps the BOS.
    (cut,) = prepare([completion(source, template="chat", max_length=6)], tokenizer)[0].samples
    assert cut.input_ids.tolist() == [tokenizer.bos_token_id, *sample.input_ids[-5:].tolist()]
    assert cut.truncated
    assert cut.num_targets == sample.num_targets


def test_bad_completions(tiny, tmp_path):
    source = write_rows(tmp_path / "words.jsonl", ROWS)
    empty = write_rows(tmp_path / "empty.jsonl", [ROWS[0], {"context": "a", "target": ""}])
    cases = [
        (completion(source, max_length=3), "the response of row 1 alone fills max_length=3"),
        (completion(empty), "'target' of row 1 is empty"),
        (TaskConfig("completion", source), "has no field 'prompt'"),
        (completion(source, num_shots=2), "num_shots of words is for qa, multiple_choice and lm_eval"),
        (TaskConfig("completion"), "evaluation 'completion' lacks its source"),
    ]
    for config, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            run(tiny, [config], tmp_path / "out")
    assert not (tmp_path / "out").exists()
