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
from flow_finetune.vision.config import ImageModelConfig, ImageTrainConfig, read_image_run
from flow_finetune.vision.evaluate import Original
from flow_finetune.vision.models import Description, ImageClassifier, load_classifier, save_classifier
from flow_finetune.vision.pipeline import check_run, prepare, probe_and_score, run, train_and_evaluate
from flow_finetune.vision.train import average_state, train_method
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IMAGES, SIZE = 40, 16


@pytest.fixture(scope="module")
def mapping(tmp_path_factory) -> dict:
    """A run on 40 images of 3 classes, without augmentation, dropout or bf16: every number has a plain counterpart."""
    root = tmp_path_factory.mktemp("vision")
    model = tiny_images.build_classifier(root / "resnet")
    train = tiny_images.write_parquet(root / "train.parquet", *tiny_images.make_images(NUM_IMAGES, 3, 12, 0))
    test = tiny_images.write_parquet(root / "test.parquet", *tiny_images.make_images(20, 3, 12, 1))
    source = tiny_images.write_parquet(root / "source.parquet", *tiny_images.make_images(20, 5, 20, 2))
    return {
        "task": "image",
        "model": {"source": str(model), "precision": "full", "device": "cpu"},
        "data": {"source": str(train)},
        "methods": [
            {"name": "half", "of": "flow", "wise_ft": 0.5}, {"name": "standard", "weights": "none"}, {"name": "flow"},
            {"name": "online", "online": True}, {"name": "linear-probe", "weights": "none", "train": "head"},
        ],
        "train": {"epochs": 2, "batch_size": 8, "augment": "none", "head_epochs": 8, "head_batch_size": 16,
                  "head_learning_rate": 0.1, "learning_rate": 1e-3, "log_every": 1, "max_grad_norm": 0.0, "warmup": 0},
        "tasks": [
            {"source": str(test), "role": "target"}, {"source": str(source), "role": "retained"},
        ],
        "batch_size": 16,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(mapping, tmp_path_factory):
    """The whole run, and what its methods started from."""
    config = read_image_run(mapping, "test")
    output = tmp_path_factory.mktemp("run") / "out"
    run(config, output)
    return prepare(config, output)


def _scores(prepared) -> dict:
    return pq.read_table(prepared.scores).to_pydict()


def _summary(prepared, name: str) -> dict:
    return json.loads((prepared.output / name / "train/summary.json").read_text())


def _plain(images: np.ndarray) -> torch.Tensor:
    """`[N, 3, 16, 16]` inputs of 12-pixel images, as torch and the preprocessor's file say."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (F.interpolate(x, (SIZE, SIZE), mode="bilinear") - 0.5) / 0.5


def test_the_probe_trains_a_head_and_leaves_the_body_as_it_was(finished):
    source = load_classifier(finished.config.model)
    probed = finished.load(finished.probed)
    before, after = source.body.state_dict(), probed.body.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    features = stages.extract_features(source, finished.images.pixels, SIZE, 16)
    source.new_head(3, None, seed=0)
    first = source.head.weight.detach().clone()
    _train_plain_head(source.head, features, torch.from_numpy(finished.labels), finished.config.train)
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


def test_scores_and_weights_are_those_of_the_saved_probed_model(finished):
    # Nothing of this project but the file: transformers loads stage 0's model.
    model = AutoModelForImageClassification.from_pretrained(finished.probed).eval()
    with torch.no_grad():
        logits = model(pixel_values=_plain(finished.images.pixels)).logits.double()
    loss = F.cross_entropy(logits, torch.from_numpy(finished.labels), reduction="none").numpy()
    found = _scores(finished)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    assert found["predicted"] == logits.argmax(1).tolist()
    weights = np.exp(-np.array(found["loss"]) / np.median(found["loss"]))
    flow = _summary(finished, "flow")
    assert flow["temperature"] == pytest.approx(np.median(found["loss"]), rel=1e-12)
    assert flow["mean_weight"] == pytest.approx(weights.mean(), rel=1e-6)
    assert flow["effective_sample_size"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-6)


@pytest.mark.parametrize(("name", "tolerance"), [("standard", 1e-5), ("flow", 1e-5), ("online", 1e-4)])
def test_stages_1_and_2_equal_a_plain_torch_loop(finished, name, tolerance):
    model = AutoModelForImageClassification.from_pretrained(finished.probed).train()
    losses = np.array(_scores(finished)["loss"])
    weight = np.exp(-losses / np.median(losses)) if name != "standard" else np.ones(NUM_IMAGES)
    weight = torch.from_numpy(weight).float()
    inputs, labels = _plain(finished.images.pixels), torch.from_numpy(finished.labels)
    config = finished.config.train
    steps = stages.step_plan(NUM_IMAGES, 2, 8, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step, indices in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / len(steps)))
        nll = F.cross_entropy(model(pixel_values=inputs[indices]).logits, labels[indices], reduction="none")
        optimizer.zero_grad()
        (weight[indices] * nll).mean().backward()
        optimizer.step()
    tuned = AutoModelForImageClassification.from_pretrained(finished.output / name / "model")
    found, expected = tuned.state_dict(), model.state_dict()
    if name != "standard":
        # The weights are seen: another method's result is not within the tolerance.
        other = AutoModelForImageClassification.from_pretrained(finished.output / "standard/model").state_dict()
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


def test_the_original_head_and_batch_norms_give_the_original_losses(finished):
    source = load_classifier(finished.config.model)
    images = finished.tasks[1].images
    with torch.no_grad():
        expected = source(source.inputs(images.pixels, SIZE))
        probed = finished.load(finished.probed)
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


def test_retained_accuracy_is_of_the_original_head_and_the_tuned_filters(finished):
    source = AutoModelForImageClassification.from_pretrained(finished.config.model.source).eval()
    tuned = AutoModelForImageClassification.from_pretrained(finished.output / "standard/model")
    mixed = {name: t for name, t in tuned.state_dict().items()}
    for name, tensor in source.state_dict().items():
        if "normalization" in name or name.startswith("classifier"):
            mixed[name] = tensor
    source.load_state_dict(mixed)
    images = finished.tasks[1].images
    assert images.pixels.shape == (20, SIZE, SIZE, 3)
    with torch.no_grad():
        x = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        loss = F.cross_entropy(source(pixel_values=x).logits, torch.from_numpy(images.labels), reduction="none")
    (found,) = load_runs([finished.output / "standard"])
    np.testing.assert_allclose(found.items["source", "nats"].value, loss.numpy(), rtol=1e-4, atol=1e-6)
    assert found.tasks["source"]["role"] == "retained"


def test_wise_ft_and_the_linear_probe_train_nothing(finished):
    probed = finished.load(finished.probed).state_dict()
    tuned = finished.load(finished.output / "flow/model").state_dict()
    half = finished.load(finished.output / "half/model").state_dict()
    for name, tensor in half.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.5 * probed[name] + 0.5 * tuned[name], rtol=1e-6, atol=1e-7)
    probe = finished.load(finished.output / "linear-probe/model").state_dict()
    assert all(torch.equal(probe[name], probed[name]) for name in probe)
    runs = load_runs([finished.output / "pretrained", finished.output / "linear-probe"])
    assert np.array_equal(runs[0].items["test", "nats"].value, runs[1].items["test", "nats"].value)
    wrong = {name: tensor.flatten()[:1] for name, tensor in tuned.items()}
    with pytest.raises(InputError, match="nothing to average"):
        average_state(finished.load(finished.probed), wrong, 0.5)


def test_a_run_is_made_once_and_reports(finished, mapping, monkeypatch):
    page = (finished.output / "report/report.md").read_text()
    assert all(name in page for name in ("pretrained", "standard", "flow", "half", "online", "linear-probe"))
    for name in ("train_head", "extract_features", "evaluate_classifier"):
        monkeypatch.setattr(pipeline_module, name, _not_again)
    monkeypatch.setattr("flow_finetune.vision.train.fine_tune", _not_again)
    run(read_image_run(mapping, "test"), finished.output)
    changed = {**mapping, "train": {**mapping["train"], "epochs": 3}}
    with pytest.raises(InputError, match=r"holds another run .its train differ"):
        run(read_image_run(changed, "test"), finished.output)
    with pytest.raises(InputError, match="holds another run"):
        train_and_evaluate(finished, MethodConfig(quantile=0.9), finished.output / "flow")


def _not_again(*_, **__):
    raise AssertionError("made again")


def test_a_file_is_no_directory_for_a_method(finished, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken is used by something else"):
        train_and_evaluate(finished, MethodConfig("plain", weights="none"), tmp_path / "taken")


def test_one_cell_alone_starts_again_where_it_was_killed_and_ends_the_same(finished, tmp_path):
    method = MethodConfig(name="flow")
    (tmp_path / "cell/train").mkdir(parents=True)
    shutil.copy(finished.output / "flow/train/identity.json", tmp_path / "cell/train")
    (tmp_path / "cell/train/log.jsonl").write_text('{"step": 1}\n')
    train_and_evaluate(finished, method, tmp_path / "cell")
    same, other = (finished.load(d / "model").state_dict() for d in (finished.output / "flow", tmp_path / "cell"))
    assert all(torch.equal(same[name], other[name]) for name in same)
    logged = (tmp_path / "cell/train/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 11))
    seed = dataclasses.replace(finished.config.train, seed=1)
    train_and_evaluate(finished, method, tmp_path / "seed", seed)
    assert not torch.equal(finished.load(tmp_path / "seed/model").head.weight, same["head.weight"])


def test_l2_pulls_towards_stage_0_and_eval_mode_keeps_statistics(finished, tmp_path):
    method = MethodConfig(name="l2", weights="none", penalty="l2", penalty_strength=1e6, penalty_copy="float32")
    config = dataclasses.replace(finished.config.train, batch_norm="eval")
    train_and_evaluate(finished, method, tmp_path / "l2", config)
    probed, held = (finished.load(d).body.state_dict() for d in (finished.probed, tmp_path / "l2/model"))
    statistics = [name for name in probed if "running" in name or "num_batches" in name]
    assert statistics
    assert all(torch.equal(probed[name], held[name]) for name in statistics)

    def distance(name):
        lines = (tmp_path / "l2" if name == "l2" else finished.output / name) / "train/log.jsonl"
        return json.loads(lines.read_text().splitlines()[-1])["distance"]

    assert 0 < distance("l2") < 0.5 * distance("standard")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [{"name": "token", "weights": "token"}]}, "one weight per image"),
        ({"methods": [{"name": "a", "weights": "none", "train": "lora"}]}, "LoRA is for language models"),
        ({"methods": [{"name": "a", "train": "head"}]}, "weights would have no effect"),
        ({"methods": [{"name": "a", "of": "b", "wise_ft": 0.5}]}, "method a: of must be one of"),
        ({"methods": [{"name": "report"}]}, "plain directory name"),
        ({"methods": [{"name": "flow"}, {"name": "flow"}]}, "two methods are named 'flow'"),
        ({"tasks": []}, "at least one evaluation task"),
        ({"tasks": [{"source": "x.parquet", "role": "other"}]}, "role must be one of target, retained"),
        ({"train": {"augment": "mixup"}}, "augment must be one of none, flip, crop_flip"),
        ({"train": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"data": {"source": "missing.parquet"}}, "no such file: missing.parquet"),
        ({"task": "sound"}, "task must be one of language, image"),
    ],
)
def test_bad_input_is_named(mapping, tmp_path, change, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**mapping, **change}))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_text_model_is_refused(mapping, tiny_model_dir, tmp_path):
    changed = {**mapping, "model": {"source": str(tiny_model_dir)}}
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
    centre = shifted[:, 0, 8, 8] - inputs[:, 0, 8, 8]
    assert shifted.shape == inputs.shape
    assert len(set(centre.tolist())) > 20
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


def test_score_and_evaluate_alone_say_what_the_run_says(finished, mapping, tmp_path):
    model, data, test = mapping["model"]["source"], mapping["data"]["source"], mapping["tasks"][0]["source"]
    common = ["--task", "image", "--precision", "full", "--device", "cpu"]
    result = CliRunner().invoke(app, ["score", "-m", model, "-d", data, "-o", str(tmp_path / "s"), *common])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s/pretrained/model/classifier.json").is_file()
    scored = pq.read_table(tmp_path / "s/scores.parquet")
    assert scored["id"].to_pylist() == _scores(finished)["id"]
    command = ["evaluate", "-m", str(finished.output / "flow/model"), "--images", test, "--source-images",
               mapping["tasks"][1]["source"], "-o", str(tmp_path / "e"), *common]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--source-images needs --pretrained" in result.output
    assert CliRunner().invoke(app, [*command, "--pretrained", model]).exit_code == 0
    alone, whole = (json.loads((d / "evaluation.json").read_text()) for d in (tmp_path / "e", finished.output / "flow"))
    assert [t["metrics"] for t in alone["tasks"]] == [t["metrics"] for t in whole["tasks"]]
    for wrong, message in ((["--tokens"], "--tokens has no meaning with --task image"),
                           (["--task", "language", "--size", "8"], "--size has no meaning with --task language")):  # fmt: skip
        result = CliRunner().invoke(app, ["score", "-m", model, "-d", data, "-o", "x", *common, *wrong])
        assert result.exit_code == 2
        assert message in result.output


def test_train_alone_starts_from_what_score_left_and_wise_ft_averages_it(mapping, tmp_path):
    model, data = mapping["model"]["source"], mapping["data"]["source"]
    common = ["-m", model, "-d", data, "--task", "image", "--precision", "full", "--device", "cpu"]
    scored, tuned = tmp_path / "scored", tmp_path / "tuned"

    def call(*words) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code in (0, 2), result.output
        return ("" if result.exit_code == 0 else "refused: ") + " ".join(result.output.split())

    train = ["train", *common, "--epochs", 1, "--lr", 1e-3, "--optimizer", "sgd", "--augment", "none", "-o", tuned]
    assert "give --scores DIR" in call(*train)
    assert "--micro-batch-tokens has no meaning with --task image" in call(*train, "--micro-batch-tokens", 64)
    assert "an image has one loss" in call(*train, "--method", "flow-token", "--scores", scored)
    assert not scored.exists()
    call("score", *common, "-o", scored)
    assert not call(*train, "--scores", scored).startswith("refused")

    summary = json.loads((tuned / "train/summary.json").read_text())
    config = ImageTrainConfig(epochs=1, learning_rate=1e-3, optimizer="sgd", augment="none")
    assert summary["train"] == dataclasses.asdict(config)
    losses = pq.read_table(scored / "scores.parquet")["loss"].to_numpy()
    assert summary["mean_weight"] == pytest.approx(np.exp(-losses / np.median(losses)).mean(), rel=1e-5)
    assert summary["num_steps"] == -(-NUM_IMAGES // config.batch_size)
    # The same from Python; the probe is not made again.
    prepared = probe_and_score(read_image_run({**mapping, "train": {}, "tasks": []}, "test"), scored)
    train_method(prepared, MethodConfig("again"), tmp_path / "again", config)
    mine, theirs, base = (
        prepared.load(path).state_dict() for path in (tuned / "model", tmp_path / "again/model", prepared.probed)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], base[name]) for name in mine if name.endswith("weight"))

    assert "holds another run" in call(*train, "--scores", scored, "--method", "standard")
    assert not call(*train, "--scores", scored, "--method", "standard", "--overwrite").startswith("refused")
    assert json.loads((tuned / "train/summary.json").read_text())["mean_weight"] == 1.0
    call("wise-ft", prepared.probed, tuned / "model", "--alpha", 0.25, "-o", tmp_path / "averaged")
    mine, averaged = (prepared.load(p).state_dict() for p in (tuned / "model", tmp_path / "averaged/alpha-0.25"))
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * base[name] + 0.25 * mine[name], rtol=1e-6, atol=1e-7)
