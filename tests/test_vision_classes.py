"""Classes of images and classes of a head: by name, by number where names are not enough, and refused otherwise."""

import json

import numpy as np
import pytest
import tiny_images
from flow_finetune.cli import app
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.vision.config import ImageDataConfig, ImageModelConfig
from flow_finetune.vision.data import align_labels, load_images
from flow_finetune.vision.models import load_classifier
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

# As transformers' ImageNet: one name for two classes. In no order, as its classes are in none.
TWICE = ("tench", "crane", "hen", "crane", "eel")


def _source(path, names):
    """A folder per class with two images in each."""
    encoded, numbers = tiny_images.make_images(2 * len(names), len(names), 20, 2)
    for index, (content, number) in enumerate(zip(encoded, numbers, strict=True)):
        (path / names[number]).mkdir(parents=True, exist_ok=True)
        (path / names[number] / f"{index}.png").write_bytes(content)
    return str(path)


def _images(path, names):
    return load_images(ImageDataConfig(_source(path, names)), 16)


def test_a_name_that_the_model_has_twice_is_matched_by_number_where_the_order_agrees(tmp_path, capfd):
    found = _images(tmp_path / "wnids", ("n01", "n02", "n03", "n04", "n05"))
    assert align_labels(found, TWICE, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    told = capfd.readouterr().err
    assert "the model has several classes named 'crane'; the classes of" in told
    assert "its 'n01' is taken for 'tench', its 'n05' for 'eel'" in told
    some = _images(tmp_path / "some", ("hen", "tench"))
    assert align_labels(some, TWICE, 5).tolist() == [2, 2, 0, 0]
    assert "by number" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # Of which crane are these?
        (("crane", "eel"), r"class 'crane', and the model several of that name \(1 and 3\); rename the classes"),
        # As many, but in the order of the alphabet, which is not the model's.
        (("crane", "crane_machine", "eel", "hen", "tench"), "several of that name .*; rename the classes"),
        (("n01", "n02"), "class 'n01', which the model was not trained on; .*; rename the classes, or give labels"),
    ],
)
def test_a_name_that_the_model_has_twice_is_refused_otherwise(names, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        align_labels(_images(tmp_path / "images", names), TWICE, 5)
    assert "match_classes" not in str(refused.value)


def test_other_names_in_one_order_are_matched_by_number_where_that_is_said(tmp_path, capfd):
    found = _images(tmp_path / "wnids", ("n01", "n02", "n03"))
    names = ("tench, Tinca tinca", "hen", "eel")
    with pytest.raises(InputError, match=r"was not trained on; .* where the order is the same, set match_classes"):
        align_labels(found, names, 3)
    assert align_labels(found, names, 3, "number").tolist() == [0, 0, 1, 1, 2, 2]
    assert "its 'n01' is taken for 'tench, Tinca tinca', its 'n03' for 'eel'" in capfd.readouterr().err
    with pytest.raises(InputError, match="has 3 classes, the model 4; match_classes: number is for as many"):
        align_labels(found, (*names, "ray"), 4, "number")


def _named_model(path, names):
    model = tiny_images.build_classifier(path)
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


def test_evaluate_measures_every_class_of_its_own(tmp_path):
    """By name, images of the second crane would count as wrong where they are right, and have the other's loss."""
    twice = _named_model(tmp_path / "twice", TWICE)
    unique = _named_model(tmp_path / "unique", ("tench", "bird", "hen", "crane", "eel"))
    source = _source(tmp_path / "images", ("n01", "n02", "n03", "n04", "n05"))
    classifier = load_classifier(ImageModelConfig(twice, device="cpu", precision="full"))
    images = load_images(ImageDataConfig(source), 16)
    assert classifier.description.class_names == TWICE
    logits = classifier(classifier.inputs(images.pixels, 16)).detach().double()
    expected = -logits.log_softmax(1)[np.arange(10), images.labels].numpy()

    def call(model, output, *more):
        command = ["evaluate", "--task", "image", "-m", model, "--images", source, "--device", "cpu",
                   "--precision", "full", "-o", str(tmp_path / output), *more]  # fmt: skip
        result = CliRunner().invoke(app, command)
        return result.exit_code, " ".join(result.output.split())

    assert call(twice, "a")[0] == 0
    np.testing.assert_allclose(read_items(tmp_path / "a")["images", "nats"].value, expected, rtol=1e-4)
    code, told = call(unique, "b")
    assert code == 2
    assert "(--match-classes number)" in told
    assert call(unique, "b", "--match-classes", "number")[0] == 0
    np.testing.assert_allclose(read_items(tmp_path / "b")["images", "nats"].value, expected, rtol=1e-4)
    assert "--match-classes must be one of name, number" in call(unique, "c", "--match-classes", "order")[1]
    fingerprints = [json.loads((tmp_path / d / "evaluation.json").read_text())["tasks"][0]["fingerprint"] for d in "ab"]
    assert fingerprints[0] != fingerprints[1]
