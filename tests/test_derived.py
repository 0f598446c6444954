"""Means over tasks and the hardest items, against hand computations on runs of known values."""

import json
import math

import numpy as np
import pytest
from flow_finetune import derived
from flow_finetune.report import write_report
from flow_finetune.results import COMMONSENSE as COMMONSENSE_NAME
from flow_finetune.results import MEAN_ACCURACY, OVERALL, cell, compare, load_runs, shown_metrics
from flow_finetune.statistics import Items, paired_difference, ratio_and_standard_error
from run_files import write_evaluation

N = 30


def columns(kind: str, seed: int) -> dict[str, Items]:
    """Items of one task; a task of the same kind and seed has the same ones."""
    rng = np.random.default_rng(seed)
    ids = [str(i) for i in range(N)]
    right = Items(ids, (rng.random(N) < 0.5).astype(float), np.ones(N))
    tokens = rng.integers(3, 20, N).astype(float)
    loss = Items(ids, tokens * rng.gamma(3.0, 0.5, N), tokens)
    if kind == "qa":
        # Answers only to the first 20.
        return {"nats_per_token": loss, "exact_match": Items(ids[:20], right.value[:20], np.ones(20))}
    if kind == "classification":
        return {"accuracy": right, "nats": Items(ids, loss.value / tokens, np.ones(N))}
    if kind == "completion":
        return {"nats_per_token": loss, "nats_per_byte": Items(ids, loss.value, 4 * tokens), "accuracy": right}
    if kind == "lm_eval":
        return {"acc": right, "nats": loss}
    return {"accuracy": right, "accuracy_bytes": Items(ids, right.value[::-1].copy(), np.ones(N))}


def make_run(directory, seed, tasks, trained) -> dict:
    found = [(*task, columns(task[1], 100 * seed + index)) for index, task in enumerate(tasks)]
    write_evaluation(directory, found)
    if trained:
        (directory / "train").mkdir()
        summary = {"method": {"name": directory.name, "weights": trained}, "model": "m"}
        (directory / "train" / "summary.json").write_text(json.dumps(summary))
    return {(name, metric): items for name, *_, metrics in found for metric, items in metrics.items()}


def three_runs(root, tasks):
    items = {name: make_run(root / name, seed, tasks, weights)
             for seed, (name, weights) in enumerate({"pre": None, "plain": "none", "flow": "sequence"}.items())}  # fmt: skip
    return load_runs([root / name for name in items]), items


LANGUAGE = [("sums", "qa", "target"), ("wiki", "completion", "retained"), ("blimp", "multiple_choice", "retained"),
            ("harness", "lm_eval", "retained"), *((name, "multiple_choice", "retained") for name in derived.COMMONSENSE)]  # fmt: skip


def metric_of(runs, label):
    return next(m for m in shown_metrics(runs) if m.label == label)


def check(runs, items, metric, parts):
    """A mean over tasks: value, error, difference, and the spread of the resampled differences."""
    for run in runs:
        found = cell(run, metric, runs)
        values = [items[run.name][key].value for _, key in parts]
        expected = sum(share * v.mean() for (share, _), v in zip(parts, values, strict=True))
        error = math.sqrt(sum(share**2 * v.var(ddof=1) / len(v) for (share, _), v in zip(parts, values, strict=True)))
        assert found.value == pytest.approx(100 * expected)
        assert found.standard_error == pytest.approx(100 * error)
    difference = compare(runs[2], runs[1], metric, runs)
    deltas = [items["flow"][key].value - items["plain"][key].value for _, key in parts]
    assert difference.difference == pytest.approx(
        100 * sum(s * d.mean() for (s, _), d in zip(parts, deltas, strict=True))
    )
    spread = math.sqrt(sum(s**2 * d.var() / len(d) for (s, _), d in zip(parts, deltas, strict=True)))
    assert difference.high - difference.low == pytest.approx(100 * 2 * 1.96 * spread, rel=0.06)


def test_means(tmp_path):
    runs, items = three_runs(tmp_path, LANGUAGE)
    six = [(name, "accuracy_bytes") for name in derived.COMMONSENSE]
    check(runs, items, metric_of(runs, f"{COMMONSENSE_NAME} (%)"), [(1 / 6, key) for key in six])
    retained = [("blimp", "accuracy_bytes"), ("harness", "acc"), *six]
    # The six together are one of three.
    shares = [1 / 3, 1 / 3, *[1 / 18] * 6]
    check(runs, items, metric_of(runs, f"{MEAN_ACCURACY} (%)"), list(zip(shares, retained, strict=True)))
    overall = [(share / 2, key) for share, key in zip(shares, retained, strict=True)]
    overall += [(1 / 2, ("sums", "exact_match"))]
    check(runs, items, metric_of(runs, f"{OVERALL} (%)"), overall)


def test_means_that_are_not_there(tmp_path):
    runs, _ = three_runs(tmp_path / "a", LANGUAGE[:4])
    labels = [m.label for m in shown_metrics(runs)]
    assert f"{MEAN_ACCURACY} (%)" in labels
    assert f"{COMMONSENSE_NAME} (%)" not in labels
    runs, _ = three_runs(tmp_path / "b", LANGUAGE[1:4])
    assert f"{OVERALL} (%)" not in [m.label for m in shown_metrics(runs)]


def test_hardest_items(tmp_path):
    runs, items = three_runs(tmp_path, LANGUAGE)
    before = items["pre"]["sums", "nats_per_token"]
    hard = np.argsort(-before.value / before.weight)[:3]
    metric = metric_of(runs, "sums hardest 10 %: loss (nats/token)")
    chosen = {name: Items(list("abc"), i["sums", "nats_per_token"].value[hard], i["sums", "nats_per_token"].weight[hard])
              for name, i in items.items()}  # fmt: skip
    for run in runs:
        found = cell(run, metric, runs)
        value, error = ratio_and_standard_error(chosen[run.name].value, chosen[run.name].weight)
        assert (found.value, found.standard_error) == (pytest.approx(value), pytest.approx(error))
    found = compare(runs[2], runs[1], metric, runs)
    assert found.difference == pytest.approx(paired_difference(chosen["flow"], chosen["plain"]).difference)
    # Twenty items were answered: the hardest two of them.
    hard = np.argsort(-(before.value / before.weight)[:20])[:2]
    metric = metric_of(runs, "sums hardest 10 %: exact match (%)")
    assert cell(runs[2], metric, runs).value == 100 * items["flow"]["sums", "exact_match"].value[hard].mean()


def test_images(tmp_path):
    """One retained accuracy: no mean over it, but the mean of it and the target's; loss and accuracy of the hardest."""
    runs, items = three_runs(
        tmp_path, [("cifar", "classification", "target"), ("source", "classification", "retained")]
    )
    labels = [m.label for m in shown_metrics(runs)]
    assert labels == [
        "cifar accuracy (%)", "cifar loss (nats)", "cifar hardest 10 %: loss (nats)", "cifar hardest 10 %: accuracy (%)",
        "source accuracy (%)", "source loss (nats)", f"{OVERALL} (%)",
    ]  # fmt: skip
    check(runs, items, metric_of(runs, f"{OVERALL} (%)"), [(0.5, (name, "accuracy")) for name in ("source", "cifar")])
    page = write_report([tmp_path / name for name in items], tmp_path / "report")
    assert "cifar hardest 10 %: accuracy (%)" in page.read_text()
    assert (tmp_path / "report" / "tradeoff.png").is_file()


def test_without_a_pretrained_run_nothing_is_hard(tmp_path):
    three_runs(tmp_path, LANGUAGE)
    runs = load_runs([tmp_path / "plain", tmp_path / "flow"])
    assert not any(m.hardest for m in shown_metrics(runs))


def test_which_accuracy_counts_and_under_which_names(tmp_path):
    names = [{"siqa": "social_iqa"}.get(name, name) for name in derived.COMMONSENSE]
    tasks = [("blimp", "multiple_choice", "retained"), *((name, "multiple_choice", "retained") for name in names)]
    runs, _ = three_runs(tmp_path, tasks)
    # BLiMP is of pairs of sentences, and the likelier one wins; the harness's name of SIQA is the paper's.
    assert derived.retained_mean(runs)[0] == (0.5, ("blimp", "accuracy"))
    assert derived.retained_mean(runs)[1:] == [(pytest.approx(1 / 12), (name, "accuracy_bytes")) for name in names]
    assert len(derived.commonsense(runs)) == 6
    both, _ = three_runs(tmp_path / "both", [*tasks, ("siqa", "multiple_choice", "retained")])
    assert {key for _, key in derived.retained_mean(both)} >= {
        ("siqa", "accuracy_bytes"),
        ("social_iqa", "accuracy_bytes"),
    }


def test_page(tmp_path):
    runs, items = three_runs(tmp_path / "runs", LANGUAGE)
    text = write_report([tmp_path / "runs" / name for name in items], tmp_path / "report").read_text()
    metric = metric_of(runs, "wiki loss (nats/byte)")
    value = cell(runs[1], metric, runs)
    assert f"{value.value:.3f} ± {value.standard_error:.3f}" in text
    assert "The commonsense average is the mean accuracy over hellaswag, arc_easy" in text
    assert "The hardest 10 % are the items of the target" in text
    assert "over blimp (33.3%), harness (33.3%), hellaswag (5.6%), arc_easy (5.6%)" in text
    # Accuracies of other kinds do not stand in the tables of multiple choice.
    head = next(line for line in text.splitlines() if line.startswith("| run | blimp"))
    assert head == f"| run | {' | '.join(['blimp', *derived.COMMONSENSE])} |"
