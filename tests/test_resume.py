"""A training that was killed, at the moments that matter: what it drew, counted and wrote goes on as if undisturbed."""

import copy
import dataclasses
import json
import math
import os

import pytest
import torch
from flow_finetune import checkpoint as checkpoint_module
from flow_finetune import scores as scores_module
from flow_finetune.adapters import prepare_parameters
from flow_finetune.checkpoint import TrainDirectory, restore_generators
from flow_finetune.config import MethodConfig
from flow_finetune.errors import InputError
from flow_finetune.methods import named_method
from flow_finetune.models import load_model
from flow_finetune.scores import read_scores, score, scoring_fingerprints
from flow_finetune.storage import DirectoryLock
from flow_finetune.train import Meter
from run_files import assert_same_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import PLAIN, Setup

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

ONLINE = MethodConfig("online", online=True)


@pytest.fixture(scope="module")
def setup(tiny_model_dir, qa_file, tmp_path_factory):
    return Setup(tiny_model_dir, qa_file).score(tmp_path_factory.mktemp("scored"))


def _interrupted(
    setup, directory, monkeypatch, *arguments, where=TrainDirectory, name="save_checkpoint", when=None, **options
):
    """A training that ends in its first checkpoint, or in the call of `where.name` that `when` is true of."""
    original = getattr(where, name)

    def interrupt(*args, **rest):
        if when is None:
            original(*args, **rest)
        if when is None or when(*args):
            raise KeyboardInterrupt
        return original(*args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.train(directory, *arguments, **options)


@pytest.mark.parametrize("name", ["dropout", "buffer"])
def test_what_a_model_draws_and_counts_goes_on(setup, tmp_path, monkeypatch, name):
    """Dropout draws on where it stopped; a buffer that the model writes to keeps its value."""
    options = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2}

    def model():
        lm, _ = load_model(setup.config)
        if name == "dropout":
            for layer in lm.model.model.layers:
                layer.self_attn.attention_dropout = 0.5
        else:
            lm.model.register_buffer("passes", torch.zeros(()))
            lm.model.model.register_forward_hook(lambda *_: lm.model.passes.add_(1) and None)
        return lm

    setup.train(tmp_path / "undisturbed", lm=model(), **options)
    _interrupted(setup, tmp_path / "continued", monkeypatch, lm=model(), **options)
    setup.train(tmp_path / "continued", lm=model(), **options)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "continued")


def test_a_checkpoint_stays_until_the_next_is_whole(setup, tmp_path, monkeypatch):
    options = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2}
    setup.train(tmp_path / "undisturbed", **options)
    _interrupted(
        setup, tmp_path / "continued", monkeypatch, where=checkpoint_module, name="save_file",
        when=lambda tensors, path: "step-00000004" in str(path), **options,
    )  # fmt: skip
    assert os.listdir(tmp_path / "continued/checkpoints") == ["step-00000002"]
    setup.train(tmp_path / "continued", **options)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "continued")
    # TensorBoard shows each step once: what was logged after the checkpoint is purged.
    events = EventAccumulator(str(tmp_path / "continued/train/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_kill_while_the_model_moves_into_place_loses_nothing(setup, tmp_path, monkeypatch):
    """Without all its files a run is not finished: the summary is written last."""
    options = {"epochs": 1, "batch_size": 12, "learning_rate": 1e-3, "checkpoint_every": 1}
    setup.train(tmp_path / "undisturbed", **options)
    _interrupted(
        setup, tmp_path / "killed", monkeypatch, where=os, name="replace",
        when=lambda source, target: str(source).endswith("saved/model.safetensors"), **options,
    )  # fmt: skip
    setup.train(tmp_path / "killed", **options)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "killed")


def test_the_summary_of_a_continued_online_run(setup, tmp_path, monkeypatch):
    options = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2}
    expected = setup.train(tmp_path / "undisturbed", ONLINE, **options)
    _interrupted(setup, tmp_path / "continued", monkeypatch, ONLINE, **options)
    found = setup.train(tmp_path / "continued", ONLINE, **options)
    for name in ("temperature", "mean_weight", "effective_sample_size", "final_loss"):
        assert found[name] == expected[name], name


def test_a_continued_meter_goes_on():
    before, after = Meter(), Meter()
    before.seconds, before.tokens = 100.0, 7
    after.load_state_dict(before.state_dict())
    assert after.elapsed() >= 100
    assert after.tokens == 7


def test_nobody_else_trains_into_the_directory(setup, tmp_path, monkeypatch):
    tried = []

    def other(self, *rest):
        with pytest.raises(InputError, match="another process works in"):
            DirectoryLock().take(self.path)
        tried.append(self.path.name)

    monkeypatch.setattr(TrainDirectory, "save_checkpoint", other)
    setup.train(tmp_path / "out", epochs=1, batch_size=12, checkpoint_every=1)
    assert tried == ["out"]
    DirectoryLock().take(tmp_path / "out")


def test_room_is_asked_for_checkpoints_too(setup, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint_module, "require_disk_space", lambda path, num_bytes: asked.append(num_bytes))
    for every in (0, 1):
        setup.train(tmp_path / str(every), epochs=1, batch_size=24, checkpoint_every=every)
    num_bytes = 4 * sum(p.numel() for p in setup.lm.parameters())
    # The model; beside it two checkpoints, the old one and the new, of the weights and two moments each.
    assert asked == [num_bytes, 7 * num_bytes]
    # Of the head alone, and of adapters, those of what is trained.
    asked.clear()
    trained = {}
    for name in ("linear-probe", "lora"):
        setup.train(tmp_path / name, named_method(name), epochs=1, batch_size=24, checkpoint_every=1)
        lm = copy.deepcopy(setup.lm)
        prepare_parameters(lm, named_method(name))
        trained[name] = 4 * sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert asked == [num_bytes + 6 * trained["linear-probe"], num_bytes + 6 * trained["lora"]]


def test_a_run_that_is_continued_asks_for_what_is_not_there_yet(setup, tmp_path, monkeypatch):
    options = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2}
    _interrupted(setup, tmp_path / "out", monkeypatch, PLAIN, **options)
    asked = []
    monkeypatch.setattr(checkpoint_module, "require_disk_space", lambda path, num_bytes: asked.append(num_bytes))
    there = sum(p.stat().st_size for p in (tmp_path / "out/checkpoints").rglob("*") if p.is_file())
    setup.train(tmp_path / "out", PLAIN, **options)
    num_bytes = 4 * sum(p.numel() for p in setup.lm.parameters())
    assert there > 3 * num_bytes
    assert asked == [7 * num_bytes - there]


def test_the_same_command_with_overwrite_continues_what_it_began(setup, tmp_path, monkeypatch):
    options = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2}
    setup.train(tmp_path / "undisturbed", PLAIN, **options)
    setup.train(tmp_path / "out", PLAIN, **{**options, "learning_rate": 2e-3})  # another's, finished
    _interrupted(setup, tmp_path / "out", monkeypatch, PLAIN, overwrite=True, **options)
    # How it is recorded may change on the way, as where memory or the disk was short.
    first = json.loads((tmp_path / "out/train/log.jsonl").read_text().splitlines()[0])
    setup.train(tmp_path / "out", PLAIN, overwrite=True, **{**options, "track_distance": False, "checkpoint_every": 3})
    assert json.loads((tmp_path / "out/train/log.jsonl").read_text().splitlines()[0]) == first
    names = ("undisturbed", "out")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1
    # Finished, it is made again.
    setup.train(tmp_path / "out", PLAIN, overwrite=True, **options)
    assert json.loads((tmp_path / "out/train/log.jsonl").read_text().splitlines()[0]) != first


def test_a_scoring_that_replaces_another_continues_too(setup, tmp_path, monkeypatch):
    config, lm, tokenizer, samples = setup.config, setup.lm, setup.tokenizer, setup.samples
    other = tmp_path / "other.parquet"
    score(lm, tokenizer, samples, other, model_config=config)  # without the tokens' losses
    made, original = [], scores_module._score_batch

    def second_fails(*arguments):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return original(*arguments)

    options = {"model_config": config, "tokens": True, "overwrite": True, "batch_tokens": 256}
    with monkeypatch.context() as patch:
        patch.setattr(scores_module, "_score_batch", second_fails)
        with pytest.raises(KeyboardInterrupt):
            score(lm, tokenizer, samples, other, **options)
    counted = []
    monkeypatch.setattr(scores_module, "_score_batch", lambda *a: counted.append(1) or original(*a))
    score(lm, tokenizer, samples, other, **options)
    num_all = len(counted) + 1
    score(lm, tokenizer, samples, other, **options)  # complete now, so from the beginning
    assert len(counted) == 2 * num_all - 1 > 2
    assert (
        read_scores(other, samples, scoring_fingerprints(lm, tokenizer, samples), tokens=True).token_losses is not None
    )


def test_a_model_is_not_replaced_by_what_is_trained_from_it(setup, tmp_path):
    setup.train(tmp_path / "out", PLAIN, epochs=1, batch_size=24)
    other = copy.copy(setup)
    other.config = dataclasses.replace(setup.config, source=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"--overwrite would remove .*out, which this training starts from"):
        other.train(tmp_path / "out", PLAIN, epochs=2, batch_size=24, overwrite=True)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_precision_and_temperature_are_part_of_what_a_run_is(setup, tmp_path):
    options = {"epochs": 1, "batch_size": 24}
    setup.train(tmp_path / "a", **options)
    other = copy.copy(setup)
    other.config = dataclasses.replace(setup.config, precision="bf16")
    with pytest.raises(InputError, match=r"differs in precision\.precision"):
        other.train(tmp_path / "a", **options)
    setup.train(tmp_path / "b", ONLINE, **options)
    with pytest.raises(InputError, match="differs in temperature"):
        setup.train(tmp_path / "b", ONLINE, scores=setup.scores, **options)


def test_a_training_is_not_continued_with_other_scores(setup, tmp_path, monkeypatch):
    """Those of another precision are of the same model, tokenizer and data."""
    options = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "checkpoint_every": 2}
    other = copy.copy(setup)
    other.scores = tmp_path / "bf16.parquet"
    config = dataclasses.replace(setup.config, precision="bf16")
    score(setup.lm, setup.tokenizer, setup.samples, other.scores, model_config=config)
    for name, method in (("flow", MethodConfig("flow")), ("plain", MethodConfig("plain", weights="none"))):
        _interrupted(setup, tmp_path / name, monkeypatch, method, **options)
        if name == "flow":
            with pytest.raises(InputError, match=r"differs in scores.; choose another directory"):
                other.train(tmp_path / name, method, **options)
        other.train(tmp_path / name, method, overwrite=name == "flow", **options)
    # What was trained before this was written down is taken for the same.
    identity = tmp_path / "flow/train/identity.json"
    stored = json.loads(identity.read_text())
    del stored["scores"]
    identity.write_text(json.dumps(stored))
    assert setup.train(tmp_path / "flow", MethodConfig("flow"), **options)["num_steps"] == 4


def test_logged_learning_rates_are_those_of_the_steps(setup, tmp_path):
    setup.train(tmp_path / "out", epochs=1, batch_size=4, learning_rate=1e-3, warmup=0.34)
    lines = [json.loads(line) for line in (tmp_path / "out/train/log.jsonl").read_text().splitlines()]
    # Two steps up from 0, then half a cosine down over the four that are left.
    expected = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * e for e in expected])


def test_generators_of_gpus_that_are_not_seen_any_more_are_left_out(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: found.append((device, state)))
    restore_generators(["a", "b", "c"])
    assert found == [(0, "a"), (1, "b")]


def test_a_link_to_a_directory_stands_for_it(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert TrainDirectory(tmp_path / "link", {}, None).saved == (tmp_path / "disk/saved").resolve()
