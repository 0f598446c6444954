"""Directories of runs: what must be the same in those of two trainings, and one as `evaluate` leaves it."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
from flow_finetune.statistics import ratio_and_standard_error


def assert_same_files(undisturbed, continued):
    """Weights and everything transformers reads are the same bytes; the log agrees in all but its timings."""
    names = sorted(p.name for p in undisturbed.iterdir() if p.is_file())
    assert "model.safetensors" in names
    assert sorted(p.name for p in continued.iterdir() if p.is_file()) == names
    for name in names:
        assert (continued / name).read_bytes() == (undisturbed / name).read_bytes(), name
    timings = {"tokens_per_second", "peak_memory_bytes"}
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in timings}
            for line in (directory / "train/log.jsonl").read_text().splitlines()
        ]
        for directory in (undisturbed, continued)
    ]
    assert logs[0] == logs[1]


def write_evaluation(directory, tasks, *, fingerprint="f", fingerprints=None):
    """`evaluation.json` and `items.parquet` of `tasks`, each `(name, kind, role, {metric: Items})`."""
    directory.mkdir(parents=True)
    records, rows = [], []
    for name, kind, role, found in tasks:
        metrics = {}
        for metric, items in found.items():
            value, error = ratio_and_standard_error(items.value, items.weight)
            metrics[metric] = {"value": value, "standard_error": error, "num_items": len(items.ids)}
            rows += [(name, metric, *item) for item in zip(items.ids, items.value, items.weight, strict=True)]
        if kind == "perplexity":
            value, error = math.exp(metrics["nats_per_token"]["value"]), metrics["nats_per_token"]["standard_error"]
            metrics["perplexity"] = {**metrics["nats_per_token"], "value": value, "standard_error": value * error}
        num_items = max(len(items.ids) for items in found.values())
        records.append({"name": name, "kind": kind, "role": role, "source": name, "num_items": num_items,
                        "seconds": 1.0, "fingerprint": fingerprint, "metrics": metrics})  # fmt: skip
    evaluation = {"model": "base", "fingerprints": fingerprints or {}, "tasks": records}
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    names = ("task", "metric", "item", "value", "weight")
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table({n: list(c) for n, c in zip(names, columns, strict=True)}), directory / "items.parquet")
