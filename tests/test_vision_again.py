"""What a second call does: it waits for no half-done work, continues what was killed, measures again what has changed."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_images
import torch
from flow_finetune.cli import app
from flow_finetune.config import MethodConfig
from flow_finetune.errors import InputError
from flow_finetune.results import load_runs
from flow_finetune.storage import DirectoryLock
from flow_finetune.vision import train as train_module
from flow_finetune.vision.config import ImageModelConfig, read_image_run
from flow_finetune.vision.models import load_classifier
from flow_finetune.vision.pipeline import probe_and_score, run
from flow_finetune.vision.train import train_method
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


@contextlib.contextmanager
def _working_in(path):
    path.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock()
    lock.take(path)
    yield
    lock.release()


def test_trainings_and_scorings_do_not_share_a_directory(image_run, image_mapping, tmp_path):
    method, config = MethodConfig("plain", weights="none"), dataclasses.replace(image_run.config.train, epochs=1)
    with _working_in(tmp_path / "t"), pytest.raises(InputError, match=r"another process works in .*t; wait for it"):
        train_method(image_run, method, tmp_path / "t", config)
    assert list((tmp_path / "t").iterdir()) == []
    train_method(image_run, method, tmp_path / "t", config)
    # Not replaced either, and free once a training is done.
    with _working_in(tmp_path / "t"), pytest.raises(InputError, match="another process works in"):
        train_method(image_run, MethodConfig("other", weights="none"), tmp_path / "t", config, overwrite=True)
    assert train_method(image_run, method, tmp_path / "t", config)["method"]["name"] == "plain"
    command = ["score", "-m", image_mapping["model"]["source"], "-d", image_mapping["data"]["source"], "--task", "image",
               "--device", "cpu", "-o", str(tmp_path / "s")]  # fmt: skip
    with _working_in(tmp_path / "s"):
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "another process works in" in " ".join(result.output.split())


def test_a_model_is_not_replaced_by_what_is_trained_from_it(image_run, tmp_path):
    method, config = MethodConfig("plain", weights="none"), dataclasses.replace(image_run.config.train, epochs=1)
    train_method(image_run, method, tmp_path / "t", config)
    model = dataclasses.replace(image_run.config.model, source=str(tmp_path / "t/model"))
    other = dataclasses.replace(image_run, config=dataclasses.replace(image_run.config, model=model))
    with pytest.raises(InputError, match=r"--overwrite would remove .*model, which this training starts from"):
        train_method(other, method, tmp_path / "t", config, overwrite=True)
    assert (tmp_path / "t/model").is_dir()


def test_a_directory_may_be_a_link_to_another_disk(image_run, tmp_path):
    method, config = MethodConfig("plain", weights="none"), dataclasses.replace(image_run.config.train, epochs=1)
    (tmp_path / "disk").mkdir()
    (tmp_path / "t").symlink_to(tmp_path / "disk")
    for overwrite in (False, True):
        summary = train_method(image_run, method, tmp_path / "t", config, overwrite=overwrite)
    assert summary["method"]["name"] == "plain"
    assert (tmp_path / "t").is_symlink()
    assert (tmp_path / "disk/model").is_dir()


class _Killed(BaseException):
    """As a signal is: no handler of errors sees it."""


RESUMED = {
    "flow, cropped": (MethodConfig("flow"), {"augment": "crop_flip"}),
    "online": (MethodConfig("online", online=True), {"augment": "flip", "batch_norm": "eval"}),
    "sgd, l2 on disk": (MethodConfig("l2", weights="none", penalty="l2", penalty_copy="disk"), {"optimizer": "sgd"}),
    "sfa": (MethodConfig("sfa", weights="none", average_every=0.4, average_share=0.5), {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_training_continues_to_the_same_bits(name, image_run, tmp_path, monkeypatch):
    method, changes = RESUMED[name]
    config = dataclasses.replace(image_run.config.train, checkpoint_every=3, **changes)
    whole = train_method(image_run, method, tmp_path / "whole", config)
    log = train_module._Directory.log

    def log_until_killed(self, line):
        if line["step"] == 8:
            raise _Killed
        log(self, line)

    monkeypatch.setattr(train_module._Directory, "log", log_until_killed)
    with pytest.raises(_Killed):
        train_method(image_run, method, tmp_path / "killed", config)
    monkeypatch.setattr(train_module._Directory, "log", log)
    checkpoint = torch.load(tmp_path / "killed/train/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 6
    assert len((tmp_path / "killed/train/log.jsonl").read_text().splitlines()) == 7
    continued = train_method(image_run, method, tmp_path / "killed", config)
    mine, theirs = (image_run.load(tmp_path / d / "model").state_dict() for d in ("whole", "killed"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    logs = [(tmp_path / d / "train/log.jsonl").read_text() for d in ("whole", "killed")]
    assert logs[0] == logs[1]
    # The time of the call that was killed counts.
    assert continued["seconds"] > checkpoint["seconds"] > 0
    timed = {"seconds", "images_per_second"}
    assert {k: v for k, v in whole.items() if k not in timed} == {k: v for k, v in continued.items() if k not in timed}
    assert sorted(p.name for p in (tmp_path / "killed/train").iterdir()) == [
        "identity.json", "log.jsonl", "summary.json",
    ]  # fmt: skip


def test_a_checkpoint_of_other_options_is_not_continued(image_run, tmp_path, monkeypatch):
    config = dataclasses.replace(image_run.config.train, checkpoint_every=3)
    monkeypatch.setattr(train_module, "train_head", _killed)
    with pytest.raises(_Killed):
        train_method(image_run, MethodConfig("flow"), tmp_path / "t", config)
    assert torch.load(tmp_path / "t/train/checkpoint.pt", weights_only=True)["step"] == 10  # the last: stage 2 is left
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(InputError, match=r"holds another run .its train.seed differ"):
        train_method(image_run, MethodConfig("flow"), tmp_path / "t", other)
    monkeypatch.undo()
    train_method(image_run, MethodConfig("flow"), tmp_path / "t", other, overwrite=True)
    train_method(image_run, MethodConfig("flow"), tmp_path / "fresh", other)
    mine, theirs = (image_run.load(tmp_path / d / "model").state_dict() for d in ("t", "fresh"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def _killed(*_, **__):
    raise _Killed


def _small(image_mapping, tmp_path) -> dict:
    """A run of one method with files of its own."""
    train = shutil.copy(image_mapping["data"]["source"], tmp_path / "train.parquet")
    test = shutil.copy(image_mapping["tasks"][0]["source"], tmp_path / "test.parquet")
    return {**image_mapping, "data": {"source": str(train)}, "methods": [{"name": "standard", "weights": "none"}],
            "tasks": [{"source": str(test), "role": "target"}]}  # fmt: skip


def _losses(output, *names) -> list[np.ndarray]:
    return [found.items["test", "nats"].value for found in load_runs([output / name for name in names])]


def test_changed_evaluation_images_are_evaluated_again(image_mapping, tmp_path, capfd):
    mapping, output = _small(image_mapping, tmp_path), tmp_path / "run"
    run(read_image_run(mapping, "test"), output)
    before = _losses(output, "pretrained", "standard")
    encoded, labels = tiny_images.make_images(20, 3, 12, 1)
    tiny_images.write_parquet(tmp_path / "test.parquet", encoded, [(label + 1) % 3 for label in labels])
    mapping["methods"].append({"name": "flow"})
    run(read_image_run(mapping, "test"), output)
    assert "standard was evaluated on other items of test; evaluating it again" in " ".join(
        capfd.readouterr().err.split()
    )
    fresh = tmp_path / "fresh"
    run(read_image_run(mapping, "test"), fresh)
    names = ("pretrained", "standard", "flow")
    for again, expected in zip(_losses(output, *names), _losses(fresh, *names), strict=True):
        assert np.array_equal(again, expected)
    assert all((old != new).any() for old, new in zip(before, _losses(output, *names), strict=False))


def test_scoring_again_forgets_what_the_old_probe_was_measured_at(image_mapping, tmp_path):
    mapping, output = _small(image_mapping, tmp_path), tmp_path / "run"
    run(read_image_run(mapping, "test"), output)
    (before,) = _losses(output, "pretrained")
    tiny_images.write_parquet(tmp_path / "train.parquet", *tiny_images.make_images(30, 3, 12, 9))
    probe_and_score(read_image_run(mapping, "test"), output, overwrite=True)
    shutil.rmtree(output / "standard")
    run(read_image_run(mapping, "test"), output)
    run(read_image_run(mapping, "test"), tmp_path / "fresh")
    assert np.array_equal(*(_losses(d, "pretrained")[0] for d in (output, tmp_path / "fresh")))
    assert not np.array_equal(before, _losses(output, "pretrained")[0])


def test_train_takes_the_probe_that_a_run_has_made(image_mapping, tmp_path):
    """Its seed and its head's options are not asked for again: `train` has none for them, and stage 2 has the same."""
    mapping = _small(image_mapping, tmp_path)
    head = {"head_epochs": 2, "head_batch_size": 10, "head_learning_rate": 0.03}
    mapping["train"] = {**mapping["train"], "seed": 3, "epochs": 1, **head}
    run(read_image_run(mapping, "test"), tmp_path / "run")
    mark = (tmp_path / "run/pretrained/probe.json").read_text()
    assert json.loads(mark)["seed"] == 3
    options = {"scores": tmp_path / "run", "output": tmp_path / "t", "method": "standard", "epochs": 1, "lr": 1e-3,
               "seed": 3, "batch-size": 8, "augment": "none", "max-grad-norm": 0, "warmup": 0, "precision": "full",
               "device": "cpu"}  # fmt: skip
    command = ["train", "--task", "image", "-m", mapping["model"]["source"], "-d", mapping["data"]["source"]]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run/pretrained/probe.json").read_text() == mark
    summary = json.loads((tmp_path / "t/train/summary.json").read_text())
    assert {name: summary["train"][name] for name in head} == head
    # What the run made of the same options.
    mine, theirs = (
        load_classifier(ImageModelConfig(str(tmp_path / name / "model"), device="cpu")).state_dict()
        for name in ("t", "run/standard")
    )
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
