"""The runner of experiments: which cells are run, once; how learning rates are chosen; what a killed call leaves."""

import json
import math
import re
import shutil

import pytest
from flow_finetune.errors import DivergedError, InputError
from paper_cells import MAPPING, FakeLaboratory, Killed, make_runner, write_experiment

from experiment import Cell, read_experiment, select, shard  # isort: skip
from paper_report import write_paper_report  # isort: skip
from paper_results import read_results  # isort: skip
from records import Records, locked  # isort: skip

pytestmark = pytest.mark.usefixtures("no_sync")


def test_cells_come_after_what_they_need(tiny_experiment):
    assert [cell.key for cell in tiny_experiment.cells()] == [
        "cells/pretrained", "search/standard-lr1e-05", "search/standard-lr3e-05", "search/standard-lr0.0001",
        "search/flow-lr1e-05", "search/flow-lr0.001", "cells/standard-seed0", "cells/standard-seed1",
        "cells/standard-seed2", "cells/l2-seed0", "cells/flow-seed0", "cells/flow-seed1", "cells/fixed-seed0",
        "cells/wise-ft-seed0",
    ]  # fmt: skip


def test_finished_cells_are_not_run_again_and_a_killed_run_continues(tiny_experiment, tmp_path):
    undisturbed = FakeLaboratory()
    failed, left = make_runner(tiny_experiment, tmp_path / "a", undisturbed).run(tiny_experiment.cells())
    assert (failed, left) == ([], [])
    # 5 trials, 7 trainings, 1 average, 8 evaluations, the pre-trained model.
    assert len(undisturbed.calls) == len(set(undisturbed.calls)) == 5 + 7 + 1 + 8 + 1
    again = FakeLaboratory(dies_at=1)
    assert make_runner(tiny_experiment, tmp_path / "a", again).run(tiny_experiment.cells()) == ([], [])
    assert again.calls == []

    for dies_at in (1, 4, 9, 20):
        root = tmp_path / f"killed-{dies_at}"
        first, second = FakeLaboratory(dies_at), FakeLaboratory()
        with pytest.raises(Killed):
            make_runner(tiny_experiment, root, first).run(tiny_experiment.cells())
        assert make_runner(tiny_experiment, root, second).run(tiny_experiment.cells()) == ([], [])
        # Only the call that was killed is made twice.
        assert sorted(first.calls[:-1] + second.calls, key=str) == sorted(undisturbed.calls, key=str)
        # 2 s of training, whichever call did it, and two tasks of 1.5 s.
        record = json.loads((root / "records/tiny/cells/flow-seed0/cell.json").read_text())
        assert record["seconds"]["cell"] == pytest.approx(5.0)


def test_the_learning_rate_is_the_lowest_validation_loss_of_the_own_or_named_search(tiny_experiment, tmp_path):
    laboratory = FakeLaboratory()
    runner = make_runner(tiny_experiment, tmp_path, laboratory)
    runner.run(tiny_experiment.cells())
    used = {call[1]: call[2] for call in laboratory.calls if call[0] == "train" and "-seed0" in call[1]}
    assert used == {"standard-seed0": 3e-5, "l2-seed0": 3e-5, "flow-seed0": 1e-5, "fixed-seed0": 2e-5}
    losses = runner.records.search_losses(tiny_experiment.row("standard"))
    assert losses == pytest.approx({rate: 1 + math.log(rate / 3e-5) ** 2 for rate in (1e-5, 3e-5, 1e-4)})


@pytest.mark.parametrize(
    ("samples", "file", "change"),
    [
        ("validation", "evaluation.json", lambda found: found["tasks"][0].update(fingerprint="another machine's")),
        ("training", "train/summary.json", lambda found: found.update(fingerprints={"data": "another machine's"})),
    ],
)
def test_losses_of_different_samples_are_not_compared(tiny_experiment, tmp_path, samples, file, change):
    make_runner(tiny_experiment, tmp_path, FakeLaboratory()).run(tiny_experiment.cells())
    path = tmp_path / "records/tiny/search/flow-lr0.001" / file
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    records = Records(tiny_experiment, tmp_path / "records")
    records.search_losses(tiny_experiment.row("standard"))
    with pytest.raises(
        InputError, match=rf"learning rates of flow were tried on different {samples} samples.*flow-lr\*"
    ):
        records.search_losses(tiny_experiment.row("flow"))


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
        runner = make_runner(tiny_experiment, tmp_path / part.replace("/", "-"), laboratory)
        runner.records.path = tmp_path / "exchanged"
        failed, left = runner.run(select(tiny_experiment, part=part))
        calls += laboratory.calls
    assert (failed, left) == ([], [])
    assert len(calls) == len(set(calls))
    assert all((tmp_path / "exchanged" / key / "cell.json").is_file() for key in everything)


def test_only_some_rows_and_seeds_bring_what_they_need(tiny_experiment):
    keys = [cell.key for cell in select(tiny_experiment, only=["wise-ft"])]
    assert keys == ["cells/pretrained", "search/standard-lr1e-05", "search/standard-lr3e-05", "search/standard-lr0.0001",
                    "cells/standard-seed0", "cells/wise-ft-seed0"]  # fmt: skip
    assert [c.key for c in select(tiny_experiment, only=["fixed"], seeds=[0])] == [
        "cells/pretrained", "cells/fixed-seed0",
    ]  # fmt: skip
    with pytest.raises(InputError, match="has no row 'adam'"):
        select(tiny_experiment, only=["adam"])


def test_a_cell_that_another_process_makes_is_left_to_it(tiny_experiment, tmp_path):
    laboratory = FakeLaboratory()
    runner = make_runner(tiny_experiment, tmp_path, laboratory)
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

    runner = make_runner(tiny_experiment, tmp_path, FakeLaboratory())
    runner.run(select(tiny_experiment, only=["standard", "l2"]))
    assert models(tmp_path) == ["standard-seed0"]
    runner.run(tiny_experiment.cells())
    assert models(tmp_path) == []
    make_runner(tiny_experiment, tmp_path / "kept", FakeLaboratory(), keep_models=True).run(tiny_experiment.cells())
    assert len(models(tmp_path / "kept")) == 5 + 8

    # A row that comes later trains its model again, but does not evaluate it again.
    shutil.rmtree(tmp_path / "records/tiny/cells/wise-ft-seed0")
    laboratory = FakeLaboratory()
    make_runner(tiny_experiment, tmp_path, laboratory).run(tiny_experiment.cells())
    assert laboratory.calls == [
        ("train", "standard-seed0", 3e-5), ("average", "wise-ft"), ("evaluate", "wise-ft-seed0"),
    ]  # fmt: skip


class Diverging(FakeLaboratory):
    """Trains `flow` at the `rates` into a loss that is NaN."""

    rates = (1e-5,)

    def train(self, method, seed, directory):
        if method.name == "flow" and method.learning_rate in self.rates:
            self._call("diverged", directory.name)
            raise DivergedError("the loss is nan")
        super().train(method, seed, directory)


def test_a_learning_rate_that_diverges_is_not_taken_and_not_tried_again(tiny_experiment, tmp_path):
    runner = make_runner(tiny_experiment, tmp_path, laboratory := Diverging())
    assert runner.run(tiny_experiment.cells()) == ([], [])
    # 1e-5 would have been the better one.
    assert ("train", "flow-seed0", 1e-3) in laboratory.calls
    assert runner.records.search_losses(tiny_experiment.row("flow"))[1e-5] == math.inf
    assert runner.records.read(Cell(tiny_experiment.row("flow"), 0, 1e-5))["validation_loss"] is None
    again = FakeLaboratory(dies_at=1)
    assert make_runner(tiny_experiment, tmp_path, again).run(tiny_experiment.cells()) == ([], [])
    page = write_paper_report(read_results(tiny_experiment, runner.records), tmp_path / "records", "command")
    assert "1e-05: diverged, 0.001: " in page.read_text()


def test_a_failed_cell_does_not_stop_the_others(tiny_experiment, tmp_path):
    class Failing(Diverging):
        rates = (1e-5, 1e-3)

    runner = make_runner(tiny_experiment, tmp_path, Failing())
    failed, left = runner.run(tiny_experiment.cells())
    assert [cell.key for cell in failed] == ["cells/flow-seed0", "cells/flow-seed1"]
    assert left == []
    with pytest.raises(InputError, match="flow diverged at every learning rate of its grid; add lower ones"):
        runner.records.learning_rate(failed[0])


def test_a_wider_grid_keeps_what_is_finished_as_long_as_the_choice_stays(tiny_experiment, tmp_path):
    make_runner(tiny_experiment, tmp_path, FakeLaboratory()).run(tiny_experiment.cells())
    worse, laboratory = _with_rate(tmp_path, "flow", 1e-2), FakeLaboratory()
    assert make_runner(worse, tmp_path, laboratory).run(worse.cells()) == ([], [])
    assert laboratory.calls == [("train", "flow-lr0.01", 1e-2)]


def _with_rate(root, row, rate):
    """The experiment with one more learning rate in the grid of `row`."""
    rows = [{**r, "learning_rates": [*r["learning_rates"], rate]} if r["name"] == row else r for r in MAPPING["rows"]]
    return read_experiment(write_experiment(root / "tiny.yaml", {**MAPPING, "rows": rows}))


def test_where_a_wider_grid_changes_the_choice_only_the_cells_of_the_old_one_fail(tiny_experiment, tmp_path, capfd):
    make_runner(tiny_experiment, tmp_path, FakeLaboratory(), keep_models=True).run(tiny_experiment.cells())
    shutil.rmtree(tmp_path / "records/tiny/cells/fixed-seed0")

    class Better(FakeLaboratory):
        """Whatever it tries out is better than what was tried before."""

        def try_out(self, method, seed, directory):
            return super().try_out(method, seed, directory) - 0.5

    better, laboratory = _with_rate(tmp_path, "standard", 2e-5), Better()
    runner = make_runner(better, tmp_path, laboratory)
    failed, left = runner.run(better.cells())
    old = ["standard-seed0", "standard-seed1", "standard-seed2", "l2-seed0", "wise-ft-seed0"]
    assert ([cell.key for cell in failed], left) == ([f"cells/{name}" for name in old], [])
    # The new rate is recorded and its cell not called failed; what does not depend on the choice is made.
    assert laboratory.calls == [("train", "standard-lr2e-05", 2e-5), ("evaluate", "fixed-seed0")]
    told = capfd.readouterr().err
    assert "search/standard-lr2e-05 failed" not in told
    assert re.search(r"cells/wise-ft-seed0 failed: .*wise-ft-seed0 was made with another .* remove it", told)
    # Records of the old choice are no reason to delete models: those of finished cells are gone, these are not.
    kept = sorted(path.parent.name for path in (tmp_path / "work").rglob("model.safetensors"))
    assert kept == sorted(old)
    for cell in failed:
        shutil.rmtree(runner.records.directory(cell))
        shutil.rmtree(tmp_path / "work" / cell.key)
    again = Better()
    assert make_runner(better, tmp_path, again).run(better.cells()) == ([], [])
    assert {call[2] for call in again.calls if call[0] == "train"} == {2e-5}


def test_an_evaluation_of_other_tasks_is_made_again(tiny_experiment, tmp_path):
    make_runner(tiny_experiment, tmp_path, FakeLaboratory(), keep_models=True).run(tiny_experiment.cells())
    other = read_experiment(
        write_experiment(tmp_path / "tiny.yaml", {**MAPPING, "tasks": [*MAPPING["tasks"], {"kind": "perplexity", "source": "b"}]})
    )  # fmt: skip

    class Keeping(FakeLaboratory):
        """As the pipeline: an evaluation that is there is not made again."""

        def _measure(self, directory, number):
            if not (directory / "evaluation.json").is_file():
                super()._measure(directory, number)
                measured.append(directory.name)

    measured = []
    runner = make_runner(other, tmp_path, Keeping())
    runner.records.path = tmp_path / "other"
    runner.run([cell for cell in other.cells() if cell.candidate is None and cell.row is None])
    assert measured == ["pretrained"]


def test_a_record_of_other_settings_is_refused_and_defaults_make_no_other_settings(tiny_experiment, tmp_path):
    make_runner(tiny_experiment, tmp_path, FakeLaboratory()).run(tiny_experiment.cells())
    same = {**MAPPING, "train": {"epochs": 2, "weight_decay": 0.0}}  # what the defaults say
    again = read_experiment(write_experiment(tmp_path / "tiny.yaml", same))
    assert make_runner(again, tmp_path, FakeLaboratory(dies_at=1)).run(again.cells()) == ([], [])
    other = read_experiment(write_experiment(tmp_path / "tiny.yaml", {**MAPPING, "train": {"epochs": 3}}))
    with pytest.raises(InputError, match="was made with another train than tiny has now"):
        Records(other, tmp_path / "records").read(Cell(other.row("fixed"), 0))
