"""timm's classifiers: by name, from a directory, as transformers wraps them, and a run on one. See test_timm.py."""

import json

import numpy as np
import pytest
import timm
import torch
from flow_finetune.errors import InputError
from flow_finetune.results import load_runs
from flow_finetune.vision.config import ImageModelConfig, read_image_run
from flow_finetune.vision.models import load_classifier, save_classifier
from flow_finetune.vision.pipeline import run
from PIL import Image
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def untrained(monkeypatch):
    """Names give models with random weights: there is no hub here."""
    create = timm.create_model

    def create_untrained(name, pretrained=False, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return create(name, pretrained=pretrained and ":" in name, **options)

    monkeypatch.setattr(timm, "create_model", create_untrained)


def _directory(path, name: str = "test_resnet", **options):
    """A model as timm writes it for the hub, its batch-norms not those of initialisation."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 3, *model.pretrained_cfg["input_size"][1:]))
    timm.models.save_for_hf(model, str(path), safe_serialization="both")
    return path, model.eval()


def load(source):
    return load_classifier(ImageModelConfig(str(source), device="cpu", precision="full"))


def _logits_of_both(classifier, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, and timm's of what its own transform makes of the same image."""
    size = classifier.description.size
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, size, size)
    transform = timm.data.create_transform(**{**config, "crop_pct": 1.0})
    with torch.no_grad():
        theirs = model(transform(Image.fromarray(image))[None])
        return classifier(classifier.inputs(image[None], size)), theirs


def _same(first, second) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_directory_of_timm_gives_timms_logits_and_is_saved_without_its_place(tmp_path):
    path, model = _directory(tmp_path / "local")
    classifier = load(f"timm:local-dir:{path}")
    assert (classifier.description.architecture, classifier.description.size) == ("test_resnet", 160)
    torch.testing.assert_close(*_logits_of_both(classifier, model), rtol=1e-5, atol=1e-5)
    classifier.new_head(3, ("a", "b", "c"), seed=0)
    save_classifier(classifier, tmp_path / "saved")
    path.rename(tmp_path / "gone")
    again = load(tmp_path / "saved")
    assert again.description == classifier.description
    assert _same(again, classifier)


def test_a_model_of_the_hub_is_shown_what_its_config_says(tmp_path):
    """transformers' wrapper of timm's models has no image processor's file, and their mean is often not ImageNet's."""
    path, model = _directory(tmp_path / "hub")
    config = json.loads((path / "config.json").read_text())
    del config["model_args"]  # as most of the hub's: transformers gives the number of classes itself
    (path / "config.json").write_text(json.dumps(config))
    classifier = load(path)
    assert classifier.description.library == "transformers"
    torch.testing.assert_close(*_logits_of_both(classifier, model), rtol=1e-5, atol=1e-5)
    save_classifier(classifier, tmp_path / "saved")
    torch.testing.assert_close(*_logits_of_both(load(tmp_path / "saved"), model), rtol=1e-5, atol=1e-5)


def test_the_share_of_an_image_that_timm_shows_its_models_is_told(tmp_path, capfd):
    path, model = _directory(tmp_path / "local", pretrained_cfg_overlay={"crop_pct": 0.9})
    assert model.pretrained_cfg["crop_pct"] == 0.9
    config = json.loads((path / "config.json").read_text())
    del config["model_args"]
    (path / "config.json").write_text(json.dumps(config))
    for source in (f"timm:local-dir:{path}", path):
        classifier = load(source)
        assert classifier.description.crop == 1.0  # told, and not done unasked
        told = " ".join(capfd.readouterr().err.split())
        assert f"{source} sees the central 0.9 of an image; for uncropped ones set crop: 0.9 (--crop 0.9)" in told


def test_weights_that_layers_share_are_saved_once(untrained, tmp_path):
    classifier = load("timm:coat_lite_tiny")
    save_classifier(classifier, tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as saved:
        assert len(list(saved.keys())) < len(classifier.state_dict())
    assert _same(load(tmp_path / "saved"), classifier)


def test_what_cannot_be_served_is_named(untrained, tmp_path):
    narrow, _ = _directory(tmp_path / "narrow", "test_vit", embed_dim=32)
    gelu, _ = _directory(tmp_path / "gelu", act_layer="gelu")  # no shape tells
    twice, _ = _directory(tmp_path / "twice")  # its model_args name what transformers gives itself
    for source, message in {
        f"timm:local-dir:{narrow}": "is test_vit with options of its own",
        f"timm:local-dir:{gelu}": "is test_resnet with options of its own",
        str(twice): r"the weights of .*twice cannot be loaded: .*multiple values for keyword argument 'num_classes'",
        "timm:deit_tiny_distilled_patch16_224": "with its head apart",
        "timm:resnetv2_50": "has no linear head over its 1000 classes",
        "timm:nosuch": "timm cannot give 'nosuch'",
    }.items():
        with pytest.raises(InputError, match=message):
            load(source)


def test_a_run_learns(image_mapping, untrained, tmp_path):
    mapping = {**image_mapping, "model": {**image_mapping["model"], "source": "timm:test_resnet"}}
    mapping["methods"] = [{"name": "standard", "weights": "none"}, {"name": "flow"}]
    mapping["data"] = {**mapping["data"], "size": 32}
    mapping["tasks"] = mapping["tasks"][:1]
    run(read_image_run(mapping, "test"), tmp_path / "run")
    runs = load_runs([tmp_path / "run" / name for name in ("pretrained", "standard", "flow")])
    probed, standard, flow = (found.items["test", "nats"].value.mean() for found in runs)
    assert standard < 0.5 * probed
    assert flow < 0.5 * probed
    assert not _same(load(tmp_path / "run/flow/model"), load(tmp_path / "run/standard/model"))
