"""Every metric against plain loops over the full logits of a tiny model, generation against transformers, bad input."""

import gzip
import itertools
import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_model
import torch
from flow_finetune import choices, generate, tasks
from flow_finetune import evaluate as evaluation
from flow_finetune.config import ModelConfig, TaskConfig
from flow_finetune.data import ALPACA_TEMPLATE, Sample
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.models import CausalLM, load_model
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


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no_bos"])
def tiny(request, tmp_path_factory):
    """Model and tokenizer, with and without a BOS."""
    directory = tiny_model.build(tmp_path_factory.mktemp("tiny") / "model", bos=request.param)
    return load_model(ModelConfig(str(directory), device="cpu", precision="full"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of every kind."""
    directory = tmp_path_factory.mktemp("files")
    paths = {"text": directory / "text.txt", "qa": directory / "sums.jsonl", "mc": directory / "choices.jsonl.gz"}
    paths["text"].write_text(TEXT)
    write_rows(paths["qa"], QA)
    paths["mc"].write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in MC).encode()))
    return {name: str(path) for name, path in paths.items()}


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


def test_perplexity(tiny, files, tmp_path):
    lm, tokenizer = tiny
    result = run(tiny, [TaskConfig("perplexity", files["text"], window=17)], tmp_path / "out")
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    losses, counts = [], []
    while len(bos + ids) > 1:
        window, ids = bos + ids[: 17 - len(bos)], ids[17 - len(bos) :]
        losses.append(-sum(target_log_probabilities(lm, window, 1)[0]))
        counts.append(len(window) - 1)
    metrics = metrics_of(result, "text")
    mean = sum(losses) / sum(counts)
    assert metrics["nats_per_token"]["value"] == pytest.approx(mean, rel=1e-5)
    assert metrics["nats_per_token"]["num_items"] == len(losses)
    assert counts[-1] != counts[0]
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-5)
    residual = np.array(losses) - mean * np.array(counts)
    error = math.sqrt(len(losses) * residual.var(ddof=1)) / sum(counts)
    assert metrics["nats_per_token"]["standard_error"] == pytest.approx(error, rel=1e-4)
    assert metrics["perplexity"]["standard_error"] == pytest.approx(math.exp(mean) * error, rel=1e-4)
    items = read_items(tmp_path / "out")["text", "nats_per_token"]
    np.testing.assert_allclose(items.value, losses, rtol=1e-5)
    np.testing.assert_array_equal(items.weight, counts)


def test_limit_and_gzip(tiny, files, tmp_path):
    compressed = tmp_path / "same.txt.gz"
    compressed.write_bytes(gzip.compress(TEXT.encode()))
    result = run(
        tiny,
        [
            TaskConfig("perplexity", files["text"], window=17, limit=3),
            TaskConfig("perplexity", str(compressed), window=17),
            TaskConfig("multiple_choice", files["mc"], limit=2, name="few"),
        ],
        tmp_path / "out",
    )
    first, second, third = result["tasks"]
    assert first["num_items"] == 3
    assert third["metrics"]["accuracy"]["num_items"] == 2
    items = read_items(tmp_path / "out")
    np.testing.assert_allclose(
        items["text", "nats_per_token"].value, items["same", "nats_per_token"].value[:3], rtol=1e-5
    )
    assert second["fingerprint"] != first["fingerprint"]


def test_question_answers(tiny, tmp_path):
    lm, tokenizer = tiny
    # Two answers that the model itself would give, so that some tokens are right.
    rows = list(QA)
    for question in ("Which of these?", "The best answer"):
        prompt = tokenizer(ALPACA_TEMPLATE.replace("{prompt}", question), return_tensors="pt").input_ids
        ids = lm.model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        rows.append({"question": question, "answer": tokenizer.decode(ids, skip_special_tokens=True)})
    source = write_rows(tmp_path / "sums.jsonl", rows)
    result = run(tiny, [qa_task(source, max_new_tokens=12, num_generate=4)], tmp_path / "out")
    losses, correct, counts = [], [], []
    for row in rows:
        prompt = tokenizer(ALPACA_TEMPLATE.replace("{prompt}", row["question"])).input_ids
        response = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        log_probabilities, right = target_log_probabilities(lm, prompt + response, len(prompt))
        losses.append(-sum(log_probabilities))
        correct.append(sum(right))
        counts.append(len(response))
    assert 0 < sum(correct) < sum(counts)
    metrics = metrics_of(result, "sums")
    assert metrics["nats_per_token"]["value"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert metrics["token_accuracy"]["value"] == pytest.approx(sum(correct) / sum(counts))
    assert metrics["exact_match"]["num_items"] == 4
    generations = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [g["item"] for g in generations] == ["0", "1", "2", "3"]
    assert [g["expected"] for g in generations] == ["0000", "1000", "2000", "3000"]
    for row, generated in zip(QA, generations, strict=False):
        prompt = torch.tensor([tokenizer(ALPACA_TEMPLATE.replace("{prompt}", row["question"])).input_ids])
        ids = lm.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        assert generated["generated"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_exact_match_counts_right_answers(tiny, files, tmp_path, monkeypatch):
    texts = ["so #### 0", "it is $1,000.", "#### 2,000 or 2000.00", "#### 4,000", "", "5000 #### 7", "#### 6,000.0."]
    monkeypatch.setattr(evaluation, "_answer", lambda lm, tokenizer, task, samples, *rest: texts[: len(samples)])
    result = run(tiny, [qa_task(files["qa"])], tmp_path / "out")
    exact = metrics_of(result, "sums")["exact_match"]
    assert read_items(tmp_path / "out")["sums", "exact_match"].value.tolist() == [1, 1, 1, 0, 0, 0, 1]
    assert exact["value"] == pytest.approx(4 / 7)
    assert exact["standard_error"] == pytest.approx(math.sqrt(4 / 7 * 3 / 7 / 6))


def test_no_generation(tiny, files, tmp_path):
    output = tmp_path / "out"
    run(tiny, [qa_task(files["qa"], num_generate=1, max_new_tokens=2)], output)
    assert (output / "generations.jsonl").exists()
    # Generations of the evaluation that is replaced do not stay behind.
    result = run(tiny, [qa_task(files["qa"], num_generate=0)], output, overwrite=True)
    assert set(metrics_of(result, "sums")) == {"nats_per_token", "token_accuracy"}
    assert not (output / "generations.jsonl").exists()


def test_multiple_choice(tiny, files, tmp_path):
    lm, tokenizer = tiny
    config = TaskConfig("multiple_choice", files["mc"])
    result = run(tiny, [config], tmp_path / "out")
    expected, plain, by_bytes = [], [], []
    for row in MC:
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(row["context"] + choice, add_special_tokens=False).input_ids
            # Characters covered by the first k tokens; these texts split no character at the boundary.
            start = next(k for k in range(len(ids)) if len(tokenizer.decode(ids[: k + 1])) > len(row["context"]))
            front = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
            if tokenizer.bos_token_id is None and row["context"]:
                front = []
            sums.append(sum(target_log_probabilities(lm, front + ids, len(front) + start)[0]))
        expected += sums
        lengths = [len(c.encode()) for c in row["choices"]]
        plain.append(int(np.argmax(sums)) == row["answer"])
        by_bytes.append(int(np.argmax(np.divide(sums, lengths))) == row["answer"])
    # Both metrics are tried: neither is all right or all wrong, and they differ.
    assert 0 < sum(plain) < len(MC)
    assert 0 < sum(by_bytes) < len(MC)
    assert plain != by_bytes
    items = read_items(tmp_path / "out")
    assert items["choices", "accuracy"].value.tolist() == plain
    assert items["choices", "accuracy_bytes"].value.tolist() == by_bytes
    assert metrics_of(result, "choices")["accuracy"]["value"] == pytest.approx(np.mean(plain))
    task = tasks.prepare([config], tokenizer)[0]
    found = evaluation._score(lm, task.groups(), tokenizer.pad_token_id, 100, "full", "choices")
    np.testing.assert_allclose(-found.loss_sum, expected, rtol=1e-5)


def test_contexts_are_run_once(tiny, files):
    lm, tokenizer = tiny
    groups = tasks.prepare([TaskConfig("multiple_choice", files["mc"])], tokenizer)[0].groups()
    assert [len(group) for group in groups] == [len(row["choices"]) for row in MC]
    _, num_tokens = choices.score_choices(lm, groups, tokenizer.pad_token_id)
    # The last token of a context is run with each choice, because it predicts the choice's first.
    once = sum(
        g[0].start - 1 + sum(len(c.input_ids) - c.start + 1 for c in g)
        for g in groups
        if len({c.start for c in g}) == 1
    )
    rest = [g for g in groups if len({c.start for c in g}) > 1]
    assert len(rest) <= 1
    assert num_tokens <= once + sum(len(c.input_ids) for g in rest for c in g)
    assert num_tokens < 0.8 * sum(len(c.input_ids) for g in groups for c in g)


@pytest.fixture(scope="module")
def sliding():
    """A random Gemma 3 whose layers see 6 tokens or all, with a soft-cap on its logits."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, final_logit_softcapping=3.0, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=8,
    )  # fmt: skip
    return CausalLM(Gemma3ForCausalLM(config).eval())


def test_choices_of_a_sliding_window_model(sliding):
    rng = np.random.default_rng(0)
    groups, expected = [], []
    for length in (1, 3, 9, 20, 33):
        context = rng.integers(3, 97, length)
        endings = [rng.integers(3, 97, n) for n in (1, 4, 11)]
        groups.append(
            [Sample("", np.concatenate([context, e]).astype(np.int32), length, "", "", False) for e in endings]
        )
    for sample in itertools.chain.from_iterable(groups):
        expected.append(-sum(target_log_probabilities(sliding, sample.input_ids.tolist(), sample.start)[0]))
    scores, _ = choices.score_choices(sliding, groups, 0)
    np.testing.assert_allclose(scores.loss_sum, expected, rtol=1e-5)


def test_generation_of_a_sliding_window_model(sliding):
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


def test_straddling_token_belongs_to_the_choice(tiny, files):
    _, tokenizer = tiny
    sample = tasks.prepare([TaskConfig("multiple_choice", files["mc"])], tokenizer)[0].samples[3]
    assert sample.id == "1:0"
    assert tokenizer.decode(sample.input_ids[sample.start :]) == " answer is 9"


def test_long_contexts_lose_their_beginning(tiny, tmp_path):
    _, tokenizer = tiny
    source = write_rows(tmp_path / "long.jsonl", [{"context": TEXT, "choices": [" a", " the answer"], "answer": 0}])
    samples = tasks.prepare([TaskConfig("multiple_choice", source, max_length=20)], tokenizer)[0].samples
    assert all(s.truncated and len(s.input_ids) == 20 for s in samples)
    assert tokenizer.decode(samples[1].input_ids[samples[1].start :]) == " the answer"
    assert (samples[0].input_ids[0] == tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
    with pytest.raises(InputError, match="choice 1 of row 0 alone fills max_length=2"):
        tasks.prepare([TaskConfig("multiple_choice", source, max_length=2)], tokenizer)


@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_batches_do_not_change_results(tiny, files, tmp_path, batch_tokens):
    configs = [qa_task(files["qa"], max_new_tokens=8), TaskConfig("multiple_choice", files["mc"])]
    found, expected = (
        run(tiny, configs, tmp_path / str(n), batch_tokens=n)["tasks"] for n in (batch_tokens, 333)
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert a["metrics"].keys() == b["metrics"].keys()
        for name, metric in a["metrics"].items():
            assert metric["value"] == pytest.approx(b["metrics"][name]["value"], rel=1e-5)


def test_bf16_is_close(tiny, files, tmp_path):
    config = TaskConfig("perplexity", files["text"])
    exact, rounded = (
        metrics_of(run(tiny, [config], tmp_path / p, precision=p), "text")["nats_per_token"]["value"]
        for p in ("full", "bf16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)


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
        ("none", None),
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


def test_files(tiny, files, tmp_path):
    output = tmp_path / "out"
    result = run(tiny, [TaskConfig("multiple_choice", files["mc"], name="m")], output, source="here")
    assert json.loads((output / "evaluation.json").read_text()) == result
    assert result["model"] == "here"
    assert set(result["fingerprints"]) == {"model", "tokenizer"}
    assert result["tasks"][0]["role"] == "retained"
    table = pq.read_table(output / "items.parquet")
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("task", "string"), ("metric", "string"), ("item", "string"), ("value", "double"), ("weight", "double")
    ]  # fmt: skip
    assert sorted(p.name for p in output.iterdir()) == ["evaluation.json", "items.parquet"]
    with pytest.raises(InputError, match=r"already holds an evaluation.*--overwrite"):
        run(tiny, [TaskConfig("multiple_choice", files["mc"])], output)


def test_one_item_has_no_standard_error(tiny, files, tmp_path):
    run(tiny, [TaskConfig("perplexity", files["text"], limit=1)], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert metrics_of(written, "text")["perplexity"]["standard_error"] is None


def test_nan_names_task_and_items_and_leaves_nothing(tiny, files, tmp_path):
    lm, tokenizer = tiny
    row = tokenizer("q", add_special_tokens=False).input_ids[-1]
    head = lm.head.weight.data
    kept = head[row].clone()
    head[row] = torch.nan
    try:
        with pytest.raises(InputError, match=r"NaN or infinite losses in choices, first for item \d:\d"):
            run(tiny, [TaskConfig("multiple_choice", files["mc"])], tmp_path / "out")
    finally:
        head[row] = kept
    assert not (tmp_path / "out").exists()


GOOD = {"context": "a", "choices": [" b", " c"], "answer": 0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**GOOD, "answer": 2}, "answer of row 1 is 2, which is not the index"),
        ({**GOOD, "answer": -1}, "answer of row 1 is -1"),
        ({**GOOD, "answer": "A"}, "answer of row 1 is 'A'"),
        ({**GOOD, "answer": 0.5}, "answer of row 1 is 0.5"),
        ({**GOOD, "choices": "bc"}, "choices of row 1 must be a list of non-empty texts, got 'bc'"),
        ({**GOOD, "choices": [" b", 3]}, "choices of row 1 must be a list of non-empty texts"),
        ({**GOOD, "choices": [" b", ""]}, "choices of row 1 must be a list of non-empty texts"),
        ({**GOOD, "choices": [" b"]}, "row 1 has 1 choice; give at least 2"),
        ({**GOOD, "context": 3}, "'context' of row 1 is int"),
    ],
)
def test_bad_questions(tiny, tmp_path, bad, message):
    source = write_rows(tmp_path / "bad.jsonl", [GOOD, bad])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(tiny, [TaskConfig("multiple_choice", source)], tmp_path / "out")
    assert source in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_tasks(tiny, files, tmp_path):
    empty, binary, notes = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "notes.md"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    notes.write_text(TEXT)
    torn = tmp_path / "torn.txt.gz"
    torn.write_bytes(gzip.compress(TEXT.encode())[:-9])
    no_choices = write_rows(tmp_path / "fields.jsonl", [{"context": "a", "answer": 0}])
    cases = [
        ([], "nothing to evaluate"),
        ([TaskConfig("perplexity", "nowhere.txt")], "no such file: nowhere.txt"),
        ([TaskConfig("perplexity", str(empty))], "empty.txt is too short"),
        ([TaskConfig("perplexity", str(binary))], "could not be read as UTF-8 text"),
        ([TaskConfig("perplexity", str(torn))], "torn.txt.gz could not be read"),
        ([TaskConfig("perplexity", str(notes))], "notes.md is not a text file"),
        ([TaskConfig("perplexity", files["text"], window=1)], "window of .* must be at least 2"),
        ([TaskConfig("perplexity", files["text"], limit=0)], "limit of text must be at least 1"),
        ([TaskConfig("essay", files["text"])], "kind of text must be one of perplexity, qa, multiple_choice"),
        ([TaskConfig("perplexity", files["text"], role="both")], "role of text must be one of"),
        ([TaskConfig("perplexity", files["text"])] * 2, "2 evaluations are named 'text'"),
        ([TaskConfig("multiple_choice", no_choices)], "has no field 'choices'; it has context, answer"),
        ([TaskConfig("qa", files["qa"])], "has no field 'prompt'"),
        ([qa_task(files["qa"], answer_pattern="(")], "answer_pattern of sums is not a regular expression"),
        ([qa_task(files["qa"], answer_pattern="x")], "answer_pattern of sums must have a group"),
        ([qa_task(files["qa"], answer_pattern="(never)")], "finds no answer in row 0.*num_generate: 0"),
    ]
    for configs, message in cases:
        with pytest.raises(InputError, match=message):
            run(tiny, configs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
