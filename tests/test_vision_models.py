"""Classifiers as they are found: what their image processors do, heads that are missing, networks with several."""

import json

import numpy as np
import pytest
import torch
import transformers
from flow_finetune.errors import InputError
from flow_finetune.vision.config import ImageModelConfig
from flow_finetune.vision.models import classifier_fingerprint, load_classifier, save_classifier
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
