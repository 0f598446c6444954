"""Classifiers as they are found: what their image processors do, heads that are missing, networks with several."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from flow_finetune.errors import InputError
from flow_finetune.vision.config import ImageModelConfig
from flow_finetune.vision.models import classifier_fingerprint, load_classifier, save_classifier
from flow_finetune.vision.preprocessing import share_seen
from PIL import Image
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16,
       "patch_size": 4}  # fmt: skip
SQUARE = {"size": {"height": 16, "width": 16}}
PROCESSORS = {
    "plain": ViTImageProcessorPil(**SQUARE),
    "its own mean": ViTImageProcessorPil(**SQUARE, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
    "no normalisation": ViTImageProcessorPil(**SQUARE, do_normalize=False),
    "no rescaling": ViTImageProcessorPil(**SQUARE, do_rescale=False, image_mean=[99.0] * 3, image_std=[50.0] * 3),
    "another factor": ViTImageProcessorPil(**SQUARE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    "divides twice": EfficientNetImageProcessorPil(**SQUARE, include_top=True),
    "a crop that is not made": EfficientNetImageProcessorPil(**SQUARE, include_top=False),
    "BGR, no mean": MobileViTImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
}  # fmt: skip


def load(path):
    return load_classifier(ImageModelConfig(str(path), device="cpu", precision="full"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", PROCESSORS)
def test_inputs_are_those_of_the_models_own_processor(name, vit, tmp_path):
    PROCESSORS[name].save_pretrained(vit)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    expected = PROCESSORS[name](Image.fromarray(images[0]), return_tensors="pt")["pixel_values"]
    classifier = load(vit)
    assert classifier.description.size == 16
    torch.testing.assert_close(classifier.inputs(images, 16), expected, rtol=1e-5, atol=1e-5)
    save_classifier(classifier, tmp_path / "saved")
    torch.testing.assert_close(load(tmp_path / "saved").inputs(images, 16), expected, rtol=1e-5, atol=1e-5)


def test_an_offset_is_refused(vit):
    (vit / "preprocessor_config.json").write_text(json.dumps({**SQUARE, "rescale_offset": True}))
    with pytest.raises(InputError, match="sets rescale_offset, which is not done here"):
        load(vit)
    (vit / "preprocessor_config.json").unlink()


def test_a_missing_head_is_told_and_the_same_every_time(tmp_path, capfd):
    body = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)
    body.save_pretrained(tmp_path / "body")
    first, second = load(tmp_path / "body"), load(tmp_path / "body")
    assert classifier_fingerprint(first) == classifier_fingerprint(second)
    assert "has no head of its own" in " ".join(capfd.readouterr().err.split())


def test_other_missing_weights_are_named(vit, tmp_path):
    config = transformers.ViTConfig(**{**VIT, "num_hidden_layers": 2}, num_labels=5)
    path = tmp_path / "cut"
    transformers.ViTForImageClassification.from_pretrained(vit).save_pretrained(path)
    config.save_pretrained(path)
    with pytest.raises(InputError, match=r"lack \d+ of its weights, the first is vit"):
        load(path)


def test_two_heads_are_refused(tmp_path):
    config = transformers.DeiTConfig(**VIT, num_labels=5)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "deit")
    with pytest.raises(InputError, match=r"with its head apart|more than one linear layer"):
        load(tmp_path / "deit")


def test_the_file_of_several_processors_comes_first(vit, tmp_path):
    """As transformers looks for them."""
    path = tmp_path / "vit"
    transformers.ViTForImageClassification.from_pretrained(vit).save_pretrained(path)
    ViTImageProcessorPil(**SQUARE).save_pretrained(path)
    of_several = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], **SQUARE}
    (path / "processor_config.json").write_text(json.dumps({"image_processor": of_several, "processor_class": "X"}))
    description = load(path).description
    assert description.size == 16
    np.testing.assert_allclose(description.mean, [25.5, 51.0, 76.5])
    np.testing.assert_allclose(description.std, [102.0, 127.5, 153.0])


def test_a_saved_model_has_its_processor_and_its_own_classes(vit, tmp_path):
    path = tmp_path / "named"
    model = transformers.ViTForImageClassification.from_pretrained(vit)
    model.config.id2label = dict(enumerate(("tench", "shark", "hen", "ray", "eel")))
    model.save_pretrained(path)
    processor = ViTImageProcessorPil(**SQUARE, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor.save_pretrained(path)
    classifier = load(path)
    for number, names in (("named", ("a", "b", "c", "d", "e")), ("numbered", None)):
        classifier.new_head(5, names, seed=0)
        save_classifier(classifier, tmp_path / number / "saved")
        config = json.loads((tmp_path / number / "saved/config.json").read_text())
        assert list(config["id2label"].values()) == list(names or [f"LABEL_{i}" for i in range(5)])
        # And once more from what was saved.
        save_classifier(load(tmp_path / number / "saved"), tmp_path / number / "twice")
        found = ViTImageProcessorPil.from_pretrained(tmp_path / number / "twice")
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
        ours, theirs = (p(image, return_tensors="pt")["pixel_values"] for p in (found, processor))
        assert torch.equal(ours, theirs)


def test_classes_may_have_their_number_alone(vit, tmp_path):
    path = tmp_path / "vit"
    transformers.ViTForImageClassification.from_pretrained(vit).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "id2label": None, "label2id": None, "num_labels": 5}))
    assert load(path).description.class_names is None


@pytest.mark.parametrize(
    ("processor", "share"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}, 0.875),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": False}, 1.0),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 0.875),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 1.0),
        ({"size": {"height": 224, "width": 224}}, 1.0),
        ({"size": 224}, 1.0),
        ({"size": 256, "crop_size": [224, 224]}, 0.875),
        ({"size": [224, 224], "crop_pct": 0.875}, 0.875),
        ({}, 1.0),
    ],
)
def test_the_share_of_an_image_that_a_processor_sees(processor, share):
    assert share_seen(processor) == pytest.approx(share)


@pytest.mark.parametrize(("of_timm", "share"), [({"crop_pct": 0.95}, 0.95), ({"crop_pct": None}, 1.0), ({}, 1.0)])
def test_the_share_of_an_image_that_a_model_of_timm_sees(of_timm, share):
    assert share_seen({}, SimpleNamespace(pretrained_cfg=of_timm)) == share
    assert share_seen({"size": 224}, SimpleNamespace(pretrained_cfg=of_timm)) == 1.0  # a processor's file comes first


def test_a_processor_that_crops_is_told(vit, tmp_path, capfd):
    path = tmp_path / "vit"
    transformers.ViTForImageClassification.from_pretrained(vit).save_pretrained(path)
    crop = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (path / "preprocessor_config.json").write_text(json.dumps(crop))
    assert load(path).description.size == 16
    told = " ".join(capfd.readouterr().err.split())
    assert "sees the central 0.8 of an image; for uncropped ones set crop: 0.8 (--crop 0.8)" in told


def test_the_size_of_a_model_with_several_parts_is_its_vision_parts(tmp_path):
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={**VIT, "image_size": 32, "patch_size": 8}, projection_dim=8, num_labels=5,
    )  # fmt: skip
    transformers.CLIPForImageClassification(config).save_pretrained(tmp_path / "clip")
    assert load(tmp_path / "clip").description.size == 32
