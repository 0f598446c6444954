"""Generation against transformers, and which answers are right."""

import copy
import re

import numpy as np
import pytest
import torch
from evaluation_cases import TEXT, sliding_window_model
from flow_finetune import generate
from flow_finetune.config import TaskConfig
from flow_finetune.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generation_of_a_sliding_window_model():
    sliding = sliding_window_model()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 97, n) for n in (2, 5, 9, 30)]
    expected = [
        sliding.model.generate(torch.tensor(p)[None], max_new_tokens=15, do_sample=False, eos_token_id=-1)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    found = generate.generate_greedily(
        sliding, prompts, stop_ids=[-1], pad_id=0, max_new_tokens=15, batch_tokens=1000, precision="no"
    )
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 511, 512, 513, 5000])
def test_the_largest_logit(size, dtype):
    """Of equals the first, as bf16 logits often are; and a NaN, as torch has it."""
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    expected = [max(range(size), key=lambda i: (row[i], -i)) for row in logits.tolist()]
    assert generate._argmax(logits).tolist() == expected
    logits[:, size // 2] = torch.nan
    assert generate._argmax(logits).tolist() == [size // 2] * 64


@pytest.mark.parametrize("batch_tokens", [1, 60, 1000])
def test_generation_is_that_of_transformers(tiny, batch_tokens):
    lm, tokenizer = tiny
    texts = ["The", "How many apples are in", TEXT[:90], "#### 9", "Anna takes 3 of the 12", "? ?", TEXT[10:60]]
    prompts = [tokenizer(text).input_ids for text in texts]

    def alone(stop):
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            new = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=stop
            )[0, len(prompt) :].tolist()
            found.append(new[: new.index(stop)] if stop in new else new)
        return found

    # A stop token that ends some sequences early, at different steps, and lets others go on.
    unstopped = alone(-1)
    stop = max(
        sorted({t for u in unstopped for t in u}),
        key=lambda token: len({u.index(token) for u in unstopped if token in u}),
    )
    expected = alone(stop)
    assert len({len(e) for e in expected}) >= 3
    found = generate.generate_greedily(
        lm, prompts, stop_ids=[stop], pad_id=0, max_new_tokens=20, batch_tokens=batch_tokens, precision="full"
    )
    assert found == expected


PATTERN = re.compile(TaskConfig("qa", "x").answer_pattern)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 3\n#### 1,234", "1234"), ("####12.50.", "12.50"), ("#### -7", "-7"), ("so 4 #### none", None), ("", None)
    ],
)  # fmt: skip
def test_answers_by_pattern(text, answer):
    assert generate.extract_answer(text, PATTERN) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 3 of 9", "3"), ("from 3 to $1,234.50.", "1234.50"), ("12-3", "3"), ("it is -3", "-3"), ("x=5, y=6,", "6"),
        ("none", None), ("it is .5", ".5"), ("it lost -$5", "-5"), ("\u22125", "-5"), ("(7)-3", "3"), ("is ...5", "5"),
    ],
)  # fmt: skip
def test_answers_by_last_number(text, answer):
    assert generate.extract_answer(text, PATTERN, or_last_number=True) == answer


def test_same_answer():
    assert generate.same_answer("3.0", "3")
    assert generate.same_answer("yes", "yes")
    assert not generate.same_answer("3", "4")
    assert not generate.same_answer(None, None)
    assert not generate.same_answer("3", "three")
    assert generate.same_answer("nan", "nan")
    assert not generate.same_answer("inf", "Infinity")
    assert not generate.same_answer("NaN", "nan")


@pytest.mark.parametrize("continues", [True, False])
def test_a_batch_holds_no_more_than_it_says(tiny, monkeypatch, continues):
    lm, tokenizer = tiny
    monkeypatch.setattr(generate, "continues_contexts", lambda lm: continues)
    prompts = [np.arange(3, 8 + n % 3) for n in range(40)]
    options = {"stop_ids": [-1], "pad_id": tokenizer.pad_token_id, "precision": "full"}
    sizes, body = [], lm.model.base_model
    forward = body.forward

    def seen(*args, **inputs):
        sizes.append(inputs["attention_mask"].numel())
        return forward(*args, **inputs)

    monkeypatch.setattr(body, "forward", seen)
    found = generate.generate_greedily(lm, prompts, max_new_tokens=30, batch_tokens=100, **options)
    # Keys and values are kept of all tokens; what runs again goes through the model whole.
    assert max(sizes) <= (800 if continues else 100)
    assert max(sizes) > (700 if continues else 60)
    sizes.clear()
    assert found == generate.generate_greedily(lm, prompts, max_new_tokens=30, batch_tokens=10000, **options)
    assert max(sizes) > 1300
    # Short answers: twice the tokens of prompts.
    sizes.clear()
    generate.generate_greedily(lm, prompts, max_new_tokens=1, batch_tokens=100, **options)
    assert 150 < max(sizes) <= 200 if continues else 80 < max(sizes) <= 100


def test_a_model_that_gives_nan_has_no_answers(tiny):
    lm, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    # In one class alone, as the largest of whose neighbours no answer would be told apart from a right one.
    lm.head.weight.data[97] = torch.nan
    with pytest.raises(InputError, match="answering it: the model gives NaN or infinite values; check the model"):
        generate.generate_greedily(
            lm, [np.arange(3, 9)], stop_ids=[-1], pad_id=tokenizer.pad_token_id, max_new_tokens=2, batch_tokens=100,
            precision="full", description="answering it",
        )  # fmt: skip


def test_what_the_models_settings_end_a_text_with(tiny):
    lm, tokenizer = tiny
    kept = lm.model.generation_config.eos_token_id
    try:
        for configured, more in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
            lm.model.generation_config.eos_token_id = configured
            assert generate._stop_ids(lm, tokenizer) == {tokenizer.eos_token_id} | more
    finally:
        lm.model.generation_config.eos_token_id = kept
