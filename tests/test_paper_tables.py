"""The tables that are committed are those that the committed records make."""

import csv
import re

import pytest
from flow_finetune import statistics
from paper_cells import BENCHMARKS

from experiment import read_experiment  # isort: skip
from paper_report import write_paper_report  # isort: skip
from paper_results import read_results  # isort: skip
from records import Records  # isort: skip

RESULTS = BENCHMARKS / "results" / "paper"
COMMITTED = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "README")


def _report_again(name, directory):
    """The names of what the report writes, made again into `directory`, and the command that it names."""
    experiment = read_experiment(BENCHMARKS / "paper" / f"{name}.yaml")
    command = f"python benchmarks/paper.py report benchmarks/paper/{name}.yaml"
    write_paper_report(read_results(experiment, Records(experiment, RESULTS)), directory, command)
    return (f"{name}.md", f"{name}.csv", f"{name}_seeds.csv"), command


# Those whose intervals are made in seconds; of `language` they take a minute and a half.
@pytest.mark.parametrize("name", ["ablation-unclipped", "vision-frozen-norms"])
def test_tables_are_those_of_the_records(name, tmp_path):
    files, command = _report_again(name, tmp_path)
    for file in files:
        assert (tmp_path / file).read_text() == (RESULTS / file).read_text(), f"make it again: {command}"


@pytest.mark.parametrize("name", COMMITTED)
def test_all_but_the_intervals_is_that_of_the_records(name, tmp_path, monkeypatch):
    bootstrap = statistics._bootstrap
    monkeypatch.setattr(statistics, "_bootstrap", lambda a, b, transform, _, seed: bootstrap(a, b, transform, 2, seed))
    files, command = _report_again(name, tmp_path)
    for file in files:
        made, committed = (_without_intervals((d / file).read_text()) for d in (tmp_path, RESULTS))
        assert made == committed, f"make it again: {command}"


def _without_intervals(text):
    """A page without intervals and what is said of them; of a CSV file the columns that do not depend on them."""
    if not text.startswith("#"):
        rows = csv.DictReader(text.splitlines())
        return [{k: v for k, v in row.items() if k not in ("low", "high", "verdict")} for row in rows]
    return re.sub(r" \[[^\]]*\]| (better|worse)\b|\*\*", "", text)


def test_there_are_the_three_tables_of_the_paper():
    assert {"language", "vision", "ablation"} <= set(COMMITTED)
    for name in COMMITTED:
        assert (RESULTS / f"{name}_tradeoff.png").read_bytes().startswith(b"\x89PNG")
