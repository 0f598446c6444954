"""The tables that are committed are those that the committed records make."""

import pytest
from paper_cells import BENCHMARKS

from experiment import read_experiment  # isort: skip
from paper_report import write_paper_report  # isort: skip
from paper_results import read_results  # isort: skip
from records import Records  # isort: skip

RESULTS = BENCHMARKS / "results" / "paper"


# Those whose intervals are made in seconds; of `language` they take a minute and a half.
@pytest.mark.parametrize("name", ["ablation-unclipped", "vision-frozen-norms"])
def test_tables_are_those_of_the_records(name, tmp_path):
    experiment = read_experiment(BENCHMARKS / "paper" / f"{name}.yaml")
    command = f"python benchmarks/paper.py report benchmarks/paper/{name}.yaml"
    write_paper_report(read_results(experiment, Records(experiment, RESULTS)), tmp_path, command)
    for file in (f"{name}.md", f"{name}.csv", f"{name}_seeds.csv"):
        assert (tmp_path / file).read_text() == (RESULTS / file).read_text(), f"make it again: {command}"
