"""`score`, `train`, `evaluate` and `wise-ft` of images, each alone: they say what the whole run says."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_images
import torch
from flow_finetune.cli import app
from flow_finetune.config import MethodConfig
from flow_finetune.errors import InputError
from flow_finetune.vision.config import ImageTaskConfig, ImageTrainConfig, read_image_run
from flow_finetune.vision.evaluate import named_tasks
from flow_finetune.vision.pipeline import check_run, probe_and_score
from flow_finetune.vision.train import train_method
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_score_and_evaluate_alone_say_what_the_run_says(image_run, image_mapping, tmp_path):
    model, data, test = (
        image_mapping["model"]["source"],
        image_mapping["data"]["source"],
        image_mapping["tasks"][0]["source"],
    )
    common = ["--task", "image", "--precision", "full", "--device", "cpu"]
    result = CliRunner().invoke(app, ["score", "-m", model, "-d", data, "-o", str(tmp_path / "s"), *common])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s/pretrained/model/classifier.json").is_file()
    losses = pq.read_table(tmp_path / "s/scores.parquet")["loss"].to_numpy()
    weights = np.exp(-losses / np.median(losses))
    size = f"effective sample size {weights.sum() ** 2 / np.square(weights).sum():,.1f} of {len(losses)}"
    assert size in " ".join(result.output.split())
    scored = pq.read_table(tmp_path / "s/scores.parquet")
    assert scored["id"].to_pylist() == pq.read_table(image_run.scores)["id"].to_pylist()
    command = ["evaluate", "-m", str(image_run.output / "flow/model"), "--images", test, "--source-images",
               image_mapping["tasks"][1]["source"], "-o", str(tmp_path / "e"), *common]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--source-images needs --pretrained" in result.output
    assert CliRunner().invoke(app, [*command, "--pretrained", model]).exit_code == 0
    alone, whole = (
        json.loads((d / "evaluation.json").read_text()) for d in (tmp_path / "e", image_run.output / "flow")
    )
    assert [t["metrics"] for t in alone["tasks"]] == [t["metrics"] for t in whole["tasks"]]
    for wrong, message in ((["--split", "test"], "split 'test' is of a hub data set"),
                           (["--revision", "main"], "revision 'main' is of a transformers hub id"),
                           (["--tokens"], "--tokens has no meaning with --task image"),
                           (["--compile"], "--compile has no meaning with --task image"),
                           (["--task", "language", "--size", "8"], "--size has no meaning with --task language")):  # fmt: skip
        result = CliRunner().invoke(app, ["score", "-m", model, "-d", data, "-o", "x", *common, *wrong])
        assert result.exit_code == 2
        assert message in result.output


def test_scoring_again_needs_overwrite_and_names_what_differs(image_mapping, tmp_path):
    model, data = image_mapping["model"]["source"], image_mapping["data"]["source"]
    common = ["score", "-m", model, "-d", data, "--task", "image", "--device", "cpu", "-o", str(tmp_path / "s")]
    assert CliRunner().invoke(app, common).exit_code == 0
    result = CliRunner().invoke(app, [*common, "--precision", "full", "--size", "20"])
    assert result.exit_code == 2
    assert "it differs in size, precision" in " ".join(result.output.split())
    assert "--overwrite" in result.output
    again = [*common, "--precision", "full", "--size", "20", "--overwrite"]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert json.loads((tmp_path / "s/pretrained/model/classifier.json").read_text())["size"] == 20


def test_what_others_keep_in_a_directory_is_not_replaced(image_mapping, tmp_path):
    model, data = image_mapping["model"]["source"], image_mapping["data"]["source"]
    command = ["score", "-m", model, "-d", data, "--task", "image", "--device", "cpu", "-o", str(tmp_path / "s")]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/scores.parquet").write_text("of texts")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "s is used by something else" in " ".join(result.output.split())
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["scores.parquet"]
    assert (tmp_path / "s/scores.parquet").read_text() == "of texts"
    # A mark without scores is of a call that was killed: it is made again.
    (tmp_path / "s/scores.parquet").unlink()
    (tmp_path / "s/pretrained/model").mkdir(parents=True)
    (tmp_path / "s/pretrained/model/classifier.json").write_text("half of it")
    (tmp_path / "s/pretrained/probe.json").write_text("{}")
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "s/pretrained/model/classifier.json").read_text())["size"] > 0


def test_a_revision_is_of_the_model_that_a_directory_was_tuned_from(image_mapping, tmp_path, monkeypatch):
    asked = []

    def evaluate_saved(model, tasks, output, *, pretrained, **options):
        asked.append((model.revision, pretrained and pretrained.revision))
        return {"tasks": []}

    monkeypatch.setattr("flow_finetune.vision.evaluate.evaluate_saved", evaluate_saved)
    common = ["evaluate", "--task", "image", "--images", image_mapping["tasks"][0]["source"], "-o", str(tmp_path / "e"),
              "--revision", "v2"]  # fmt: skip
    for more in (["-m", str(tmp_path), "--pretrained", "org/model"], ["-m", "org/model"]):
        assert CliRunner().invoke(app, [*common, *more]).exit_code == 0
    assert asked == [(None, "v2"), ("v2", None)]


def test_train_alone_starts_from_what_score_left_and_wise_ft_averages_it(image_mapping, tmp_path):
    model, data = image_mapping["model"]["source"], image_mapping["data"]["source"]
    common = ["-m", model, "-d", data, "--task", "image", "--precision", "full", "--device", "cpu"]
    scored, tuned = tmp_path / "scored", tmp_path / "tuned"

    def call(*words) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code in (0, 2), result.output
        return ("" if result.exit_code == 0 else "refused: ") + " ".join(result.output.split())

    train = ["train", *common, "--epochs", 1, "--lr", 1e-3, "--optimizer", "sgd", "--augment", "none", "-o", tuned]
    assert "give --scores DIR" in call(*train)
    assert "--bad-images must be one of stop, skip" in call("score", *common, "--bad-images", "drop", "-o", scored)
    assert "has no column 'img'" in call("score", *common, "--image-field", "img", "-o", scored)
    assert "--micro-batch-tokens has no meaning with --task image" in call(*train, "--micro-batch-tokens", 64)
    assert "an image has one loss" in call(*train, "--method", "flow-token", "--scores", scored)
    assert "has made; make it first" in call(*train, "--scores", scored)
    assert not scored.exists()
    call("score", *common, "-o", scored)
    assert not call(*train, "--scores", scored).startswith("refused")

    summary = json.loads((tuned / "train/summary.json").read_text())
    config = ImageTrainConfig(epochs=1, learning_rate=1e-3, optimizer="sgd", augment="none")
    assert summary["train"] == dataclasses.asdict(config)
    losses = pq.read_table(scored / "scores.parquet")["loss"].to_numpy()
    assert summary["mean_weight"] == pytest.approx(np.exp(-losses / np.median(losses)).mean(), rel=1e-5)
    assert summary["num_steps"] == -(-tiny_images.NUM_IMAGES // config.batch_size)
    # The same from Python; the probe is not made again.
    prepared = probe_and_score(read_image_run({**image_mapping, "train": {}, "tasks": []}, "test"), scored)
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


def test_labels_far_apart_are_no_classes(image_mapping, tmp_path, capfd):
    encoded, _ = tiny_images.make_images(4, 2, 12, 0)
    for last, message in ((2_000_000_000, "the largest label is 2,000,000,000, of 2 classes with images"), (3, None)):
        path = tiny_images.write_parquet(tmp_path / "far.parquet", encoded, [0, last] * 2)
        config = read_image_run({**image_mapping, "data": {"source": str(path)}, "tasks": []}, "test")
        if message:
            with pytest.raises(InputError, match=message):
                probe_and_score(config, tmp_path / "out")
        else:
            probe_and_score(config, tmp_path / "out")
            assert "2 of 4 classes have no image" in " ".join(capfd.readouterr().err.split())


def test_tasks_of_one_name_are_told_apart_by_their_folders(image_mapping, tmp_path, monkeypatch):
    target, retained = (task["source"] for task in image_mapping["tasks"])
    places = []
    for folder, source in (("flowers", target), ("imagenet", retained)):
        (tmp_path / folder).mkdir()
        places.append(shutil.copy(source, tmp_path / folder / "test.parquet"))
    monkeypatch.chdir(tmp_path / "flowers")  # of which "test.parquet" alone says nothing
    model = image_mapping["model"]["source"]
    common = ["evaluate", "-m", model, "--task", "image", "--device", "cpu", "--pretrained", model, "--source-images"]
    result = CliRunner().invoke(app, [*common, places[1], "--images", "test.parquet", "-o", str(tmp_path / "e")])
    assert result.exit_code == 0, result.output
    roles = {task["name"]: task["role"] for task in json.loads((tmp_path / "e/evaluation.json").read_text())["tasks"]}
    assert roles == {"flowers-test": "target", "imagenet-test": "retained"}
    # Where that does not help, it is found before a model is loaded.
    monkeypatch.setattr("flow_finetune.vision.evaluate.load_classifier", None)
    result = CliRunner().invoke(app, [*common, places[0], "--images", "test.parquet", "-o", str(tmp_path / "f")])
    assert result.exit_code == 2
    assert "two tasks are named 'flowers-test'; give them different names" in " ".join(result.output.split())
    mapping = {**image_mapping, "tasks": [{**task, "name": "one"} for task in image_mapping["tasks"]]}
    with pytest.raises(InputError, match="two tasks are named 'one'"):
        check_run(read_image_run(mapping, "test"))


def test_names_that_are_given_stay():
    given = [("a/test", None), ("b/test", "mine"), ("c/val", "test"), ("org/test", None), ("d/other.parquet", None)]
    named = named_tasks([ImageTaskConfig(source, name=name) for source, name in given])
    assert [task.name for task in named] == ["a-test", "mine", "test", "org-test", "other"]
