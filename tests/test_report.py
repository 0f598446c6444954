"""The page and the table hold the right numbers, the pictures are pictures, and bad input is named."""

import dataclasses
import importlib.util
import io
import json
import math
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flow_finetune import pipeline, plots
from flow_finetune.errors import InputError
from flow_finetune.report import summary_table, write_report
from flow_finetune.results import find_pretrained, load_runs
from flow_finetune.statistics import Items, paired_difference, ratio_and_standard_error
from flow_finetune.vision import pipeline as vision_pipeline
from rich.console import Console
from run_files import write_evaluation

TASKS = (("sums", "qa", "target"), ("wiki", "perplexity", "retained"), ("arc", "multiple_choice", "retained"),
         ("piqa", "multiple_choice", "retained"))  # fmt: skip


def make_items(task, kind, seed, shift) -> dict[str, Items]:
    """Items that two runs share up to `shift`."""
    shared = np.random.default_rng(len(task) * 7)
    own = np.random.default_rng(seed)
    n = 40
    ids = [str(i) for i in range(n)]
    tokens = shared.integers(5, 50, n).astype(float)
    loss = tokens * (shared.uniform(1, 3, n) + shift + own.normal(0, 0.02, n))
    right = ((shared.random(n) + own.normal(0, 0.05, n) - shift / 5) > 0.5).astype(float)
    if kind == "perplexity":
        return {"nats_per_token": Items(ids, loss, tokens)}
    if kind == "multiple_choice":
        return {"accuracy": Items(ids, right, np.ones(n)), "accuracy_bytes": Items(ids, np.roll(right, 1), np.ones(n))}
    return {"nats_per_token": Items(ids, loss, tokens), "token_accuracy": Items(ids, np.floor(tokens / 2), tokens),
            "exact_match": Items(ids[:20], right[:20], np.ones(20))}  # fmt: skip


def make_run(directory, seed, shifts, weights=None, fingerprint="f", skip=(), **options) -> dict:
    """A run directory as `evaluate` and `train` leave it; returns its items."""
    found = [(*task, make_items(*task[:2], seed, shifts[task[2]])) for task in TASKS if task[0] not in skip]
    write_evaluation(directory, found, fingerprint=fingerprint, fingerprints={"model": "m", "tokenizer": "t"})
    if weights is not None:
        (directory / "train").mkdir()
        summary = {"method": {"name": directory.name, "weights": weights, **options}, "train": {"learning_rate": 1e-5},
                   "num_steps": 48,
                   "num_samples": 256, "temperature": 1.5, "mean_weight": 0.3721, "effective_sample_size": 228.4,
                   "seconds": 1234.5, "tokens_per_second": 500.0, "final_loss": 0.8, "model": "the/base"}  # fmt: skip
        (directory / "train" / "summary.json").write_text(json.dumps(summary))
        lines = [{"step": s, "epoch": 0, "loss": 2 / s, "weighted_loss": 1 / s, "grad_norm": 1.0,
                  "learning_rate": 1e-4, "distance": None} for s in range(1, 20)]  # fmt: skip
        (directory / "train" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {(name, metric): items for name, *_, metrics in found for metric, items in metrics.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained, standard and FLOW: directories and items."""
    root = tmp_path_factory.mktemp("runs")
    items = {
        "untrained": make_run(root / "untrained", 1, {"target": 0.8, "retained": 0.0}),
        "plain": make_run(root / "plain", 2, {"target": 0.0, "retained": 0.3}, "none"),
        "flow": make_run(root / "flow", 3, {"target": 0.05, "retained": 0.1}, "sequence", learning_rate=2e-5),
    }
    return [root / name for name in items], items


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """A score file with losses and extremes."""
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    loss = np.random.default_rng(0).gamma(9.0, 0.2, 300)
    extremes = {
        "easiest": [{"id": "17", "loss": 0.25, "prompt": "easy | prompt", "response": "a ``` fence ```` of\n# text"}],
        "hardest": [{"id": "x9", "loss": 5.0, "prompt": "p" * 5000, "response": "hard response"}],
    }
    metadata = {"temperature": 1.75, "extremes": extremes, "num_read": 300}
    table = pa.table({"id": [str(i) for i in range(300)], "loss": loss})
    pq.write_table(table.replace_schema_metadata({b"flow_finetune": json.dumps(metadata)}), path)
    return path


@pytest.fixture(scope="module")
def page(runs, scores, tmp_path_factory):
    """The report of the three runs."""
    return write_report(runs[0], tmp_path_factory.mktemp("report"), scores=scores)


def tables(text) -> list[dict[str, dict[str, str]]]:
    """Every Markdown table as {row name: {column: cell}}; rows must be as wide as their head."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in block.strip().splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}
        found.append({row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]})
    return found


def test_results_table(page, runs):
    results, by_bytes, plain, *_ = tables(page.read_text())
    assert list(results) == ["untrained", "plain", "flow"]
    for name, items in runs[1].items():
        row = results[name]
        value, error = ratio_and_standard_error(
            items["sums", "nats_per_token"].value, items["sums", "nats_per_token"].weight
        )
        assert row["sums loss (nats/token)"] == f"{value:.3f} ± {error:.3f}"
        value, error = ratio_and_standard_error(
            items["wiki", "nats_per_token"].value, items["wiki", "nats_per_token"].weight
        )
        assert row["wiki perplexity"] == f"{math.exp(value):.2f} ± {math.exp(value) * error:.2f}"
        right = items["sums", "exact_match"].value
        assert row["sums exact match (%)"] == f"{100 * right.mean():.2f} ± {100 * right.std(ddof=1) / 20**0.5:.2f}"
        kept = [items[task, "accuracy_bytes"].value for task in ("arc", "piqa")]
        error = math.sqrt(sum(v.var(ddof=1) / 40 for v in kept)) / 2
        assert row["mean retained accuracy (%)"] == f"{100 * np.mean(kept):.2f} ± {100 * error:.2f}"
        for table, metric in ((by_bytes, "accuracy_bytes"), (plain, "accuracy")):
            v = items["piqa", metric].value
            assert table[name]["piqa"] == f"{100 * v.mean():.2f} ± {100 * v.std(ddof=1) / 40**0.5:.2f}"
    assert results["untrained"]["seconds"] == "-"
    assert results["flow"]["seconds"] == "1,234"
    assert results["flow"]["mean(w)"] == "0.372"
    assert results["flow"]["effective sample size"] == "228"
    # A method's own rate goes before that of all.
    assert [results[n]["learning rate"] for n in ("untrained", "plain", "flow")] == ["-", "1e-05", "2e-05"]


def test_paired_differences(page, runs):
    text, items = page.read_text(), runs[1]
    assert text.index("### Against plain") < text.index("### Against untrained")
    against_plain, against_untrained = tables(text)[3:5]
    assert set(against_plain["wiki perplexity"]) == {"flow - plain"}
    assert set(against_untrained["wiki perplexity"]) == {"plain - untrained", "flow - untrained"}
    d = paired_difference(
        items["flow"]["wiki", "nats_per_token"], items["plain"]["wiki", "nats_per_token"], transform=np.exp
    )
    assert d.high < 0
    shown = f"**{d.difference:+.2f} [{d.low:+.2f}, {d.high:+.2f}] better**"
    assert against_plain["wiki perplexity"]["flow - plain"] == shown
    d = paired_difference(items["flow"]["sums", "nats_per_token"], items["plain"]["sums", "nats_per_token"])
    assert d.low > 0
    shown = f"**{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}] worse**"
    assert against_plain["sums loss (nats/token)"]["flow - plain"] == shown
    d = paired_difference(items["flow"]["arc", "accuracy"], items["plain"]["arc", "accuracy"])
    shown = f"{100 * d.difference:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
    if d.excludes_zero:
        shown = f"**{shown} {'better' if d.difference > 0 else 'worse'}**"
    assert against_plain["arc accuracy (%)"]["flow - plain"] == shown
    # Equal items: no difference, no mark.
    assert against_plain["sums token accuracy (%)"]["flow - plain"] == "+0.00 [+0.00, +0.00]"
    arc, piqa = (
        (items["plain"][t, "accuracy_bytes"].value - items["untrained"][t, "accuracy_bytes"].value).mean()
        for t in ("arc", "piqa")
    )
    assert f"{50 * (arc + piqa):+.2f} [" in against_untrained["mean retained accuracy (%)"]["plain - untrained"]


def test_pictures(page):
    linked = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    assert linked == ["tradeoff.png", "losses.png", "training.png"]
    for name in linked:
        content = (page.parent / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 600 <= width <= 1100
        assert height >= 400
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*linked, "report.md"])


def test_the_legend_names_runs_that_one_panel_lacks(runs, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    a, b = load_runs(runs[0])[1:3]
    kept = [task for task in b.evaluation["tasks"] if task["kind"] != "perplexity"]
    b = dataclasses.replace(b, evaluation={**b.evaluation, "tasks": kept})
    assert plots.plot_tradeoff([a, b], tmp_path / "tradeoff.png")
    (figure,) = figures
    drawn = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert [a.name] in drawn
    assert [a.name, b.name] in drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [a.name, b.name]


def test_samples_are_shown_as_text(page):
    text = page.read_text()
    assert f"Sample 17: 0.250 nats/token, w = {math.exp(-0.25 / 1.75):.3f}" in text
    assert f"Sample x9: 5.000 nats/token, w = {math.exp(-5 / 1.75):.3f}" in text
    # Five backticks, because the text holds four.
    assert "\n`````text\neasy | prompt\n→ a ``` fence ```` of\n# text\n`````\n" in text
    assert "p" * 600 in text
    assert "p" * 1000 not in text


def test_baseline_by_name(runs, tmp_path):
    text = write_report(runs[0], tmp_path, baseline="flow").read_text()
    assert "### Against flow" in text
    assert "plain - flow" in text
    with pytest.raises(InputError, match=r"no run 'x' to compare with; there are untrained, plain, flow"):
        write_report(runs[0], tmp_path, baseline="x")


def test_a_method_without_weights_is_no_baseline_unless_it_is_plain(runs, tmp_path):
    make_run(tmp_path / "l2", 6, {"target": 0.0, "retained": 0.0}, "none", penalty="l2")
    text = write_report([tmp_path / "l2", *runs[0]], tmp_path / "report").read_text()
    assert "### Against plain" in text
    assert "### Against l2" not in text


def test_untrained_runs_alone(runs, tmp_path):
    text = write_report(runs[0][:1], tmp_path).read_text()
    assert "Paired" not in text
    assert "training.png" not in text
    assert "untrained" in tables(text)[0]


def test_runs_may_lack_a_task(runs, tmp_path):
    make_run(tmp_path / "short", 5, {"target": 0.0, "retained": 0.0}, "sequence", skip=("wiki", "piqa"))
    text = write_report([*runs[0], tmp_path / "short"], tmp_path / "report").read_text()
    results, *_, against_plain, _ = tables(text)
    assert results["short"]["wiki perplexity"] == "-"
    assert results["flow"]["wiki perplexity"] != "-"
    assert against_plain["wiki perplexity"]["short - plain"] == "-"
    assert against_plain["sums loss (nats/token)"]["short - plain"] != "-"
    # One common retained task is no mean.
    assert "mean retained accuracy (%)" not in results["flow"]


def test_summary_table(runs, page):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(runs[0]))
    text = console.export_text()
    results, by_bytes, *_, against_plain, _ = tables(page.read_text())
    line = next(line for line in text.splitlines() if "sums loss" in line)
    for name in ("untrained", "plain", "flow"):
        assert results[name]["sums loss (nats/token)"] in line
    assert against_plain["sums loss (nats/token)"]["flow - plain"].strip("*").removesuffix(" worse") + "*" in line
    line = next(line for line in text.splitlines() if "piqa accuracy/byte" in line)
    assert by_bytes["flow"]["piqa"] in line
    line = next(line for line in text.splitlines() if "seconds" in line)
    assert line.count("1,234") == 2


def test_bad_runs(runs, scores, tmp_path):
    (tmp_path / "nothing").mkdir()
    make_run(tmp_path / "a" / "flow", 1, {"target": 0.0, "retained": 0.0})
    make_run(tmp_path / "other", 1, {"target": 0.0, "retained": 0.0}, fingerprint="g")
    make_run(tmp_path / "torn", 1, {"target": 0.0, "retained": 0.0})
    (tmp_path / "torn" / "evaluation.json").write_text('{"tasks": [')
    make_run(tmp_path / "bare", 1, {"target": 0.0, "retained": 0.0})
    (tmp_path / "bare" / "items.parquet").unlink()
    cases = [
        ([], "no runs to report"),
        ([tmp_path / "nothing"], "nothing is not an evaluated run: it has no evaluation.json"),
        ([runs[0][2], tmp_path / "a" / "flow"], "two runs are named 'flow'"),
        ([runs[0][0], tmp_path / "other"], "'untrained' and 'other' were not evaluated on the same tokens of 'sums'"),
        ([tmp_path / "torn"], "evaluation.json is damaged"),
        ([tmp_path / "bare"], "bare has no items.parquet"),
    ]
    for directories, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            write_report(directories, tmp_path / "out")
    with pytest.raises(InputError, match=r"no such file: .*none.parquet"):
        write_report(runs[0], tmp_path / "out", scores=tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"items.parquet is not a score file"):
        write_report(runs[0], tmp_path / "out", scores=runs[0][0] / "items.parquet")
    assert not (tmp_path / "out").exists()


def test_runs_evaluated_in_another_way_are_refused(tmp_path):
    for name, precision in (("half", "bf16"), ("whole", "full"), ("old", None)):
        make_run(tmp_path / name, 1, {"target": 0.0, "retained": 0.0})
        path = tmp_path / name / "evaluation.json"
        evaluation = json.loads(path.read_text())
        if precision is not None:
            evaluation["tasks"][1]["settings"] = {"precision": precision}
        path.write_text(json.dumps(evaluation))
    with pytest.raises(InputError, match="'half' and 'whole' were evaluated on 'wiki' with another precision"):
        load_runs([tmp_path / "half", tmp_path / "whole"])
    # An older evaluation does not say, and does not hide what the others do.
    assert len(load_runs([tmp_path / "half", tmp_path / "old"])) == 2
    with pytest.raises(InputError, match="'half' and 'whole' were evaluated on 'wiki' with another precision"):
        load_runs([tmp_path / "old", tmp_path / "half", tmp_path / "whole"])


def test_the_pretrained_model_is_the_one_that_was_trained_from(tmp_path):
    for name, model in (("other", "x"), ("untrained", "m")):
        make_run(tmp_path / name, 1, {"target": 0.8, "retained": 0.0})
        path = tmp_path / name / "evaluation.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprints": {"model": model}}))
    make_run(tmp_path / "plain", 2, {"target": 0.0, "retained": 0.3}, "none")
    summary = tmp_path / "plain/train/summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "fingerprints": {"model": "m"}}))
    paths = {name: tmp_path / name for name in ("other", "untrained", "plain")}
    assert find_pretrained(load_runs(list(paths.values()))).name == "untrained"
    said = "other is not the model that the trained runs started from"
    assert said in write_report([paths["other"], paths["plain"]], tmp_path / "a").read_text()
    assert said not in write_report(list(paths.values()), tmp_path / "b").read_text()


def test_without_matplotlib(runs, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(InputError, match="plots need matplotlib: pip install matplotlib"):
        write_report(runs[0], tmp_path / "out")
    # A run says it before anything is made, not after hours of training.
    for run, config in ((pipeline.run, None), (vision_pipeline.run, None)):
        with pytest.raises(InputError, match="plots need matplotlib"):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # The terminal's table needs none.
    assert summary_table(runs[0]).row_count > 5


def test_load_runs_reads_everything(runs):
    loaded = load_runs(runs[0])
    assert [run.name for run in loaded] == ["untrained", "plain", "flow"]
    assert loaded[0].summary is None
    assert loaded[2].summary["method"]["weights"] == "sequence"
    assert [entry["step"] for entry in loaded[2].log] == list(range(1, 20))
    np.testing.assert_array_equal(
        loaded[2].items["wiki", "nats_per_token"].value, runs[1]["flow"]["wiki", "nats_per_token"].value
    )


def test_metrics_of_fewer_items_say_so(page):
    """20 of the 40 sums were answered: that is what their exact match is of, and 2 of them the hardest."""
    text = " ".join(page.read_text().split())
    assert "sums (40, 20 of them for exact_match)" in text
    assert "the same for every run (4 of loss, 2 of exact match)" in text


def test_the_panel_of_image_accuracies_is_of_images(runs):
    from flow_finetune import plots
    from flow_finetune.results import Metric

    def metric(task, name, role, kind):
        return Metric(task, name, role, f"{task} {name} (%)", True, kind)

    language = [
        metric("arc", "accuracy", "target", "multiple_choice"),
        metric("code", "accuracy", "retained", "completion"),
    ]
    images = [metric(t, "accuracy", r, "classification") for t, r in (("cifar10", "target"), ("imagenet", "retained"))]
    assert plots.panels_of(language) == []
    assert [(x.task, y.task) for x, y in plots.panels_of(images)] == [("cifar10", "imagenet")]
    assert [(x.task, y.task) for x, y in plots.panels_of([*language, *images])] == [("cifar10", "imagenet")]
