"""What lm-evaluation-harness makes of its items in other ways than by their mean, and prompts that a task pins."""

from pathlib import Path

import pytest
from evaluation_cases import MC, metrics_of, run, write_rows
from test_harness import by_the_harness, harness

pytestmark = pytest.mark.usefixtures("one_thread")

_HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
"""
_TASKS = {
    "own_aggregation": "metric_list: [{metric: acc, aggregation: !function utils.response_theory}, {metric: acc_norm}]",
    "without_values": "process_results: !function utils.some\nmetric_list:\n"
    "  - {metric: score, aggregation: nanmean, higher_is_better: true}\n"
    "  - {metric: other, aggregation: mean, higher_is_better: true}\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}",
    "pinned": "num_fewshot: 0\nmetric_list: [{metric: acc}]",
    "shots": "metric_list: [{metric: acc}]",
}
_UTILS = """
def response_theory(items):
    return 0.123

def some(doc, results):
    missing = float("nan") if doc["answer"] == 0 else 2.0 + doc["answer"]
    return {"score": missing, "other": missing, "acc": float(doc["answer"] == 1)}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("metrics")
    data = write_rows(directory / "choices.jsonl", [r for r in MC if len(r["choices"]) == 3])
    for name, body in _TASKS.items():
        (directory / f"{name}.yaml").write_text(_HEAD.format(name=name, data=data) + body + "\n")
    Path(directory, "utils.py").write_text(_UTILS)
    return str(directory)


def test_a_metric_that_is_no_mean_of_its_items_is_left_out(tiny, tasks, tmp_path, capsys):
    result = run(tiny, [harness("own_aggregation", tasks)], tmp_path / "out")
    assert by_the_harness(tiny, tasks, "own_aggregation", None)["results"]["own_aggregation"]["acc,none"] == 0.123
    assert set(metrics_of(result, "own_aggregation")) == {"acc_norm"}
    assert "own_aggregation: acc left out" in " ".join(capsys.readouterr().err.split())


def test_items_without_a_value_are_left_out_where_the_harness_does(tiny, tasks, tmp_path, capsys):
    result = run(tiny, [harness("without_values", tasks)], tmp_path / "out")
    expected = by_the_harness(tiny, tasks, "without_values", None)["results"]["without_values"]
    metrics = metrics_of(result, "without_values")
    assert set(metrics) == {"score", "acc"}
    for name, found in metrics.items():
        assert found["value"] == pytest.approx(expected[f"{name},none"])
    assert 0 < metrics["score"]["num_items"] < metrics["acc"]["num_items"]
    assert "without_values: other left out" in " ".join(capsys.readouterr().err.split())


def test_shots_are_left_away_where_a_task_pins_none(tiny, tasks, tmp_path, capsys):
    pinned = run(tiny, [harness("pinned", tasks, num_shots=2)], tmp_path / "pinned")
    assert "pinned is without shots by its definition" in " ".join(capsys.readouterr().err.split())
    plain, shots = (run(tiny, [harness("shots", tasks, num_shots=n)], tmp_path / f"{n}") for n in (0, 2))
    fingerprints = [result["tasks"][0]["fingerprint"] for result in (pinned, plain, shots)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
