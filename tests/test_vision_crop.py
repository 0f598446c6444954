"""The share of an image that training sees is what an evaluation of the new classes sees, in a run and alone."""

import json

import numpy as np
import pytest
from flow_finetune.cli import app
from flow_finetune.evaluation_files import read_items
from flow_finetune.vision.config import ImageDataConfig, ImageModelConfig, read_image_run
from flow_finetune.vision.data import load_images
from flow_finetune.vision.models import Description, load_classifier
from flow_finetune.vision.pipeline import prepare, run
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


@pytest.fixture(scope="module")
def mapping(image_mapping):
    target, retained = image_mapping["tasks"]
    return {**image_mapping, "data": {**image_mapping["data"], "crop": 0.5},
            "methods": [{"name": "standard", "weights": "none"}, {"name": "half", "of": "standard", "wise_ft": 0.5}],
            "tasks": [target, retained, {**target, "name": "whole", "crop": 1.0}]}  # fmt: skip


@pytest.fixture(scope="module")
def cropped(mapping, tmp_path_factory):
    output = tmp_path_factory.mktemp("cropped") / "run"
    run(read_image_run(mapping, "test"), output)
    return output


def _call(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def _nats(directory, task="test"):
    return read_items(directory)[task, "nats"].value


def _same(first, second):
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_a_target_task_sees_what_training_sees_and_a_retained_one_what_the_model_saw(mapping, cropped):
    prepared = prepare(read_image_run(mapping, "test"), cropped)
    sources = [task["source"] for task in mapping["tasks"]]
    whole = [load_images(ImageDataConfig(source), 16).pixels for source in sources]
    half = load_images(ImageDataConfig(sources[0], crop=0.5), 16).pixels
    # 6 of 12 pixels enlarged to 16, and not 12 kept as they are.
    assert (half.shape, whole[0].shape) == ((20, 16, 16, 3), (20, 12, 12, 3))
    for task, expected in zip(prepared.tasks, (half, whole[1], whole[2]), strict=True):
        assert np.array_equal(task.images.pixels, expected)
    assert not np.array_equal(_nats(cropped / "standard", "test"), _nats(cropped / "standard", "whole"))


@pytest.mark.parametrize("method", ["pretrained", "standard", "half"])
def test_a_saved_model_is_evaluated_alone_as_in_its_run(mapping, cropped, method, tmp_path):
    assert json.loads((cropped / method / "model/classifier.json").read_text())["crop"] == 0.5
    common = ["evaluate", "--task", "image", "-m", cropped / method / "model", "--device", "cpu", "--precision", "full",
              "--images", mapping["tasks"][0]["source"]]  # fmt: skip
    assert _call(*common, "-o", tmp_path / "e")[0] == 0
    _same(_nats(tmp_path / "e"), _nats(cropped / method))
    assert _call(*common, "-o", tmp_path / "whole", "--crop", 1)[0] == 0
    _same(_nats(tmp_path / "whole"), _nats(cropped / method, "whole"))
    code, told = _call(*common, "-o", tmp_path / "wrong", "--crop", 1.5)
    assert code == 2
    assert "--crop is a share of the short side, in (0, 1], got 1.5" in told


def test_crop_applies_to_retained_images_where_it_is_given(mapping, tmp_path):
    model, source = mapping["model"]["source"], mapping["tasks"][1]["source"]
    common = ["evaluate", "--task", "image", "-m", model, "--pretrained", model, "--device", "cpu",
              "--source-images", source]  # fmt: skip
    for crop in (1, 0.5):
        assert _call(*common, "-o", tmp_path / str(crop), "--crop", crop)[0] == 0
    assert _call(*common, "-o", tmp_path / "own")[0] == 0
    assert np.array_equal(_nats(tmp_path / "own", "source"), _nats(tmp_path / "1", "source"))
    assert not np.array_equal(_nats(tmp_path / "own", "source"), _nats(tmp_path / "0.5", "source"))


def test_the_commands_take_the_crop_of_a_run(mapping, cropped, tmp_path):
    common = ["-m", mapping["model"]["source"], "-d", mapping["data"]["source"], "--task", "image", "--device", "cpu",
              "--precision", "full"]  # fmt: skip
    train = ["train", *common, "--epochs", 1, "--scores", cropped, "--method", "standard", "-o", tmp_path / "t"]
    code, told = _call(*train)
    assert code == 2
    assert "holds another probe (it differs in images, crop); give the same options" in told
    assert _call(*train, "--crop", 0.5)[0] == 0
    assert json.loads((tmp_path / "t/model/classifier.json").read_text())["crop"] == 0.5
    assert _call("score", *common, "--crop", 0.5, "-o", tmp_path / "s")[0] == 0
    marks = [json.loads((path / "pretrained/probe.json").read_text()) for path in (cropped, tmp_path / "s")]
    assert marks[0]["images"] == marks[1]["images"]
    code, told = _call("score", *common, "--crop", 0, "-o", tmp_path / "no")
    assert code == 2
    assert "crop is a share of the short side, in (0, 1], got 0.0" in told
    code, told = _call("score", "-m", "x", "-d", "y", "-o", "z", "--crop", 0.5)
    assert code == 2
    assert "--crop has no meaning with --task language" in told


def test_a_model_that_saw_a_part_is_trained_on_and_retained_as_that(mapping, cropped, tmp_path):
    """As its size is; where nothing else is said."""
    model = {**mapping["model"], "source": str(cropped / "standard/model")}
    changed = {**mapping, "model": model, "data": {"source": mapping["data"]["source"]}}
    changed["tasks"] = [mapping["tasks"][0], {**mapping["tasks"][0], "role": "retained", "name": "again"}]
    prepared = prepare(read_image_run(changed, "test"), tmp_path / "run")
    assert prepared.crop == 0.5
    assert prepared.images.pixels.shape[1] == 16
    assert prepared.tasks[0].images.fingerprint == prepared.tasks[1].images.fingerprint
    _same(_nats(tmp_path / "run/pretrained", "again"), _nats(cropped / "standard"))


def test_files_of_before_say_nothing_of_a_crop_and_stay_valid(mapping, image_mapping, image_run):
    assert "crop" not in Description("timm", "x", 8, (0.0,) * 3, (1.0,) * 3, 2).as_dict()
    assert "crop" not in json.loads((image_run.probed / "classifier.json").read_text())
    assert load_classifier(ImageModelConfig(str(image_run.probed), device="cpu")).description.crop == 1.0
    mark = image_run.output / "pretrained/probe.json"
    entries = json.loads(mark.read_text())
    assert entries.pop("crop") == 1.0
    mark.write_text(json.dumps(entries))
    again = prepare(read_image_run(image_mapping, "test"), image_run.output)
    assert again.fingerprints == image_run.fingerprints
    assert json.loads(mark.read_text()) == entries
