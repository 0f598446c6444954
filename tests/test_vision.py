"""Image classification end to end on a tiny network: stages, weights, what is kept, and a run that is made once."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_images
import torch
import torch.nn.functional as F
import yaml
from flow_finetune.cli import app
from flow_finetune.config import MethodConfig, read_yaml
from flow_finetune.errors import InputError
from flow_finetune.results import load_runs
from flow_finetune.vision import models as models_module
from flow_finetune.vision import pipeline as pipeline_module
from flow_finetune.vision import stages
from flow_finetune.vision.config import ImageModelConfig, read_image_run
from flow_finetune.vision.evaluate import Original
from flow_finetune.vision.models import Description, ImageClassifier, load_classifier, save_classifier
from flow_finetune.vision.pipeline import check_run, run, train_and_evaluate
from flow_finetune.vision.train import average_state
from torch import nn
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IMAGES, SIZE = tiny_images.NUM_IMAGES, tiny_images.SIZE


def _scores(prepared) -> dict:
    return pq.read_table(prepared.scores).to_pydict()


def _summary(prepared, name: str) -> dict:
    return json.loads((prepared.output / name / "train/summary.json").read_text())


def _plain(images: np.ndarray) -> torch.Tensor:
    """`[N, 3, 16, 16]` inputs of 12-pixel images, as torch and the preprocessor's file say."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (F.interpolate(x, (SIZE, SIZE), mode="bilinear") - 0.5) / 0.5


def test_the_probe_trains_a_head_and_leaves_the_body_as_it_was(image_run):
    source = load_classifier(image_run.config.model)
    probed = image_run.load(image_run.probed)
    before, after = source.body.state_dict(), probed.body.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    features = stages.extract_features(source, image_run.images.pixels, SIZE, 16)
    source.new_head(3, None, seed=0)
    first = source.head.weight.detach().clone()
    _train_plain_head(source.head, features, torch.from_numpy(image_run.labels), image_run.config.train)
    torch.testing.assert_close(probed.head.weight, source.head.weight, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(probed.head.weight, first, atol=0.1)


def _train_plain_head(head, features, labels, config) -> None:
    """AdamW with a cosine, in torch's own words."""
    steps = stages.step_plan(NUM_IMAGES, config.head_epochs, config.head_batch_size, config.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.head_learning_rate, weight_decay=0.0)
    for step, indices in enumerate(steps):
        factor = 0.5 * (1 + np.cos(np.pi * step / len(steps)))
        optimizer.param_groups[0]["lr"] = config.head_learning_rate * factor
        optimizer.zero_grad()
        F.cross_entropy(head(features[indices]), labels[indices]).backward()
        optimizer.step()


def _plain_optimizer(model, config) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; vectors are not decayed."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == is_wide] for is_wide in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def test_scores_and_weights_are_those_of_the_saved_probed_model(image_run):
    # Nothing of this project but the file: transformers loads stage 0's model.
    model = AutoModelForImageClassification.from_pretrained(image_run.probed).eval()
    with torch.no_grad():
        logits = model(pixel_values=_plain(image_run.images.pixels)).logits.double()
    loss = F.cross_entropy(logits, torch.from_numpy(image_run.labels), reduction="none").numpy()
    found = _scores(image_run)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    assert found["predicted"] == logits.argmax(1).tolist()
    weights = np.exp(-np.array(found["loss"]) / np.median(found["loss"]))
    flow = _summary(image_run, "flow")
    assert flow["temperature"] == pytest.approx(np.median(found["loss"]), rel=1e-12)
    assert flow["mean_weight"] == pytest.approx(weights.mean(), rel=1e-6)
    assert flow["effective_sample_size"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-6)


# What the paper's image experiments use, all of it at once.
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.1, "warmup": 0.3, "max_grad_norm": 2.0}


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [("standard", {}, 1e-5), ("flow", {}, 1e-5), ("online", {}, 1e-4), ("standard", SGD, 1e-5), ("flow", SGD, 1e-5)],
    ids=["standard", "flow", "online", "standard-sgd", "flow-sgd"],
)
def test_stages_1_and_2_equal_a_plain_torch_loop(image_run, tmp_path, name, changes, tolerance):
    model = AutoModelForImageClassification.from_pretrained(image_run.probed).train()
    losses = np.array(_scores(image_run)["loss"])
    weight = np.exp(-losses / np.median(losses)) if name != "standard" else np.ones(NUM_IMAGES)
    weight = torch.from_numpy(weight).float()
    inputs, labels = _plain(image_run.images.pixels), torch.from_numpy(image_run.labels)
    config = dataclasses.replace(image_run.config.train, **changes)
    output = tmp_path if changes else image_run.output
    if changes:
        for method in (m for m in image_run.config.methods if m.name in ("standard", name)):
            train_and_evaluate(image_run, method, output / method.name, config)
    steps = stages.step_plan(NUM_IMAGES, 2, 8, 0)
    optimizer, num_warmup = _plain_optimizer(model, config), round(config.warmup * len(steps))
    norms = []
    for step, indices in enumerate(steps):
        share = (step - num_warmup) / (len(steps) - num_warmup)
        rate = step / num_warmup if step < num_warmup else 0.5 * (1 + np.cos(np.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        nll = F.cross_entropy(model(pixel_values=inputs[indices]).logits, labels[indices], reduction="none")
        optimizer.zero_grad()
        (weight[indices] * nll).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or np.inf)))
        optimizer.step()
    # Some steps are clipped and some are not.
    assert not changes or min(norms) < config.max_grad_norm < max(norms)
    tuned = AutoModelForImageClassification.from_pretrained(output / name / "model")
    found, expected = tuned.state_dict(), model.state_dict()
    if name != "standard":
        # The weights are seen: another method's result is not within the tolerance.
        other = AutoModelForImageClassification.from_pretrained(output / "standard/model").state_dict()
        key = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
        assert (other[key] - found[key]).abs().max() > 10 * tolerance
    # Running statistics included; the head went on in stage 2.
    body = [key for key in expected if not key.startswith("classifier")]
    assert any("running_mean" in key for key in body)
    for key in body:
        torch.testing.assert_close(found[key], expected[key], rtol=tolerance, atol=tolerance)
    model.eval()
    with torch.no_grad():
        features = model.resnet(inputs).pooler_output.flatten(1)
    head = model.classifier[1]
    _train_plain_head(head, features, labels, config)
    torch.testing.assert_close(found["classifier.1.weight"], head.weight.data, rtol=10 * tolerance, atol=10 * tolerance)


def test_the_original_head_and_batch_norms_give_the_original_losses(image_run):
    source = load_classifier(image_run.config.model)
    images = image_run.tasks[1].images
    with torch.no_grad():
        expected = source(source.inputs(images.pixels, SIZE))
        probed = image_run.load(image_run.probed)
        # What training in train mode does to batch-norms, without training.
        original = Original.of(source)
        stages.stage_mode(probed, "train")
        probed.features(probed.inputs(images.pixels, SIZE))
        for norm in probed.batch_norms().values():
            norm.weight.mul_(1.5)
        spoilt = probed.eval().body.state_dict()
        with stages.source_model(probed, original.head, original.batch_norm_state) as restored:
            assert torch.equal(restored(restored.inputs(images.pixels, SIZE)), expected)
        after = probed.body.state_dict()
        assert all(torch.equal(after[name], spoilt[name]) for name in after)
        assert probed.head.out_features == 3


def test_retained_accuracy_is_of_the_original_head_and_the_tuned_filters(image_run):
    source = AutoModelForImageClassification.from_pretrained(image_run.config.model.source).eval()
    tuned = AutoModelForImageClassification.from_pretrained(image_run.output / "standard/model")
    mixed = {name: t for name, t in tuned.state_dict().items()}
    for name, tensor in source.state_dict().items():
        if "normalization" in name or name.startswith("classifier"):
            mixed[name] = tensor
    source.load_state_dict(mixed)
    images = image_run.tasks[1].images
    assert images.pixels.shape == (20, SIZE, SIZE, 3)
    with torch.no_grad():
        x = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        loss = F.cross_entropy(source(pixel_values=x).logits, torch.from_numpy(images.labels), reduction="none")
    (found,) = load_runs([image_run.output / "standard"])
    np.testing.assert_allclose(found.items["source", "nats"].value, loss.numpy(), rtol=1e-4, atol=1e-6)
    assert found.tasks["source"]["role"] == "retained"


def test_wise_ft_and_the_linear_probe_train_nothing(image_run):
    probed = image_run.load(image_run.probed).state_dict()
    tuned = image_run.load(image_run.output / "flow/model").state_dict()
    half = image_run.load(image_run.output / "half/model").state_dict()
    for name, tensor in half.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.5 * probed[name] + 0.5 * tuned[name], rtol=1e-6, atol=1e-7)
    probe = image_run.load(image_run.output / "linear-probe/model").state_dict()
    assert all(torch.equal(probe[name], probed[name]) for name in probe)
    runs = load_runs([image_run.output / "pretrained", image_run.output / "linear-probe"])
    assert np.array_equal(runs[0].items["test", "nats"].value, runs[1].items["test", "nats"].value)
    wrong = {name: tensor.flatten()[:1] for name, tensor in tuned.items()}
    with pytest.raises(InputError, match="nothing to average"):
        average_state(image_run.load(image_run.probed), wrong, 0.5)


def test_a_run_is_made_once_and_reports(image_run, image_mapping, monkeypatch):
    page = (image_run.output / "report/report.md").read_text()
    assert all(name in page for name in ("pretrained", "standard", "flow", "half", "online", "linear-probe"))
    for name in ("train_head", "extract_features", "evaluate_classifier"):
        monkeypatch.setattr(pipeline_module, name, _not_again)
    monkeypatch.setattr("flow_finetune.vision.train.fine_tune", _not_again)
    run(read_image_run(image_mapping, "test"), image_run.output)
    changed = {**image_mapping, "train": {**image_mapping["train"], "epochs": 3}}
    with pytest.raises(InputError, match=r"holds another run .its train.epochs differ"):
        run(read_image_run(changed, "test"), image_run.output)
    with pytest.raises(InputError, match="holds another run"):
        train_and_evaluate(image_run, MethodConfig(quantile=0.9), image_run.output / "flow")


def _not_again(*_, **__):
    raise AssertionError("made again")


def test_averages_take_the_batch_norm_statistics_along(image_run, tmp_path):
    """All of the pre-trained at the last step: the body is that of stage 0, statistics and all."""
    method = MethodConfig("sfa", weights="none", average_every=1.0, average_share=1.0)
    train_and_evaluate(image_run, method, tmp_path / "sfa")
    probed, averaged = (image_run.load(d).body.state_dict() for d in (image_run.probed, tmp_path / "sfa/model"))
    for name, tensor in probed.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(averaged[name], tensor, rtol=1e-6, atol=1e-6)


def test_damaged_weights_are_named(image_run, tmp_path):
    shutil.copytree(image_run.probed, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be loaded"):
        image_run.load(tmp_path / "model")
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        image_run.load(tmp_path / "model")


def test_a_file_is_no_directory_for_a_method(image_run, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken is used by something else"):
        train_and_evaluate(image_run, MethodConfig("plain", weights="none"), tmp_path / "taken")


def test_one_cell_alone_starts_again_where_it_was_killed_and_ends_the_same(image_run, tmp_path):
    method = MethodConfig(name="flow")
    (tmp_path / "cell/train").mkdir(parents=True)
    shutil.copy(image_run.output / "flow/train/identity.json", tmp_path / "cell/train")
    (tmp_path / "cell/train/log.jsonl").write_text('{"step": 1}\n')
    train_and_evaluate(image_run, method, tmp_path / "cell")
    same, other = (image_run.load(d / "model").state_dict() for d in (image_run.output / "flow", tmp_path / "cell"))
    assert all(torch.equal(same[name], other[name]) for name in same)
    logged = (tmp_path / "cell/train/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 11))
    seed = dataclasses.replace(image_run.config.train, seed=1)
    train_and_evaluate(image_run, method, tmp_path / "seed", seed)
    assert not torch.equal(image_run.load(tmp_path / "seed/model").head.weight, same["head.weight"])


def test_a_step_of_one_image_says_what_batch_norm_needs(image_run):
    classifier = image_run.load(image_run.probed)
    classifier.train()
    one = classifier.inputs(image_run.images.pixels[:1], image_run.size)
    with torch.no_grad():
        small = torch.nn.functional.interpolate(one, 1)
    assert classifier.batch_norms()
    with pytest.raises(InputError, match=r"a step of one image: Expected more than 1 value.* batch_norm: eval"):
        stages._forward(classifier, small)


def test_l2_pulls_towards_stage_0_and_eval_mode_keeps_statistics(image_run, tmp_path):
    method = MethodConfig(name="l2", weights="none", penalty="l2", penalty_strength=1e6, penalty_copy="float32")
    config = dataclasses.replace(image_run.config.train, batch_norm="eval")
    train_and_evaluate(image_run, method, tmp_path / "l2", config)
    probed, held = (image_run.load(d).body.state_dict() for d in (image_run.probed, tmp_path / "l2/model"))
    statistics = [name for name in probed if "running" in name or "num_batches" in name]
    assert statistics
    assert all(torch.equal(probed[name], held[name]) for name in statistics)

    def distance(name):
        lines = (tmp_path / "l2" if name == "l2" else image_run.output / name) / "train/log.jsonl"
        return json.loads(lines.read_text().splitlines()[-1])["distance"]

    assert 0 < distance("l2") < 0.5 * distance("standard")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [{"name": "token", "weights": "token"}]}, "one weight per image"),
        ({"methods": [{"name": "a", "weights": "none", "train": "lora"}]}, "LoRA is for language models"),
        ({"methods": [{"name": "a", "train": "head"}]}, "weights would have no effect"),
        ({"methods": [{"name": "a", "of": "b", "wise_ft": 0.5}]}, "method a: of must be one of"),
        ({"methods": [{"name": "report", "weights": "none"}]}, "plain directory name"),
        ({"methods": [{"name": "flow"}, {"name": "flow"}]}, "two methods are named 'flow'"),
        ({"tasks": []}, "at least one evaluation task"),
        ({"tasks": [{"source": "x.parquet", "role": "other"}]}, "role must be one of target, retained"),
        ({"train": {"augment": "mixup"}}, "augment must be one of none, flip, crop_flip"),
        ({"train": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"train": {"seed": -1}}, "seed must be between 0 and 2^32 - 1, got -1"),
        ({"train": {"seed": 10**17}}, "seed must be between 0 and 2^32 - 1"),
        ({"train": {"checkpoint_every": -1}}, "checkpoint_every must be at least 0 (0 for none), got -1"),
        ({"data": {"source": "missing.parquet"}}, "no such file: missing.parquet"),
        ({"task": "sound"}, "task must be one of language, image"),
    ],
)
def test_bad_input_is_named(image_mapping, tmp_path, change, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**image_mapping, **change}))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_text_model_is_refused(image_mapping, tiny_model_dir, tmp_path):
    changed = {**image_mapping, "model": {"source": str(tiny_model_dir)}}
    with pytest.raises(InputError, match="which classifies no images"):
        run(read_image_run(changed, "test"), tmp_path / "out")
    with pytest.raises(InputError, match="neither efficientnet-lite0, timm:NAME, nor a transformers model"):
        load_classifier(ImageModelConfig(str(tmp_path / "nothing")))


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:resnet18 needs timm .*pip install timm torchvision"):
        load_classifier(ImageModelConfig("timm:resnet18"))


def test_augmentation_mirrors_half_and_shifts_within_the_border():
    inputs = torch.arange(2.0 * 3 * 16 * 16).reshape(2, 3, 16, 16).repeat(200, 1, 1, 1)
    flipped = stages.augment(inputs, "flip", torch.Generator().manual_seed(0))
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, inputs, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(flipped, inputs, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    # Three standard deviations of 400 fair draws.
    assert 170 <= sum(mirrored) <= 230
    shifted = stages.augment(inputs, "crop_flip", torch.Generator().manual_seed(0))
    # The 5 x 5 places in a frame of 16 / 8 reflected pixels, as they are and mirrored: each image is one of these.
    padded = F.pad(inputs[:2], (2,) * 4, mode="reflect")
    crops = torch.stack([padded[:, :, y : y + 16, x : x + 16] for y in range(5) for x in range(5)])
    crops = torch.cat([crops, crops.flip(4)])
    found = [
        (crops[:, i % 2] == image).flatten(1).all(1).nonzero().flatten().tolist() for i, image in enumerate(shifted)
    ]
    assert [len(which) for which in found] == [1] * 400
    assert {which % 25 for (which,) in found} == set(range(25))
    assert 170 <= sum(which >= 25 for (which,) in found) <= 230
    assert torch.equal(stages.augment(inputs, "none", torch.Generator()), inputs)


def test_a_last_step_of_one_image_joins_the_step_before():
    steps = stages.step_plan(17, 2, 8, 0)
    assert [len(step) for step in steps] == [8, 9, 8, 9]
    assert sorted(steps[0] + steps[1]) == list(range(17)) == sorted(steps[2] + steps[3])
    assert steps[:2] != steps[2:]


def test_the_example_is_a_run():
    config = read_image_run(read_yaml(Path(__file__).parent.parent / "examples/vision.yaml"), "the example")
    check_run(config)
    assert [m.name for m in config.methods][-1] == "flow+wise-ft"
    assert config.train.learning_rate == 1e-4


def test_efficientnet_lite_is_saved_and_loaded_without_its_head_moving(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet-lite-pytorch")
    description = Description("efficientnet-lite", "efficientnet-lite0", 32, (127.0,) * 3, (128.0,) * 3, 1000)
    network = models_module._empty(description)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128)
        classifier = ImageClassifier(network, "_fc", description, "full")
        torch.testing.assert_close(classifier(classifier.inputs(pixels, 32)), expected)
        classifier.new_head(4, ("a", "b", "c", "d"), seed=0)
        expected = classifier(classifier.inputs(pixels, 32))
        save_classifier(classifier, tmp_path / "model")
        loaded = load_classifier(ImageModelConfig(str(tmp_path / "model"), precision="full", device="cpu"))
        assert torch.equal(loaded(loaded.inputs(pixels, 32)), expected)
    assert loaded.description == classifier.description
    assert len(loaded.batch_norms()) == 49
