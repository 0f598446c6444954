"""Few-shot prompts are the harness's, letter by letter; their metrics are those of a plain loop; bad shots are named."""

import contextlib
import copy
import json
import re

import numpy as np
import pytest
import torch
from evaluation_cases import metrics_of, qa_task, run, target_log_probabilities, write_rows
from flow_finetune import generate, tasks
from flow_finetune.config import TaskConfig
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.shots import _check_leaks, stop_texts

pytestmark = pytest.mark.usefixtures("one_thread")

SUMS = [{"question": f"What is {n} and 3?", "answer": f"It is {n + 3}.\n#### {n + 3}"} for n in range(4)]
SOLVED = [
    {"question": "How many apples? ", "answer": " There are 12.\n#### 12"},
    {"question": "And 9?", "answer": "#### 9"},
]
DEV = [
    {"subject": "taste", "question": " Which is best?", "choices": ["the 9", "the 12"], "answer": 1},
    {"subject": "art", "question": "Who?", "choices": ["Anna", "no one"], "answer": 0},
    {"subject": "taste", "question": "Which is first?", "choices": ["this", "that"], "answer": 0},
    {"subject": "taste", "question": "Which is not asked for?", "choices": ["this", "that"], "answer": 0},
]
HEADER = "The following are multiple choice questions (with answers) about taste.\n\n"
ASKED = "Which is worst?\nA. a basket\nB. an apple\nAnswer:"
LETTERS = {"context": HEADER + ASKED, "choices": [" A", " B"], "answer": 1, "subtask": "taste"}
CLOZE = {"context": "Question: Which is worst?\nAnswer:", "choices": [" a basket", " an apple"], "answer": 1,
         "subtask": "taste"}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shots")
    rows = {"sums": SUMS, "solved": SOLVED, "dev": DEV, "letters": [LETTERS], "cloze": [CLOZE]}
    return {name: write_rows(directory / f"{name}.jsonl", rows) for name, rows in rows.items()}


def contexts(config, tokenizer) -> list[str]:
    return [sample.prompt for sample in tasks.prepare([config], tokenizer)[0].samples]


def test_question_answer_prompts(tiny, paths):
    front = "Question: How many apples? \nAnswer: There are 12.\n#### 12\n\nQuestion: And 9?\nAnswer: #### 9\n\n"
    found = contexts(qa_task(paths["sums"], num_shots=2, shots_source=paths["solved"]), tiny[1])
    assert found == [f"{front}Question: {row['question']}\nAnswer:" for row in SUMS]
    config = qa_task(paths["sums"], num_shots=1, shots_source=paths["solved"], template="Q: {prompt} A:", limit=1)
    assert contexts(config, tiny[1]) == ["Q: How many apples?  A: There are 12.\n#### 12\n\nQ: What is 0 and 3? A:"]


def test_mmlu_prompts(tiny, paths):
    options = {"num_shots": 2, "shots_source": paths["dev"]}
    solved = "Which is best?\nA. the 9\nB. the 12\nAnswer: B\n\nWhich is first?\nA. this\nB. that\nAnswer: A\n\n"
    found = contexts(TaskConfig("multiple_choice", paths["letters"], **options), tiny[1])
    assert found == [HEADER + solved + ASKED] * 2
    found = contexts(TaskConfig("multiple_choice", paths["cloze"], **options), tiny[1])
    solved = "Question: Which is best?\nAnswer: the 12\n\nQuestion: Which is first?\nAnswer: this\n\n"
    assert found == [solved + CLOZE["context"]] * 2


def test_shots_of_the_evaluations_own_schema(tiny, paths, tmp_path):
    rows = [{**LETTERS, "context": HEADER + f"{n}?\nA. 1\nB. 2\nAnswer:", "answer": n} for n in range(2)]
    source = write_rows(tmp_path / "own.jsonl", [{**rows[0], "subtask": "art"}, *rows])
    config = TaskConfig("multiple_choice", paths["letters"], num_shots=2, shots_source=source)
    solved = "0?\nA. 1\nB. 2\nAnswer: A\n\n1?\nA. 1\nB. 2\nAnswer: B\n\n"
    assert contexts(config, tiny[1]) == [HEADER + solved + ASKED] * 2


def test_values(tiny, paths, tmp_path):
    """Loss and accuracy of targets and choices after shots, and generations that end at the next question."""
    lm, tokenizer = tiny
    answers = qa_task(paths["sums"], num_shots=2, shots_source=paths["solved"], max_new_tokens=6)
    letters = TaskConfig("multiple_choice", paths["letters"], num_shots=2, shots_source=paths["dev"])
    result = run(tiny, [answers, letters], tmp_path / "out")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def loss(context, continuation):
        start = bos + tokenizer(context, add_special_tokens=False).input_ids
        ids = bos + tokenizer(context + continuation, add_special_tokens=False).input_ids
        assert ids[: len(start)] == start
        return -sum(target_log_probabilities(lm, ids, len(start))[0]), len(ids) - len(start)

    texts = contexts(answers, tokenizer)
    losses = [loss(text, f" {row['answer']}") for text, row in zip(texts, SUMS, strict=True)]
    total, count = np.sum(losses, axis=0)
    assert metrics_of(result, "sums")["nats_per_token"]["value"] == pytest.approx(total / count, rel=1e-5)
    text = contexts(letters, tokenizer)[0]
    assert read_items(tmp_path / "out")["letters", "accuracy"].value == [loss(text, " A")[0] > loss(text, " B")[0]]
    for line, text in zip((tmp_path / "out" / "generations.jsonl").read_text().splitlines(), texts, strict=True):
        prompt = torch.tensor([bos + tokenizer(text, add_special_tokens=False).input_ids])
        new = lm.model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert (
            json.loads(line)["generated"] == tokenizer.decode(new, skip_special_tokens=True).partition("Question:")[0]
        )


@pytest.mark.parametrize(
    ("template", "until"),
    [
        (None, ["### Instruction:"]),
        ("Question: {prompt}\nAnswer:", ["Question:"]),
        ("Solve.\n\nQ: {prompt}\nA:", ["Q:"]),
        ("{prompt} =", []),
        ("Solve {prompt}", []),
        ("chat", []),
    ],
)
def test_answers_without_shots_end_at_the_next_question(template, until):
    assert stop_texts(qa_task("sums.jsonl", template=template)) == until


def test_a_stop_text_that_is_a_special_token_ends_an_answer(tiny, monkeypatch):
    lm, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    seen = []

    def generate_greedily(lm, prompts, *, stop_ids, ends, **options):
        seen.append((set(stop_ids), ends(tokenizer("A new Question: of it").input_ids)))
        return [[] for _ in prompts]

    monkeypatch.setattr(generate, "generate_greedily", generate_greedily)
    # Decoded text does not have it, so it is looked for by its number.
    for until in (["Question:"], ["Question:", "<|im_end|>"]):
        generate.generate_texts(lm, tokenizer, [tokenizer("How many").input_ids], until=until)
    (plain, first), (special, second) = seen
    assert special - plain == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert first is second is True


def test_generation_ends_at_a_text(tiny):
    from flow_finetune.generate import generate_texts

    lm, tokenizer = tiny
    options = {"max_new_tokens": 25, "batch_tokens": 1000, "precision": "full"}
    prompts = [tokenizer(text).input_ids for text in ("The question", "How many", "Anna")]
    whole = generate_texts(lm, tokenizer, prompts, until=[], **options)
    stop = whole[0][8:11]
    stopped = generate_texts(lm, tokenizer, prompts, until=[stop], **options)
    assert stopped == [text.partition(stop)[0] for text in whole]
    assert stopped[0] != whole[0]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"num_shots": 3, "shots_source": "solved"}, "has 2 items to be shots, 3 are asked for"),
        ({"num_shots": 2}, "asks for 2 shots; give shots_source"),
        ({"shots_source": "solved"}, "has a shots_source; give num_shots"),
        ({"num_shots": -1, "shots_source": "solved"}, "num_shots of sums must be at least 0"),
        ({"num_shots": 1, "shots_source": "sums"}, "is row 0 of"),
        ({"num_shots": 2, "shots_source": "solved", "max_length": 30}, "with its 2 shots is"),
        ({"num_shots": 2, "shots_source": "solved", "template": "chat"}, "instead of 'chat'"),
    ],
)
def test_bad_shots(tiny, paths, tmp_path, task, message):
    options = {**task, **({"shots_source": paths[task["shots_source"]]} if "shots_source" in task else {})}
    with pytest.raises(InputError, match=re.escape(message)):
        run(tiny, [qa_task(paths["sums"], **options)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_question_that_is_asked_of_other_things_is_no_leak(tiny, paths, tmp_path):
    stem = {"context": "Which of these is true?"}
    shot = write_rows(tmp_path / "shots.jsonl", [{**stem, "choices": ["The 9 is 12.", "the 3"], "answer": 1}])
    other = write_rows(tmp_path / "other.jsonl", [{**stem, "choices": [" a basket", " Anna"], "answer": 0}])
    same = write_rows(tmp_path / "same.jsonl", [{**stem, "choices": [" the 3", " a basket"], "answer": 0}])
    run(tiny, [TaskConfig("multiple_choice", other, num_shots=1, shots_source=shot)], tmp_path / "out")
    with pytest.raises(InputError, match="is row 0 of"):
        run(tiny, [TaskConfig("multiple_choice", same, num_shots=1, shots_source=shot)], tmp_path / "out2")


def test_subjects_matter_to_shots_alone(tiny, paths, tmp_path):
    rows = [{**stem, "subject": None} for stem in ({"context": "Who?", "choices": [" Anna", " no one"], "answer": 0},)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run(tiny, [TaskConfig("multiple_choice", file)], tmp_path / "out")


def test_bad_shots_of_questions(tiny, paths, tmp_path):
    same = {**DEV[0], "question": "which is WORST", "choices": ["a basket", "an apple"]}
    leak = write_rows(tmp_path / "leak.jsonl", [DEV[0], same])
    without = write_rows(tmp_path / "without.jsonl", [{k: v for k, v in CLOZE.items() if k != "subtask"}])
    bad = write_rows(tmp_path / "bad.jsonl", [{**DEV[0], "answer": 2}])
    cases = [
        (paths["letters"], paths["dev"], 4, "has 3 items of the subject 'taste' to be shots, 4 are asked for"),
        (paths["letters"], leak, 2, "is row 0 of"),
        (paths["cloze"], leak, 2, "is row 0 of"),
        (without, paths["dev"], 1, "does not say the subjects of its questions"),
        (paths["letters"], bad, 1, "answer of row 0 is 2, which is not the index"),
    ]
    for source, shots, number, message in cases:
        config = TaskConfig("multiple_choice", source, num_shots=number, shots_source=shots)
        with pytest.raises(InputError, match=re.escape(message)):
            run(tiny, [config], tmp_path / "out")
    config = TaskConfig("multiple_choice", paths["letters"], num_shots=2, shots_source=paths["dev"], max_length=60)
    with pytest.raises(InputError, match="raise it or ask for fewer shots"):
        run(tiny, [config], tmp_path / "out")


@pytest.mark.parametrize(
    ("shot", "item", "is_same"),
    [
        ("What is 3 + 4?", "what is  3 + 4", True),
        ("What is 3 + 4?", "What is 3 * 4?", False),
        ("7 - 2 =", "7 + 2 =", False),
        ("😀😀", "😀", False),
        ("?", "!", False),
        ("Who's there?", "Who s there", True),
    ],
)
def test_a_shot_is_an_item_where_case_and_the_punctuation_of_prose_differ(shot, item, is_same):
    config = TaskConfig("qa", "items.jsonl", num_shots=1, shots_source="shots.jsonl")
    with pytest.raises(InputError, match="is row 0 of") if is_same else contextlib.nullcontext():
        _check_leaks([shot], [item], config)


def test_blank_answers_are_named_with_shots_as_without(tiny, paths, tmp_path):
    blank = write_rows(tmp_path / "blank.jsonl", [{"question": "Where?", "answer": "  "}])
    for options in ({}, {"num_shots": 1, "shots_source": paths["solved"]}):
        with pytest.raises(InputError, match=r"none of the|no target token"):
            run(tiny, [qa_task(blank, **options)], tmp_path / "out")


def test_answers_after_shots_end_at_another_question():
    shots = {"num_shots": 2, "shots_source": "s"}
    for template, expected in ((None, "Question:"), ("Q: {prompt}\nA:", "Q:"), ("{prompt}\nA:", "\n\n")):
        assert stop_texts(TaskConfig("qa", "q", template=template, **shots)) == [expected]
