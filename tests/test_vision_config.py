"""What an image run's file may not say: shares held out that are none, and tests on images that are trained on."""

import pytest
import tiny_images
from flow_finetune.config import non_defaults
from flow_finetune.errors import InputError
from flow_finetune.vision.config import read_image_run
from flow_finetune.vision.data import load_images


def _read(data: dict, *tasks: dict):
    return read_image_run({"model": {"source": "m"}, "data": data, "tasks": list(tasks)}, "run.yaml")


@pytest.mark.parametrize("holdout", [0.1, 0.2])  # the default too, where it is written down
def test_a_holdout_without_a_part_is_refused(holdout):
    message = "holdout has no effect without a part; give part: train"
    with pytest.raises(InputError, match=f"run.yaml: data: {message}"):
        _read({"source": "x", "holdout": holdout})
    with pytest.raises(InputError, match=rf"run.yaml: tasks\[0\]: {message}"):
        _read({"source": "x"}, {"source": "y", "part": "all", "holdout": holdout})
    assert _read({"source": "x", "part": "train", "holdout": holdout}).data.holdout == holdout


VALIDATION = {"source": "x", "part": "validation", "split": "train"}


@pytest.mark.parametrize(
    ("data", "task", "message"),
    [
        ({}, {}, "would be of images that are trained on; give data part: train, and holdout: 0.1"),
        ({"part": "validation"}, {}, "would be of images that are trained on"),
        ({"part": "train"}, {"holdout": 0.2}, "of its holdout 0.2 only 0.1 is held out of the training"),
        ({"split": "train", "subset": "a"}, {"subset": "a", "split": "train"}, "would be of images"),
    ],
)
def test_a_validation_part_that_is_trained_on_is_refused(data, task, message):
    with pytest.raises(InputError, match=f"task x: .*{message}"):
        _read({"source": "x", **data}, {**VALIDATION, **task})


def test_a_validation_part_of_other_images_is_not():
    _read({"source": "x", "part": "train", "holdout": 0.3}, {**VALIDATION, "holdout": 0.2})
    for other in ({"source": "y"}, {"split": "validation"}, {"split": None}, {"subset": "b"}):
        _read({"source": "x"}, {**VALIDATION, **other})


def test_a_source_is_known_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="would be of images that are trained on"):
        _read({"source": "x"}, {"source": str(tmp_path / "x"), "part": "validation"})


def test_a_smaller_holdout_is_a_part_of_a_larger_one(tmp_path):
    path = str(tiny_images.write_parquet(tmp_path / "a.parquet", *tiny_images.make_images(20, 3, 10, 0)))
    run = _read(
        {"source": path, "part": "train", "holdout": 0.3}, {"source": path, "part": "validation", "holdout": 0.2}
    )
    trained, tested = (load_images(place, 16).ids for place in (run.data, *run.tasks))
    assert (len(trained), len(tested)) == (14, 4)
    assert not set(trained) & set(tested)
    assert non_defaults(run.data) == {"source": path, "part": "train", "holdout": 0.3}
