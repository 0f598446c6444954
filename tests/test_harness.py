"""lm-evaluation-harness tasks from local YAML files: values of our model class against the harness's own HFLM, offline."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import MC, QA, TEXT, metrics_of, run, write_rows
from flow_finetune import evaluate as evaluation
from flow_finetune.config import TaskConfig
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.harness import load_harness, task_manager
from flow_finetune.results import load_runs, shown_metrics

evaluator = pytest.importorskip("lm_eval.evaluator", reason="needs lm-evaluation-harness, the eval extra")

from lm_eval.models.huggingface import HFLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

_DATA = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {test}, train: {train}}}
test_split: test
fewshot_split: train
"""
_CHOICES = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm, higher_is_better: false}, {metric: mcc}]
"""
_SUMS = """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["the", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
"""
_TEXT = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
_ROWS = {
    # Without the row whose choice starts inside a token of the context, for which the harness finds no token.
    "flow_choices": ([r for r in MC if len(r["choices"]) == 3], [r for r in MC[5:] if len(r["choices"]) == 2]),
    "flow_sums": (QA, [{"question": "Which?", "answer": "9"}, {"question": "Who?", "answer": "Anna"}]),
    "flow_text": ([{"text": TEXT}, {"text": TEXT[:60]}], [{"text": "a"}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files whose data is local."""
    directory = tmp_path_factory.mktemp("tasks")
    for (name, (test, train)), body in zip(_ROWS.items(), (_CHOICES, _SUMS, _TEXT), strict=True):
        paths = (
            write_rows(directory / f"{name}_{part}.jsonl", rows) for part, rows in (("test", test), ("train", train))
        )
        head = _DATA.format(name=name, **dict(zip(("test", "train"), paths, strict=True)))
        (directory / f"{name}.yaml").write_text(head + body)
    # The same questions, with answers that test_answers asks the two models for.
    for name in ("own_True", "own_False"):
        head = _DATA.format(name=name, test=directory / f"{name}.jsonl", train=directory / "flow_sums_train.jsonl")
        (directory / f"{name}.yaml").write_text(head + _SUMS)
    (directory / "sampled.yaml").write_text(
        (directory / "flow_sums.yaml")
        .read_text()
        .replace("flow_sums\n", "sampled\n")
        .replace("sample: false", "sample: true")
    )
    (directory / "unsafe.yaml").write_text(
        (directory / "flow_sums.yaml").read_text().replace("flow_sums\n", "unsafe\n") + "unsafe_code: true\n"
    )
    group = "group: flow_group\ntask: [flow_choices, flow_sums]\n"
    (directory / "flow_group.yaml").write_text(group)
    return str(directory)


def harness(name, tasks, **options) -> TaskConfig:
    return TaskConfig("lm_eval", name=name, include_path=tasks, max_length=200, **options)


def by_the_harness(tiny, tasks, name, shots) -> dict:
    """What the harness itself reports with its own model class, and its records of every item."""
    lm, tokenizer = tiny
    # HFLM's maximum does not count the last token, which is no input.
    model = HFLM(pretrained=lm.model, tokenizer=tokenizer, max_length=199, batch_size=3)
    return evaluator.simple_evaluate(
        model=model, tasks=[name], num_fewshot=shots, task_manager=task_manager(tasks), bootstrap_iters=0
    )


@pytest.mark.parametrize("shots", [None, 1])
def test_choices(tiny, tasks, tmp_path, shots):
    result = run(tiny, [harness("flow_choices", tasks, num_shots=shots)], tmp_path / "out")
    expected = by_the_harness(tiny, tasks, "flow_choices", shots)
    metrics = metrics_of(result, "flow_choices")
    # The correlation is no mean over items.
    assert set(metrics) == {"acc", "acc_norm"}
    # As the task's file says, against the sense of the name.
    assert [metrics[name]["higher_is_better"] for name in ("acc", "acc_norm")] == [True, False]
    shown = shown_metrics(load_runs([tmp_path / "out"]))
    assert {m.name: m.higher_is_better for m in shown} == {"acc": True, "acc_norm": False}
    items = read_items(tmp_path / "out")
    for name, metric in metrics.items():
        assert metric["value"] == pytest.approx(expected["results"]["flow_choices"][f"{name},none"])
        found = items["flow_choices", name]
        samples = {str(s["doc_id"]): s[name] for s in expected["samples"]["flow_choices"]}
        assert dict(zip(found.ids, found.value, strict=True)) == samples
    assert result["tasks"][0]["num_items"] == len(_ROWS["flow_choices"][0])


def test_log_likelihoods(tiny, tasks):
    from flow_finetune.harness_model import HarnessModel
    from lm_eval.api.instance import Instance

    lm, tokenizer = tiny
    pairs = [(row["context"], choice) for row in MC[:1] + MC[2:] for choice in row["choices"]] + [
        (TEXT, " the answer ")
    ]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    ours = HarnessModel(lm, tokenizer, "pairs", 100, 300, "full")
    theirs = HFLM(pretrained=lm.model, tokenizer=tokenizer, max_length=99, batch_size=4)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert ours.num_truncated == 1


def test_answers(tiny, tasks, tmp_path):
    """Some answers are what the model itself says, so that each filter finds some right and some wrong."""
    name = f"own_{tiny[1].bos_token_id is not None}"
    samples = by_the_harness(tiny, tasks, "flow_sums", 2)["samples"]["flow_sums"]
    (said,) = zip(*(s["filtered_resps"] for s in samples if s["filter"] == "whole"), strict=True)
    rows = [dict(row) for row in QA]
    rows[3]["answer"], rows[4]["answer"], rows[6]["answer"] = said[3], said[4], said[6][:1]
    assert min(len(said[i]) for i in (3, 4, 6)) > 1
    write_rows(Path(tasks, f"{name}.jsonl"), rows)
    result = run(tiny, [harness(name, tasks, num_shots=2)], tmp_path / "out")
    expected = by_the_harness(tiny, tasks, name, 2)
    metrics, items = metrics_of(result, name), read_items(tmp_path / "out")
    assert set(metrics) == {"exact_match,whole", "exact_match,first"}
    for metric, found in metrics.items():
        assert 0 < found["value"] < 1
        assert found["value"] == pytest.approx(expected["results"][name][metric])
        kept = [s for s in expected["samples"][name] if s["filter"] == metric.partition(",")[2]]
        right = {str(s["doc_id"]): s["exact_match"] for s in kept}
        assert dict(zip(items[name, metric].ids, items[name, metric].value, strict=True)) == right


def test_generated_texts(tiny):
    from flow_finetune.harness_model import HarnessModel
    from lm_eval.api.instance import Instance

    lm, tokenizer = tiny
    kinds = ({"until": ["the", "\n\n"], "max_gen_toks": 12}, {"until": "a", "max_gen_toks": 20},
             {"until": [], "max_new_tokens": 7})  # fmt: skip
    requests = [
        Instance("generate_until", {}, (f"Question: {row['question']}", dict(kind)), 0) for row in QA for kind in kinds
    ]
    ours = HarnessModel(lm, tokenizer, "sums", 200, 300, "full")
    theirs = HFLM(pretrained=lm.model, tokenizer=tokenizer, max_length=200, batch_size=1)
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 2


def test_text(tiny, tasks, tmp_path):
    result = run(tiny, [harness("flow_text", tasks)], tmp_path / "out")
    expected = by_the_harness(tiny, tasks, "flow_text", None)["results"]["flow_text"]
    metrics = metrics_of(result, "flow_text")
    assert set(metrics) == {"nats_per_word", "nats_per_byte"}
    assert np.exp(metrics["nats_per_byte"]["value"]) == pytest.approx(expected["byte_perplexity,none"], rel=1e-4)
    assert np.log(expected["word_perplexity,none"]) == pytest.approx(metrics["nats_per_word"]["value"], rel=1e-4)


def test_a_task_that_runs_the_models_code_is_run_where_that_is_allowed(tiny, tasks, tmp_path, monkeypatch):
    """Its answers and their judgement are those of the same task without the mark."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    seen, evaluate = [], evaluator.evaluate
    monkeypatch.setattr(
        evaluator, "evaluate", lambda *a, **k: [seen.append(os.environ["HF_ALLOW_CODE_EVAL"]), evaluate(*a, **k)][1]
    )
    allowed = run(tiny, [harness("unsafe", tasks, run_model_code=True)], tmp_path / "out")
    # For this task, and no longer.
    assert (seen, os.environ["HF_ALLOW_CODE_EVAL"]) == (["1"], "0")
    plain = run(tiny, [harness("flow_sums", tasks)], tmp_path / "plain")
    assert metrics_of(allowed, "unsafe") == metrics_of(plain, "flow_sums")


def test_a_metric_that_asks_for_permission_as_it_is_read_is_understood(tasks, monkeypatch):
    """MBPP's and HumanEval's, which are loaded from a hub that is out of reach here."""

    def refuse(self, names):
        raise ValueError("The code_eval metric runs untrusted code. Set the variable HF_ALLOW_CODE_EVAL")

    monkeypatch.setattr(type(task_manager(tasks)), "load", refuse)
    with pytest.raises(InputError, match=r"'flow_sums' runs code that the model writes.*--run-model-code"):
        load_harness(harness("flow_sums", tasks))


def test_a_group_is_one_task(tiny, tasks, tmp_path):
    result = run(tiny, [harness("flow_group", tasks, limit=2)], tmp_path / "out")
    assert result["tasks"][0]["num_items"] == 4
    assert metrics_of(result, "flow_group")["acc"]["num_items"] == 2
    assert read_items(tmp_path / "out")["flow_group", "acc"].ids == ["flow_choices/0", "flow_choices/1"]


def test_fingerprints_hold_what_is_asked(tiny, tasks):
    from flow_finetune.tasks import prepare

    same = [prepare([harness("flow_choices", tasks, **o)], tiny[1])[0].fingerprint() for o in ({}, {"num_shots": 0})]
    others = [
        prepare([harness("flow_choices", tasks, **o)], tiny[1])[0].fingerprint()
        for o in ({"num_shots": 1}, {"limit": 1})
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 3


def test_bad_tasks(tiny, tasks, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    (tmp_path / "broken").mkdir()
    broken = (
        (tmp_path / "broken" / "broken.yaml"),
        _DATA.format(name="broken", test="nowhere.jsonl", train="nowhere.jsonl") + _CHOICES,
    )
    broken[0].write_text(broken[1])
    cases = [
        (harness("flow_choicez", tasks), "has no task 'flow_choicez'; did you mean flow_choices"),
        (TaskConfig("lm_eval"), "lacks its name"),
        (harness("flow_choices", str(tmp_path / "none")), "include_path of 'flow_choices' is not a directory"),
        (harness("flow_choices", tasks, shots_source="x"), "leave shots_source out"),
        (harness("broken", str(tmp_path / "broken")), "lm_eval task 'broken' could not be made ready"),
        (harness("unsafe", tasks), "runs code that the model writes"),
        (harness("sampled", tasks), "samples its answers"),
        (
            dataclasses.replace(harness("flow_sums", tasks), max_length=12),
            "flow_sums generates 12 tokens; raise max_length=12",
        ),
    ]
    # Before any other task is run.
    monkeypatch.setattr(evaluation, "score_groups", None)
    for config, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            run(tiny, [TaskConfig("perplexity", text), config], tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert json.dumps(metrics_of(run(tiny, [harness("flow_choices", tasks)], tmp_path / "out"), "flow_choices"))
