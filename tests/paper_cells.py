"""An experiment that is run in no time: its file, a laboratory that makes up its results, and a runner."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml
from flow_finetune.evaluation_files import metric_record, write_evaluation
from flow_finetune.statistics import Items

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from records import Records  # noqa: E402
from runner import Runner  # noqa: E402

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
        {"name": "fixed", "weights": "sequence", "learning_rate": 2e-5},
    ],
}


# What every training starts from.
START = {"model": "m", "tokenizer": "t", "data": "d", "template": "p"}


def write_experiment(path: Path, mapping: dict) -> Path:
    """An experiment file."""
    path.write_text(yaml.safe_dump(mapping))
    return path


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
            summary = {"method": {"name": method.name}, "seconds": 2.0, "num_steps": 3, "fingerprints": START,
                       "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-5, "seed": seed}}  # fmt: skip
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
        model = START["model"] if directory.name == "pretrained" else directory.name
        fingerprints = {"model": model, "tokenizer": START["tokenizer"]}
        write_evaluation(directory, f"/secret/{directory.name}", fingerprints, records, columns)


def make_runner(experiment, root: Path, laboratory, **options) -> Runner:
    """A runner with its records and its work below `root`."""
    provenance = {"command": "python benchmarks/paper.py run tiny.yaml", "machine": "a machine"}
    records = Records(experiment, root / "records")
    return Runner(experiment, records, laboratory, root / "work", provenance, {"/secret/": ""}, **options)
