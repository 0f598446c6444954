"""Every metric against plain loops over the full logits of a tiny model; bad input."""

import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_cases import MC, QA, TEXT, metrics_of, qa_task, run, target_log_probabilities, write_rows
from flow_finetune import evaluate as evaluation
from flow_finetune.config import DataConfig, TaskConfig
from flow_finetune.data import ALPACA_TEMPLATE, template_fingerprint
from flow_finetune.errors import DivergedError, InputError
from flow_finetune.evaluation_files import read_items, summary_of
from flow_finetune.models import CausalLM
from flow_finetune.results import items_text, load_runs
from flow_finetune.storage import SUMMARY_FILE, is_used, write_json
from flow_finetune.tasks import prepare
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


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
        with pytest.raises(DivergedError, match=r"NaN or infinite losses in choices, first for item \d:\d"):
            run(tiny, [TaskConfig("multiple_choice", files["mc"])], tmp_path / "out")
    finally:
        head[row] = kept
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
        ([TaskConfig("perplexity", files["text"], max_length=99)], "max_length of text has no effect on a perplexity"),
        ([TaskConfig("multiple_choice", no_choices, template="x")], "template of fields has no effect.*num_shots"),
        ([qa_task(files["qa"], window=9)], "window of sums has no effect on a qa evaluation"),
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
        # Found while tasks are read, before any of them is run.
        if configs:
            with pytest.raises(InputError, match=message):
                prepare(configs, tiny[1])
    assert not (tmp_path / "out").exists()


def test_files_of_one_name_are_told_apart_by_their_directories(tiny, files, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text(TEXT)
    tasks = [TaskConfig("perplexity", str(tmp_path / place / "text.txt")) for place in ("a", "b")]
    assert [task.name for task in prepare(tasks, tiny[1])] == ["a-text", "b-text"]
    assert [task.name for task in prepare(tasks[:1], tiny[1])] == ["text"]


def test_what_does_not_fit_is_said_and_shown(tiny, tmp_path, capsys):
    rows = [{"prompt": "Which?", "response": "That."}, {"prompt": "Why so? " * 40, "response": "For that."},
            {"prompt": "What is it?", "response": "It is " * 60}]  # fmt: skip
    config = TaskConfig("qa", write_rows(tmp_path / "long.jsonl", rows), max_length=120, num_generate=0)
    (task,) = run(tiny, [config], tmp_path / "out")["tasks"]
    assert (task["num_items"], task["num_truncated"], task["num_dropped"]) == (2, 1, 1)
    assert items_text(task) == "2, 1 truncated, 1 more left out"
    said = " ".join(capsys.readouterr().err.split())
    assert "long: 1 of 2 texts truncated to max_length=120, 1 items left out" in said


def test_an_evaluation_that_fails_keeps_what_is_finished(tiny, files, tmp_path, monkeypatch):
    tasks = [qa_task(files["qa"], num_generate=2, max_new_tokens=4), TaskConfig("multiple_choice", files["mc"]),
             TaskConfig("perplexity", files["text"])]  # fmt: skip
    expected = run(tiny, tasks, tmp_path / "undisturbed")
    ran = []

    def counted(kind, original, fails=False):
        def measure(*arguments):
            ran.append(kind)
            if fails:
                raise KeyboardInterrupt
            return original(*arguments)

        return measure

    originals = dict(evaluation._RUN)
    for kind, original in originals.items():
        monkeypatch.setitem(evaluation._RUN, kind, counted(kind, original, fails=kind == "perplexity"))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tasks, tmp_path / "out")
    assert not is_used(tmp_path / "out")
    for kind, original in originals.items():
        monkeypatch.setitem(evaluation._RUN, kind, counted(kind, original))
    # Another precision, or another number of answers, is another result.
    run(tiny, tasks[1:2], tmp_path / "other", precision="bf16")
    ran.clear()
    found = run(tiny, [dataclasses.replace(tasks[0], num_generate=1), *tasks[1:]], tmp_path / "out")
    assert ran == ["qa", "perplexity"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "generations.jsonl",
        "items.parquet",
    ]
    assert [without_seconds(t) for t in found["tasks"][1:]] == [without_seconds(t) for t in expected["tasks"][1:]]

    with monkeypatch.context() as patch:
        patch.setitem(evaluation._RUN, "perplexity", counted("perplexity", None, fails=True))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tasks, tmp_path / "again")
    run(tiny, tasks, tmp_path / "again")
    for name in ("items.parquet", "generations.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def without_seconds(task):
    return {key: value for key, value in task.items() if key != "seconds"}


def test_another_template_than_the_trainings_is_said(tiny, files, tmp_path, capsys):
    trained = DataConfig("", template="Q: {prompt}")
    summary = {"fingerprints": {"template": template_fingerprint(trained, tiny[1])}}
    for name, template in (("other", "alpaca"), ("same", "Q: {prompt}")):
        config = qa_task(files["qa"], name=name, template=template, num_generate=0)
        run(tiny, [config], tmp_path / name, summary=summary)
    said = capsys.readouterr().err
    assert "other: this model was trained with another template" in " ".join(said.split())
    assert "same:" not in said


def test_evaluation_is_in_eval_mode(tiny, files, tmp_path):
    tokenizer = tiny[1]
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, attention_dropout=0.5)  # fmt: skip
    model = CausalLM(LlamaForCausalLM(config))
    tasks = [TaskConfig("perplexity", files["text"])]
    found, again = (run((model.train(), tokenizer), tasks, tmp_path / name) for name in "ab")
    assert metrics_of(found, "text") == metrics_of(again, "text")


def test_precisions_are_not_compared(tiny, files, tmp_path):
    for precision in ("full", "bf16"):
        task = run(tiny, [TaskConfig("perplexity", files["text"])], tmp_path / precision, precision=precision)["tasks"][
            0
        ]
        assert task["settings"] == {"precision": precision, "compile": False}
    with pytest.raises(InputError, match="evaluated on 'text' with another precision"):
        load_runs([tmp_path / "full", tmp_path / "bf16"])


def test_an_infinite_loss_is_refused(tiny, files, tmp_path):
    lm, tokenizer = tiny
    bias = torch.zeros(lm.head.weight.shape[0])
    bias[tokenizer(TEXT, add_special_tokens=False).input_ids[5]] = -torch.inf
    lm.head.bias = torch.nn.Parameter(bias)
    try:
        with pytest.raises(DivergedError, match="NaN or infinite losses in text, first for item 0"):
            run(tiny, [TaskConfig("perplexity", files["text"])], tmp_path / "out")
    finally:
        lm.head.bias = None


def test_what_tells_tasks_apart(tiny, files, tmp_path):
    """The same tokens with other right answers, or other targets, are other items; choices are measured in bytes."""
    other = write_rows(tmp_path / "mc.jsonl", [{**row, "answer": 0} for row in MC])
    a, b = (prepare([TaskConfig("multiple_choice", file)], tiny[1])[0] for file in (files["mc"], other))
    assert [q.num_bytes for q in a.questions] == [tuple(len(c.encode()) for c in row["choices"]) for row in MC]
    assert a.fingerprint() != b.fingerprint()
    rows = ({"prompt": "The answer", "response": " is 12"}, {"prompt": "The answer is", "response": " 12"})
    paths = [write_rows(tmp_path / f"{index}.jsonl", [row]) for index, row in enumerate(rows)]
    a, b = (prepare([TaskConfig("completion", path)], tiny[1])[0] for path in paths)
    assert a.samples[0].input_ids.tolist() == b.samples[0].input_ids.tolist()
    assert a.fingerprint() != b.fingerprint()
    (task,) = prepare([qa_task(files["qa"], num_generate=2, max_new_tokens=8)], tiny[1])
    assert task.settings() == {"answer_pattern": task.config.answer_pattern, "max_new_tokens": 8, "num_generate": 2,
                               "until": ["### Instruction:"]}  # fmt: skip


def test_generations_are_written_in_any_locale(tmp_path):
    """Latin-1 has no letter for what a model may say."""
    program = (
        "import sys; from pathlib import Path; import numpy as np; from flow_finetune.evaluation_files import write_evaluation; "
        "from flow_finetune.statistics import Items; one = np.ones(1); items = Items(['0'], one, one); "
        "write_evaluation(Path(sys.argv[1]), 'm', {}, [], [('t', 'nats', items)], [{'text': '\\ufffd \\u03c4'}])"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "generations.jsonl").read_text(encoding="utf-8")) == {"text": "\ufffd \u03c4"}


def test_texts_beyond_the_models_positions_are_met_before_anything_is_run(tiny, files, tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLM, "max_positions", property(lambda self: 200))
    monkeypatch.setattr(evaluation, "score_groups", None)
    text = TaskConfig("perplexity", files["text"], window=32)
    for options, message in (
        ({"max_new_tokens": 190}, "a prompt with its answer has up to"),
        ({"template": "a" * 400 + "{prompt}"}, "qa has up to"),
    ):
        with pytest.raises(InputError, match=message):
            run(tiny, [text, qa_task(files["qa"], name="qa", **options)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_models_summary_is_of_its_own_directory(tmp_path, monkeypatch):
    summary = {"method": {"name": "flow"}}
    write_json(tmp_path / "run" / SUMMARY_FILE, summary)
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/model.gguf").touch()
    (tmp_path / "run/other").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run")
    for model in (".", str(tmp_path / "run"), "~/run", "model", "model.gguf"):
        assert summary_of(model) == summary, model
    # A hub id, or a model that lies in a run's directory and is not of it.
    for model in ("gpt2", "other", str(tmp_path)):
        assert summary_of(model) is None, model
