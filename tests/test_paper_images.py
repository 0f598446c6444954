"""An image experiment from its file to its page, on a tiny model."""

import json

import numpy as np
import paper_cells  # noqa: F401  benchmarks on the path
import pytest
import torch
from flow_finetune.errors import DivergedError
from flow_finetune.evaluation_files import read_items
from flow_finetune.vision import train as vision_train
from paper_cells import write_experiment
from safetensors.torch import load_file
from typer.testing import CliRunner

import paper  # isort: skip
from experiment import read_experiment  # isort: skip
from image_laboratory import ImageLaboratory  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


@pytest.fixture
def mapping(image_mapping) -> dict:
    """The run of image_mapping as an experiment; its sources are whole paths."""
    return {
        **{key: value for key, value in image_mapping.items() if key != "methods"},
        "search": {"holdout": 0.25},
        "rows": [
            {"name": "pretrained"},
            {"name": "standard", "weights": "none", "learning_rates": [1e-3, 1e30]},
            {"name": "flow", "learning_rate_of": "standard", "seeds": [0, 1]},
            {"name": "linear-probe", "weights": "none", "train": "head"},
            {"name": "wise-ft", "of": "standard", "wise_ft": 0.25},
        ],
    }


def test_a_file_becomes_cells_and_a_page(mapping, tmp_path):
    file = write_experiment(tmp_path / "images.yaml", mapping)
    command = ["run", str(file), "-o", str(tmp_path / "out"), "--data", "/", "--records", str(tmp_path / "records"),
               "--keep-models"]  # fmt: skip
    result = CliRunner().invoke(paper.app, command)
    assert result.exit_code == 0, result.output
    work, records = tmp_path / "out/images", tmp_path / "records/images"
    tried = {p.parent.name: json.loads(p.read_text())["validation_loss"] for p in records.glob("search/*/cell.json")}
    assert tried["standard-lr1e+30"] is None
    assert 0 < tried["standard-lr0.001"] < 10
    cells = {p.parent.name: json.loads(p.read_text()) for p in records.glob("cells/*/cell.json")}
    assert set(cells) == {
        "pretrained", "standard-seed0", "flow-seed0", "flow-seed1", "linear-probe-seed0", "wise-ft-seed0"
    }  # fmt: skip
    assert cells["flow-seed1"]["learning_rate"] == 1e-3

    start, end, averaged = (
        load_file(next(directory.rglob("*.safetensors")))
        for directory in (
            work / "pretrained/model", work / "cells/standard-seed0/model", work / "cells/wise-ft-seed0/model"
        )
    )  # fmt: skip
    moved = 0.0
    for key, value in averaged.items():
        if value.is_floating_point():
            assert (value - (0.75 * start[key] + 0.25 * end[key])).abs().max() < 1e-6, key
            moved = max(moved, float((end[key] - start[key]).abs().max()))
    assert moved > 1e-3
    # The probe is what is called pre-trained, item by item.
    probe, pretrained = (read_items(records / "cells" / name) for name in ("linear-probe-seed0", "pretrained"))
    for key, items in pretrained.items():
        np.testing.assert_array_equal(items.value, probe[key].value)
    page = (tmp_path / "records/images.md").read_text()
    assert "0.001: " in page
    assert "1e+30: diverged" in page

    again = CliRunner().invoke(paper.app, ["report", str(file), "--records", str(tmp_path / "records")])
    assert again.exit_code == 0
    assert (tmp_path / "records/images.md").read_text() == page


@pytest.mark.parametrize("part", ["body", "head"])
def test_a_network_that_diverges_in_its_last_step_is_a_diverged_learning_rate(mapping, tmp_path, monkeypatch, part):
    experiment = read_experiment(write_experiment(tmp_path / "images.yaml", mapping))
    laboratory = ImageLaboratory(experiment.located(tmp_path, mapping["model"]["source"]), experiment.search, tmp_path)
    original = vision_train.fine_tune

    def last_step(classifier, *rest):
        found = original(classifier, *rest)
        with torch.no_grad():
            module = classifier.head if part == "head" else classifier.body
            next(module.parameters()).fill_(torch.nan)
        return found

    monkeypatch.setattr(vision_train, "fine_tune", last_step)
    with pytest.raises(DivergedError, match="losses are NaN or infinite; lower the learning rate"):
        laboratory.try_out(experiment.rows[0].method, 0, tmp_path / "search/standard")
