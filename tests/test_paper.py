"""The runner of experiments: what is run, once; how learning rates are chosen; tables from records alone."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import metric_record, read_items, write_evaluation
from flow_finetune.statistics import Items
from safetensors.torch import load_file
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import paper  # noqa: E402
from experiment import Cell, read_experiment, select, shard  # noqa: E402
from paper_report import read_results, seed_mean, write_paper_report  # noqa: E402
from records import Records, locked  # noqa: E402
from runner import Runner  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

MAPPING = {
    "model": {"source": "tiny"},
    "data": {"source": "train.jsonl", "limit": 8},
    "tasks": [{"kind": "qa", "source": "test.jsonl", "role": "target"}, {"kind": "perplexity", "source": "text.txt"}],
    "search": {"num_samples": 4, "validation_first": 8, "validation_samples": 4},
    "rows": [
        {"name": "pretrained"},
        {"name": "standard", "weights": "none", "learning_rates": [1e-5, 3e-5, 1e-4], "seeds": [0, 1, 2]},
        {"name": "wise-ft", "of": "standard", "wise_ft": 0.5},
        {"name": "l2", "weights": "none", "penalty": "l2", "learning_rate_of": "standard"},
        {"name": "flow", "learning_rates": [1e-5, 1e-3], "seeds": [0, 1]},
        {"name": "fixed", "learning_rate": 2e-5},
    ],
}


def _write(path: Path, mapping: dict) -> Path:
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture
def tiny_experiment(tmp_path):
    return read_experiment(_write(tmp_path / "tiny.yaml", MAPPING))


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Whether records outlive a power cut is test_storage's question; waiting for the disk would take most of the time."""
    monkeypatch.setattr("flow_finetune.storage._sync", lambda path: None)


class Killed(BaseException):
    """What a signal is to Python: no Exception that anything would handle."""


class FakeLaboratory:
    """Makes cells in no time, with losses of its own; remembers every call, and dies at call number `dies_at`."""

    best = 3.0e-5

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls: list[tuple] = []
        self.dies_at = dies_at

    def _call(self, *call) -> None:
        self.calls.append(call)
        if len(self.calls) == self.dies_at:
            raise Killed

    def make_pretrained(self, directory):
        self._call("pretrained")
        self._measure(directory, 0)
        return {"score": 1.0}

    def train(self, method, seed, directory):
        if not (directory / "train/summary.json").is_file():
            self._call("train", directory.name, method.learning_rate)
            (directory / "train").mkdir(parents=True)
            (directory / "model.safetensors").write_text("weights")
            summary = {"method": {"name": method.name}, "seconds": 2.0, "num_steps": 3, "fingerprints": {"model": "m"}}
            (directory / "train/summary.json").write_text(json.dumps(summary))

    def average(self, method, finetuned, directory):
        assert (finetuned / "model.safetensors").is_file()
        self._call("average", method.name)
        shutil.copytree(finetuned, directory)
        for made in ("evaluation.json", "items.parquet"):
            (directory / made).unlink(missing_ok=True)

    def evaluate(self, directory):
        self._call("evaluate", directory.name)
        self._measure(directory, sum(directory.name.encode()))

    def try_out(self, method, seed, directory):
        self.train(method, seed, directory)
        self._measure(directory, 1)
        return 1 + math.log(method.learning_rate / self.best) ** 2

    @staticmethod
    def _measure(directory, number):
        rng = np.random.default_rng(number)
        ids, records, columns = [str(i) for i in range(20)], [], []
        for name, kind, role in (("test", "qa", "target"), ("text", "perplexity", "retained")):
            items = Items(ids, rng.uniform(10, 30, 20), np.arange(5.0, 25.0))
            metrics = {"nats_per_token": metric_record(items)}
            if kind == "perplexity":
                metrics["perplexity"] = {"value": math.exp(metrics["nats_per_token"]["value"]), "standard_error": 0.1,
                                         "num_items": 20}  # fmt: skip
            records.append({"name": name, "kind": kind, "role": role, "source": f"/secret/{name}", "num_items": 20,
                            "num_dropped": 0, "num_truncated": 0, "fingerprint": name, "seconds": 1.5,
                            "metrics": metrics})  # fmt: skip
            columns.append((name, "nats_per_token", items))
        directory.mkdir(parents=True, exist_ok=True)
        write_evaluation(directory, f"/secret/{directory.name}", {"model": "x"}, records, columns)


def _runner(experiment, root: Path, laboratory, **options) -> Runner:
    provenance = {"command": "python benchmarks/paper.py run tiny.yaml", "machine": "a machine"}
    records = Records(experiment, root / "records")
    return Runner(experiment, records, laboratory, root / "work", provenance, {"/secret/": ""}, **options)


def test_cells_come_after_what_they_need(tiny_experiment):
    assert [cell.key for cell in tiny_experiment.cells()] == [
        "cells/pretrained", "search/standard-lr1e-05", "search/standard-lr3e-05", "search/standard-lr0.0001",
        "search/flow-lr1e-05", "search/flow-lr0.001", "cells/standard-seed0", "cells/standard-seed1",
        "cells/standard-seed2", "cells/l2-seed0", "cells/flow-seed0", "cells/flow-seed1", "cells/fixed-seed0",
        "cells/wise-ft-seed0",
    ]  # fmt: skip


def test_finished_cells_are_not_run_again_and_a_killed_run_continues(tiny_experiment, tmp_path):
    undisturbed = FakeLaboratory()
    failed, left = _runner(tiny_experiment, tmp_path / "a", undisturbed).run(tiny_experiment.cells())
    assert (failed, left) == ([], [])
    # 5 trials, 7 trainings, 1 average, 8 evaluations, the pre-trained model.
    assert len(undisturbed.calls) == len(set(undisturbed.calls)) == 5 + 7 + 1 + 8 + 1
    again = FakeLaboratory(dies_at=1)
    assert _runner(tiny_experiment, tmp_path / "a", again).run(tiny_experiment.cells()) == ([], [])
    assert again.calls == []

    for dies_at in (1, 4, 9, 20):
        root = tmp_path / f"killed-{dies_at}"
        first, second = FakeLaboratory(dies_at), FakeLaboratory()
        with pytest.raises(Killed):
            _runner(tiny_experiment, root, first).run(tiny_experiment.cells())
        assert _runner(tiny_experiment, root, second).run(tiny_experiment.cells()) == ([], [])
        # Only the call that was killed is made twice.
        assert sorted(first.calls[:-1] + second.calls, key=str) == sorted(undisturbed.calls, key=str)


def test_the_learning_rate_is_the_lowest_validation_loss_of_the_own_or_named_search(tiny_experiment, tmp_path):
    laboratory = FakeLaboratory()
    runner = _runner(tiny_experiment, tmp_path, laboratory)
    runner.run(tiny_experiment.cells())
    used = {call[1]: call[2] for call in laboratory.calls if call[0] == "train" and "-seed0" in call[1]}
    assert used == {"standard-seed0": 3e-5, "l2-seed0": 3e-5, "flow-seed0": 1e-5, "fixed-seed0": 2e-5}
    losses = runner.records.search_losses(tiny_experiment.row("standard"))
    assert losses == pytest.approx({rate: 1 + math.log(rate / 3e-5) ** 2 for rate in (1e-5, 3e-5, 1e-4)})


def test_shards_are_disjoint_complete_and_finish_the_experiment_together(tiny_experiment, tmp_path):
    everything = {cell.key for cell in tiny_experiment.cells()}
    for count in (1, 2, 3, 20):
        parts = [shard(tiny_experiment, f"{i + 1}/{count}") - {"cells/pretrained"} for i in range(count)]
        assert set().union(*parts) == everything - {"cells/pretrained"}
        assert sum(map(len, parts)) == len(everything) - 1
        assert all(("cells/standard-seed0" in part) == ("cells/wise-ft-seed0" in part) for part in parts)
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(InputError, match="--shard takes"):
            shard(tiny_experiment, wrong)

    # Two machines: each has its own disk, and the records are exchanged after the first call of both.
    calls = []
    for part in ("1/2", "2/2", "1/2", "2/2"):
        laboratory = FakeLaboratory()
        runner = _runner(tiny_experiment, tmp_path / part.replace("/", "-"), laboratory)
        runner.records.path = tmp_path / "exchanged"
        failed, left = runner.run(select(tiny_experiment, part=part))
        calls += laboratory.calls
    assert (failed, left) == ([], [])
    assert len(calls) == len(set(calls))
    assert all((tmp_path / "exchanged" / key / "cell.json").is_file() for key in everything)


def test_only_some_rows_and_seeds_bring_what_they_need(tiny_experiment):
    keys = [cell.key for cell in select(tiny_experiment, only=["wise-ft"])]
    assert keys == ["search/standard-lr1e-05", "search/standard-lr3e-05", "search/standard-lr0.0001",
                    "cells/standard-seed0", "cells/wise-ft-seed0"]  # fmt: skip
    assert [c.key for c in select(tiny_experiment, only=["fixed", "pretrained"], seeds=[0])] == [
        "cells/pretrained", "cells/fixed-seed0",
    ]  # fmt: skip
    with pytest.raises(InputError, match="has no row 'adam'"):
        select(tiny_experiment, only=["adam"])


def test_a_cell_that_another_process_makes_is_left_to_it(tiny_experiment, tmp_path):
    laboratory = FakeLaboratory()
    runner = _runner(tiny_experiment, tmp_path, laboratory)
    with locked(tmp_path / "work/locks/cells-standard-seed0") as mine:
        assert mine
        failed, left = runner.run(tiny_experiment.cells())
    # The averaged row needs the model that is being made.
    assert [cell.key for cell in left] == ["cells/standard-seed0", "cells/wise-ft-seed0"]
    assert failed == []
    assert ("train", "standard-seed0", 3e-5) not in laboratory.calls
    assert runner.run(tiny_experiment.cells()) == ([], [])


def test_a_model_is_deleted_when_no_cell_needs_it(tiny_experiment, tmp_path):
    def models(root):
        return sorted(path.parent.name for path in (root / "work").rglob("model.safetensors"))

    runner = _runner(tiny_experiment, tmp_path, FakeLaboratory())
    runner.run(select(tiny_experiment, only=["standard", "l2"]))
    assert models(tmp_path) == ["standard-seed0"]
    runner.run(tiny_experiment.cells())
    assert models(tmp_path) == []
    _runner(tiny_experiment, tmp_path / "kept", FakeLaboratory(), keep_models=True).run(tiny_experiment.cells())
    assert len(models(tmp_path / "kept")) == 5 + 8

    # A row that comes later trains its model again, but does not evaluate it again.
    shutil.rmtree(tmp_path / "records/tiny/cells/wise-ft-seed0")
    laboratory = FakeLaboratory()
    _runner(tiny_experiment, tmp_path, laboratory).run(tiny_experiment.cells())
    assert laboratory.calls == [
        ("train", "standard-seed0", 3e-5), ("average", "wise-ft"), ("evaluate", "wise-ft-seed0"),
    ]  # fmt: skip


def test_a_failed_cell_does_not_stop_the_others(tiny_experiment, tmp_path):
    class Diverging(FakeLaboratory):
        def train(self, method, seed, directory):
            if method.name == "flow" and method.learning_rate == 1e-3:
                raise InputError("the loss is nan")
            super().train(method, seed, directory)

    failed, left = _runner(tiny_experiment, tmp_path, Diverging()).run(tiny_experiment.cells())
    assert [cell.key for cell in failed] == ["search/flow-lr0.001"]
    assert [cell.key for cell in left] == ["cells/flow-seed0", "cells/flow-seed1"]


def test_a_record_of_other_settings_is_refused_and_defaults_make_no_other_settings(tiny_experiment, tmp_path):
    _runner(tiny_experiment, tmp_path, FakeLaboratory()).run(tiny_experiment.cells())
    same = {**MAPPING, "train": {"epochs": 2, "weight_decay": 0.0}}  # what the defaults say
    again = read_experiment(_write(tmp_path / "tiny.yaml", same))
    assert _runner(again, tmp_path, FakeLaboratory(dies_at=1)).run(again.cells()) == ([], [])
    other = read_experiment(_write(tmp_path / "tiny.yaml", {**MAPPING, "train": {"epochs": 3}}))
    with pytest.raises(InputError, match="was made with another train than tiny has now"):
        Records(other, tmp_path / "records").read(Cell(other.row("fixed"), 0))


def test_tables_are_made_from_records_alone(tiny_experiment, tmp_path):
    runner = _runner(tiny_experiment, tmp_path, FakeLaboratory())
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
    runner = _runner(tiny_experiment, tmp_path, FakeLaboratory())
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
        ({"rows": [*MAPPING["rows"], {"name": "a", "learning_rate_of": "b"}]}, "'b' is no row with a learning rate"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "of": "l2"}]}, "`of` needs wise_ft"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "of": "l2", "wise_ft": 0.5, "seeds": [1]}]}, "seed 1, which l2 lacks"),
        ({"rows": [*MAPPING["rows"], {"name": "l2", "learning_rate": 1e-5}]}, "row l2: a row's name"),
        ({"rows": [*MAPPING["rows"], {"name": "a", "learning_rate": 1e-5, "wieghts": "none"}]}, "did you mean 'weights'"),
        ({"search": None}, "says no search"),
        ({"task": "speech"}, "task must be one of language, image"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_experiment(_write(tmp_path / "tiny.yaml", {**MAPPING, **change}))


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
    file = _write(tmp_path / "real.yaml", mapping)
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
    assert json.loads((records / "cells/flow-seed0/cell.json").read_text())["learning_rate"] == 0.003
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
