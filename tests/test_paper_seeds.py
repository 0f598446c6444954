"""The tables of an experiment when cells are missing or do not belong together."""

import csv
import json
import shutil
import statistics

import pytest
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from paper_cells import MAPPING, FakeLaboratory, make_runner, write_experiment

from experiment import Cell, read_experiment  # isort: skip
from paper_report import write_paper_report  # isort: skip
from paper_results import read_results  # isort: skip
from records import Records  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
LOSS = "test loss (nats/token)"


@pytest.fixture
def records(tiny_experiment, tmp_path):
    runner = make_runner(tiny_experiment, tmp_path, FakeLaboratory())
    assert runner.run(tiny_experiment.cells()) == ([], [])
    return Records(tiny_experiment, tmp_path / "records")


def remove(records, *cells):
    for cell in cells:
        shutil.rmtree(records.path / "cells" / cell)


def written(records):
    """The page, and the rows of the CSV file by name, of the loss alone."""
    root = records.path.parent
    page = write_paper_report(read_results(records.experiment, records), root, "command").read_text()
    with (root / "tiny.csv").open() as file:
        return page, {row["row"]: row for row in csv.DictReader(file) if row["metric"] == LOSS}


def loss(records, cell):
    items = read_items(records.path / "cells" / cell)[("test", "nats_per_token")]
    return items.value.sum() / items.weight.sum()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_without_the_baselines_first_seed_its_next_one_is_shown_and_compared_with(records):
    remove(records, "standard-seed0")
    page, table = written(records)
    assert [name for name in table if name.startswith("standard")] == ["standard (seed 1)"]
    assert float(table["standard (seed 1)"]["value"]) == pytest.approx(loss(records, "standard-seed1"), rel=1e-5)
    assert table["standard (seed 1)"]["difference"] == ""
    # A row that has that seed is shown with it, and the pre-trained model is compared with it.
    for name, cell in (("flow (seed 1)", "flow-seed1"), ("pretrained", "pretrained")):
        expected = loss(records, cell) - loss(records, "standard-seed1")
        assert float(table[name]["difference"]) == pytest.approx(expected, rel=1e-4)
    # One that lacks it keeps its value and has no difference: that of another seed would be of two causes.
    assert float(table["l2"]["value"]) == pytest.approx(loss(records, "l2-seed0"), rel=1e-5)
    assert table["l2"]["difference"] == ""
    assert "\n| l2 | - |" in page
    assert "- seeds without standard, so without a difference: wise-ft 0, l2 0, flow 0, fixed 0\n" in page


def test_a_row_without_its_first_seed_is_shown_with_its_next_one(records):
    remove(records, "flow-seed0")
    page, table = written(records)
    assert "flow" not in table
    expected = loss(records, "flow-seed1") - loss(records, "standard-seed1")
    assert float(table["flow (seed 1)"]["difference"]) == pytest.approx(expected, rel=1e-4)
    assert "seeds without standard" not in page


def test_without_any_cell_of_the_baseline_there_are_values_and_no_differences(records):
    remove(records, "standard-seed0", "standard-seed1", "standard-seed2")
    page, table = written(records)
    assert {row["difference"] for row in table.values()} == {""}
    assert "flow minus standard over seeds: not known, as they have no seed in common." in page


def test_fewer_than_two_common_seeds_are_said_to_be_too_few(records):
    remove(records, "standard-seed1")
    page, _ = written(records)
    assert "flow minus standard over seeds: not known, as they have only seed 0 in common." in page
    assert "- seeds without standard, so without a difference: flow 1\n" in page


def test_differences_over_seeds_have_their_standard_deviation(records):
    page, _ = written(records)
    each = [loss(records, f"flow-seed{seed}") - loss(records, f"standard-seed{seed}") for seed in (0, 1)]
    section = page.partition("flow minus standard, items averaged over seeds 0, 1")[2]
    cells = next(line for line in section.splitlines() if line.startswith(f"| {LOSS} |")).split(" | ")
    assert cells[2] == ", ".join(f"{d:+.3f}" for d in each)
    assert cells[3] == f"{statistics.stdev(each):.3f} |"


@pytest.mark.parametrize(
    ("file", "keys", "kind"),
    [
        ("fixed-seed0/train/summary.json", ("fingerprints", "data"), "data"),
        ("fixed-seed0/train/summary.json", ("fingerprints", "template"), "template"),
        ("fixed-seed0/train/summary.json", ("fingerprints", "model"), "model"),
        ("pretrained/evaluation.json", ("fingerprints", "model"), "model"),
        ("pretrained/evaluation.json", ("fingerprints", "tokenizer"), "tokenizer"),
    ],
)
def test_records_of_another_start_are_refused(records, file, keys, kind):
    edit(records.path / "cells" / file, lambda content: content[keys[0]].update({keys[1]: "another"}))
    with pytest.raises(InputError, match=f"their {kind} differs: .*{file.partition('/')[0]}"):
        read_results(records.experiment, records)


def test_the_protocol_has_every_setting_and_commit(records):
    edit(records.path / "cells/fixed-seed0/cell.json", lambda content: content.update({"commit": "abc1234+"}))
    page, _ = written(records)
    line = next(line for line in page.splitlines() if line.startswith("- train: "))
    # batch_size is the record's, warmup a default that neither file nor record names; the rate is each cell's own.
    assert {"epochs 2", "batch_size 4", "warmup 0.03"} <= set(line.removeprefix("- train: ").split(", "))
    assert "learning_rate" not in line
    assert "\n- commit abc1234+: fixed-seed0\n" in page
    assert "\n- commit not recorded: pretrained, standard-seed0, " in page
    edit(records.path / "cells/fixed-seed0/train/summary.json", lambda content: content["train"].update({"epochs": 3}))
    page, _ = written(records)
    lines = [line for line in page.splitlines() if line.startswith("- train: ")]
    assert len(lines) == 2
    assert "epochs 3," in lines[1]
    assert lines[1].endswith(" (fixed-seed0)")


def test_an_average_of_a_row_that_was_redefined_is_refused(tmp_path):
    def experiment(**options):
        rows = [*MAPPING["rows"][:-1], {"name": "fixed", "weights": "sequence", "learning_rate": 2e-5, **options},
                {"name": "average", "of": "fixed", "wise_ft": 0.5}]  # fmt: skip
        return read_experiment(write_experiment(tmp_path / "tiny.yaml", {**MAPPING, "rows": rows}))

    before = experiment()
    make_runner(before, tmp_path, FakeLaboratory()).run(before.cells())
    after = experiment(direction="hard")
    with pytest.raises(InputError, match="average-seed0 was made with another averaged_method"):
        Records(after, tmp_path / "records").read(Cell(after.row("average")))
    assert Records(before, tmp_path / "records").read(Cell(before.row("average"))) is not None


def test_a_row_is_compared_with_the_one_that_it_names(tmp_path):
    """On the first seed that both have, from their items."""
    rows = [{**row, **({"compare_with": "l2"} if row["name"] in ("flow", "fixed") else {})} for row in MAPPING["rows"]]
    experiment = read_experiment(write_experiment(tmp_path / "tiny.yaml", {**MAPPING, "rows": rows}))
    assert make_runner(experiment, tmp_path, FakeLaboratory()).run(experiment.cells()) == ([], [])
    records = Records(experiment, tmp_path / "records")
    remove(records, "fixed-seed0")
    page, _ = written(records)
    section = page.partition("## Combinations\n")[2].partition("\n## ")[0]
    assert "| metric | flow - l2 |" in section
    line = next(line for line in section.splitlines() if line.startswith(f"| {LOSS}"))
    expected = loss(records, "flow-seed0") - loss(records, "l2-seed0")
    assert float(line.split("|")[2].strip(" *").split()[0]) == pytest.approx(expected, abs=6e-4)
    remove(records, "l2-seed0")
    assert "Combinations" not in written(Records(experiment, tmp_path / "records"))[0]


def test_the_cost_has_the_searches_in_it(records):
    for path in records.path.rglob("cell.json"):
        edit(path, lambda record, path=path: record["seconds"].update(cell=100 if "search" in path.parts else 3600))
    page, _ = written(Records(records.experiment, records.path.parent))
    # Nine cells and five learning rates.
    assert " 5 learning rates were tried in 500 s. All together 9.1 h." in page
