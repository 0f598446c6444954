"""Experiment files, and the tables that are made from records alone."""

import csv
import json
import math
import re
import shutil

import pytest
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from paper_cells import BENCHMARKS, MAPPING, FakeLaboratory, Killed, make_runner, write_experiment
from safetensors.torch import load_file
from typer.testing import CliRunner

import paper  # isort: skip
from experiment import read_experiment, select  # isort: skip
from records import Records  # isort: skip
from paper_report import write_paper_report  # isort: skip
from paper_results import read_results, seed_mean  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


def test_tables_are_made_from_records_alone(tiny_experiment, tmp_path):
    runner = make_runner(tiny_experiment, tmp_path, FakeLaboratory())
    runner.run(tiny_experiment.cells())
    first = write_paper_report(read_results(tiny_experiment, runner.records), tmp_path / "records", "command")
    copy = Records(tiny_experiment, tmp_path / "elsewhere")
    shutil.copytree(runner.records.path, copy.path)
    shutil.rmtree(tmp_path / "work")
    second = write_paper_report(read_results(tiny_experiment, copy), tmp_path / "elsewhere", "command")
    for name in ("tiny.md", "tiny.csv", "tiny_seeds.csv"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    assert (second.parent / "tiny_tradeoff.png").stat().st_size > 1000
    assert "/secret/" not in "".join(p.read_text() for p in copy.path.rglob("*.json"))

    page = second.read_text()
    for row in MAPPING["rows"]:
        assert f"\n| {row['name']} |" in page
    assert "1e-05: 2.2069, 3e-05: 1.0000, 0.0001: 2.4496 | 3e-05 | l2" in page
    assert "1e-05 (at the grid's edge)" in page

    # Against the items themselves: ratios of sums, their difference, and the interval around it.
    with (second.parent / "tiny.csv").open() as file:
        table = {(r["row"], r["metric"]): r for r in csv.DictReader(file)}
    ratio = {}
    for name in ("flow", "standard"):
        items = read_items(copy.path / f"cells/{name}-seed0")[("test", "nats_per_token")]
        ratio[name] = items.value.sum() / items.weight.sum()
    found = table[("flow", "test loss (nats/token)")]
    assert float(found["value"]) == pytest.approx(ratio["flow"], rel=1e-5)
    assert float(found["difference"]) == pytest.approx(ratio["flow"] - ratio["standard"], rel=1e-4)
    assert float(found["low"]) < float(found["difference"]) < float(found["high"])


def test_the_mean_over_seeds_is_over_the_same_items(tiny_experiment, tmp_path):
    runner = make_runner(tiny_experiment, tmp_path, FakeLaboratory())
    runner.run(tiny_experiment.cells())
    results = read_results(tiny_experiment, runner.records)
    runs = [results.run(tiny_experiment.row("standard"), seed) for seed in (0, 1, 2)]
    each = [run.tasks["text"]["metrics"]["nats_per_token"]["value"] for run in runs]
    mean = seed_mean(runs).tasks["text"]["metrics"]
    assert mean["nats_per_token"]["value"] == pytest.approx(sum(each) / 3)
    assert mean["perplexity"]["value"] == pytest.approx(math.exp(sum(each) / 3))
    # Independent seeds: the mean's standard error is smaller than a single one's.
    assert (
        mean["nats_per_token"]["standard_error"] < runs[0].tasks["text"]["metrics"]["nats_per_token"]["standard_error"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "needs rows"),
        ({"rows": [{"name": "standard", "weights": "none"}]}, "needs one of learning_rate, learning_rates"),
        ({"rows": [{"name": "flow", "learning_rate": 1e-5}]}, "the baseline 'standard' is none of the rows"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "weights": "none", "learning_rate_of": "b"}]}, "'b' is no row with a learning rate"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "of": "l2"}]}, "`of` needs wise_ft"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "of": "l2", "wise_ft": 0.5, "seeds": [1]}]}, "seed 1, which l2 lacks"),
        ({"rows": [*MAPPING["rows"], {"name": "l2", "learning_rate": 1e-5}]}, "row l2: a row's name"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "learning_rate": 1e-5, "wieghts": "none"}]}, "did you mean 'weights'"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "weights": "none", "learning_rate": 1e-5, "compare_with": "b"}]}, "compare_with names 'b', which is no other row"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "weights": "none", "learning_rate": 1e-5, "compare_with": "a"}]}, "compare_with names 'a', which is no other row"),
        ({"search": None}, "says no search"),
        ({"search": {**MAPPING["search"], "validation_first": 7}}, "the validation rows from 7 on are trained on"),
        ({"search": {**MAPPING["search"], "num_samples": 9}}, "the validation rows from 8 on are trained on"),
        ({"data": {"source": "train.jsonl"}}, "give data a limit"),
        ({"task": "image", "data": {"source": "images", "part": "train"}, "search": {"holdout": 0.2},
          "tasks": [{"source": "images", "role": "target", "part": "validation"}], "rows": MAPPING["rows"][:2]},
         "of which data has only the part 'train'"),
        ({"tasks": [{"kind": "qa", "source": "train.jsonl", "role": "target", "split": "train[12:]"},
                    {"kind": "qa", "source": "train.jsonl", "name": "own"}]},
         "the task own is of rows 8 to 11 of train.jsonl too.*as in split 'train.12:.'"),
        ({"tasks": [{"kind": "qa", "source": "train.jsonl", "role": "target", "split": "train[4:]", "limit": 5}]},
         "the task train.jsonl is of rows 8 to 11"),
        ({"task": "image", "data": {"source": "images"}, "search": {"holdout": 0.2}, "tasks": [{"source": "test"}],
          "rows": [*MAPPING["rows"][5:], {"name": "standard", "learning_rate": 1e-5}, {"name": "lora", "learning_rate": 1e-4}]},
         "method lora: LoRA is for language models"),
        ({"task": "speech"}, "task must be one of language, image"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_experiment(write_experiment(tmp_path / "tiny.yaml", {**MAPPING, **change}))


@pytest.mark.parametrize(
    "task",
    [
        {"split": "train[12:]"},
        {"split": "train[:8]"},
        {"limit": 8},
        {"split": "train[2:]", "limit": 6},
        {"source": "hub/name", "split": "test"},
    ],
)
def test_a_task_may_be_of_other_rows_of_the_training_file(tmp_path, task):
    data = {**MAPPING["data"], "source": task.get("source", "train.jsonl")}
    tasks = [{"kind": "qa", "source": "train.jsonl", "role": "target", **task}]
    read_experiment(write_experiment(tmp_path / "tiny.yaml", {**MAPPING, "data": data, "tasks": tasks}))


def test_the_names_of_the_harnesss_tasks_are_no_paths(tmp_path):
    tasks = [*MAPPING["tasks"], {"kind": "lm_eval", "source": "mbpp", "include_path": "own"}]
    found = read_experiment(write_experiment(tmp_path / "tiny.yaml", {**MAPPING, "tasks": tasks}))
    located = found.located(tmp_path / "data", "model").tasks
    assert [task.source for task in located] == [
        str(tmp_path / "data/test.jsonl"),
        str(tmp_path / "data/text.txt"),
        "mbpp",
    ]
    assert located[2].include_path == str(tmp_path / "data/own")


@pytest.mark.parametrize("name", sorted(p.name for p in (BENCHMARKS / "paper").glob("*.yaml")))
def test_the_experiment_files_are_whole(name):
    found = read_experiment(BENCHMARKS / "paper" / name)
    assert found.baseline == "standard"
    assert all(len(select(found, only=[row.name])) >= 1 for row in found.rows)


def test_a_real_experiment_on_a_tiny_model(tiny_model_dir, qa_file, tmp_path, monkeypatch):
    shutil.copy(qa_file, tmp_path / "qa.jsonl")
    (tmp_path / "text.txt").write_text("The answer is the third choice, Anna takes 3 of the 12 apples. " * 8)
    fields = {"prompt_field": "question", "response_field": "answer"}
    mapping = {
        "model": {"source": str(tiny_model_dir), "precision": "full", "device": "cpu"},
        "data": {"source": "qa.jsonl", "limit": 16, **fields},
        "train": {"epochs": 1, "track_distance": False},
        "tasks": [
            {"kind": "qa", "source": "qa.jsonl", "role": "target", "limit": 4, "num_generate": 0, **fields},
            {"kind": "perplexity", "source": "text.txt", "window": 32},
        ],
        "search": {"num_samples": 8, "validation_first": 16, "validation_samples": 6},
        "rows": [
            {"name": "standard", "weights": "none", "learning_rates": [1e-6, 3e-3]},
            {"name": "flow", "learning_rate_of": "standard"},
            {"name": "wise-ft", "of": "flow", "wise_ft": 0.25},
        ],
    }
    file = write_experiment(tmp_path / "real.yaml", mapping)
    command = ["run", str(file), "-o", str(tmp_path / "out"), "--data", str(tmp_path), "--records",
               str(tmp_path / "records"), "--keep-models"]  # fmt: skip
    # Killed between training and evaluating the second row.
    import laboratory

    original = laboratory.pipeline.evaluate_saved

    def killed(directory, *rest, **options):
        if directory.name == "flow-seed0":
            raise Killed
        return original(directory, *rest, **options)

    monkeypatch.setattr(laboratory.pipeline, "evaluate_saved", killed)
    with pytest.raises(Killed):
        CliRunner().invoke(paper.app, command, catch_exceptions=False)
    monkeypatch.setattr(laboratory.pipeline, "evaluate_saved", original)
    work, records = tmp_path / "out/real", tmp_path / "records/real"
    trained = (work / "cells/flow-seed0/model.safetensors").stat().st_mtime_ns
    result = CliRunner().invoke(paper.app, command)
    assert result.exit_code == 0, result.output
    assert (work / "cells/flow-seed0/model.safetensors").stat().st_mtime_ns == trained

    assert sum(1 for _ in (work / "validation-16-6.jsonl").open()) == 6
    losses = {p.name: json.loads((p / "cell.json").read_text())["validation_loss"] for p in records.glob("search/*")}
    assert losses["standard-lr0.003"] < losses["standard-lr1e-06"]
    summary = json.loads((records / "cells/flow-seed0/train/summary.json").read_text())
    assert summary["num_samples"] == 16
    record = json.loads((records / "cells/flow-seed0/cell.json").read_text())
    assert record["learning_rate"] == 0.003
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown\+?", record["commit"])
    assert "commit" not in record["identity"]
    assert str(tmp_path) not in (records / "cells/flow-seed0/evaluation.json").read_text()

    averaged, flow, base = (
        load_file(d / "model.safetensors")
        for d in (work / "cells/wise-ft-seed0", work / "cells/flow-seed0", tiny_model_dir)
    )
    for key, value in averaged.items():
        assert (value - (0.75 * base[key] + 0.25 * flow[key])).abs().max() < 1e-6, key
    assert any((flow[key] - base[key]).abs().max() > 1e-3 for key in base)

    page = (tmp_path / "records/real.md").read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert CliRunner().invoke(paper.app, ["report", str(file), "--records", str(tmp_path / "records")]).exit_code == 0
    assert (tmp_path / "records/real.md").read_bytes() == page
