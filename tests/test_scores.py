"""Scores: right numbers, right file after a kill, and refused where they do not belong."""

import dataclasses
import errno
import json
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from flow_finetune import scores as scores_module
from flow_finetune.config import DataConfig, MethodConfig, ModelConfig
from flow_finetune.data import load_samples
from flow_finetune.errors import InputError
from flow_finetune.journal import Journal
from flow_finetune.methods import make_weights
from flow_finetune.models import load_model
from flow_finetune.processes import Processes
from flow_finetune.scores import METADATA_KEY, read_metadata, read_scores, score, scoring_fingerprints
from flow_finetune.storage import exclusive_file
from processes import kill_when, run_python, spawn_two

import flow_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
GSM8K = Path(__file__).parents[1] / "examples/data/gsm8k_train.jsonl.gz"


def data_config(path, **options):
    return DataConfig(str(path), prompt_field="question", response_field="answer", **options)


@pytest.fixture
def scored(tiny_model_dir, qa_file, tmp_path):
    """Model, tokenizer, samples and their score file with token losses."""
    config = ModelConfig(str(tiny_model_dir), precision="full", device="cpu")
    lm, tokenizer = load_model(config)
    samples = load_samples(data_config(qa_file), tokenizer)
    path = tmp_path / "scores.parquet"
    score(lm, tokenizer, samples, path, model_config=config, tokens=True)
    return config, lm, tokenizer, samples, path


def test_losses_equal_those_of_full_logits(scored):
    _, lm, _, samples, path = scored
    table = pq.read_table(path).to_pydict()
    for row, sample in enumerate(samples.samples):
        ids = torch.from_numpy(sample.input_ids).long()
        logits = lm.model(input_ids=ids[None]).logits[0].detach().double()
        nll = F.cross_entropy(logits[sample.start - 1 : -1], ids[sample.start :], reduction="none")
        assert table["loss_sum"][row] == pytest.approx(float(nll.sum()), rel=1e-5)
        assert table["num_targets"][row] == len(nll)
        assert table["num_correct"][row] == int((logits[sample.start - 1 : -1].argmax(-1) == ids[sample.start :]).sum())
        np.testing.assert_allclose(table["token_losses"][row], nll, rtol=2e-5, atol=2e-5)
        assert table["id"][row] == sample.id


def test_temperature_and_weights_of_1000_real_samples_equal_numpys(tiny_model_dir, tmp_path):
    config = ModelConfig(str(tiny_model_dir), precision="full", device="cpu")
    lm, tokenizer = load_model(config)
    samples = load_samples(data_config(GSM8K, max_length=400), tokenizer)
    assert samples.num_read == 1000
    path = tmp_path / "scores.parquet"
    score(lm, tokenizer, samples, path, model_config=config, batch_tokens=8192, tokens=True)
    found = read_scores(path, samples, scoring_fingerprints(lm, tokenizer, samples), tokens=True)
    per_sample = np.array([np.mean(values, dtype=np.float64) for values in found.token_losses])
    tau = np.median(per_sample)
    weights = make_weights(MethodConfig(), len(samples.samples), found)
    assert weights.temperature == pytest.approx(tau, rel=1e-12)
    assert read_metadata(path)["temperature"] == pytest.approx(tau, rel=1e-12)
    np.testing.assert_allclose(weights.per_sample, np.exp(-per_sample / tau), rtol=1e-6)
    assert weights.effective_sample_size == pytest.approx(
        np.exp(-per_sample / tau).sum() ** 2 / (np.exp(-per_sample / tau) ** 2).sum(), rel=1e-5
    )
    all_tokens = np.concatenate(found.token_losses).astype(np.float64)
    by_token = make_weights(MethodConfig(weights="token"), len(samples.samples), found)
    assert by_token.temperature == pytest.approx(np.median(all_tokens), rel=1e-12)
    np.testing.assert_allclose(
        torch.cat(by_token.per_token), np.exp(-all_tokens / np.median(all_tokens)), rtol=1e-5, atol=1e-30
    )


def test_scores_come_back_in_the_order_of_the_samples(scored):
    _, lm, tokenizer, samples, path = scored
    samples.samples = samples.samples[::-1]
    found = read_scores(path, samples, scoring_fingerprints(lm, tokenizer, samples))
    assert found.loss.tolist() == pq.read_table(path).column("loss").to_pylist()[::-1]


def test_a_second_call_leaves_complete_scores_alone(scored):
    config, lm, tokenizer, samples, path = scored
    before = path.read_bytes()
    assert score(lm, tokenizer, samples, path, model_config=config, tokens=True) == 0.0
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"holds other scores \(its tokens is True, this one's False\)"):
        score(lm, tokenizer, samples, path, model_config=config, tokens=False)


def test_foreign_scores_are_refused_by_the_fingerprint_that_differs(scored, tmp_path):
    _, lm, tokenizer, samples, path = scored
    fingerprints = scoring_fingerprints(lm, tokenizer, samples)
    for name in ("model", "tokenizer", "template", "data"):
        with pytest.raises(InputError, match=f"its {name} fingerprint is {fingerprints[name]}, this one's other"):
            read_scores(path, samples, {**fingerprints, name: "other"})
    with torch.no_grad():
        lm.head.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match="model fingerprint"):
        read_scores(path, samples, scoring_fingerprints(lm, tokenizer, samples))


def test_missing_and_repeated_ids_are_refused(scored, tmp_path):
    _, lm, tokenizer, samples, path = scored
    fingerprints = scoring_fingerprints(lm, tokenizer, samples)
    table = pq.read_table(path)
    pq.write_table(table.slice(1), tmp_path / "missing.parquet")
    with pytest.raises(InputError, match=r"lacks 1 of 24 ids, the first is '0'"):
        read_scores(tmp_path / "missing.parquet", samples, fingerprints)
    repeated = table.take([0, *range(len(table))])
    pq.write_table(repeated, tmp_path / "repeated.parquet")
    with pytest.raises(InputError, match=r"1 repeated ids, the first is '0'"):
        read_scores(tmp_path / "repeated.parquet", samples, fingerprints)


def test_files_that_are_not_scores_are_refused(scored, tmp_path):
    _, lm, tokenizer, samples, path = scored
    fingerprints = scoring_fingerprints(lm, tokenizer, samples)
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), tmp_path / "plain.parquet")
    without = pq.read_table(path).drop_columns(["token_losses"])
    pq.write_table(without, tmp_path / "sequence.parquet")
    for name, match in (
        ("none.parquet", "no such file"), ("text.parquet", "not a Parquet file"), ("plain.parquet", "not written by"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            read_scores(tmp_path / name, samples, fingerprints)
    with pytest.raises(InputError, match="--tokens"):
        read_scores(tmp_path / "sequence.parquet", samples, fingerprints, tokens=True)


def test_losses_that_are_not_finite_are_listed_and_nothing_is_left(tiny_model_dir, qa_file, tmp_path):
    config = ModelConfig(str(tiny_model_dir), precision="full", device="cpu")
    lm, tokenizer = load_model(config)
    samples = load_samples(data_config(qa_file), tokenizer)
    # Only samples 3 and 17 hold this token.
    token = tokenizer("~", add_special_tokens=False).input_ids[0]
    for index in (3, 17):
        samples.samples[index].input_ids[5] = token
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(InputError, match=r"2 samples is NaN or infinite, with ids (3, 17|17, 3);"):
        score(lm, tokenizer, samples, tmp_path / "s.parquet", model_config=config, batch_tokens=1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_journal_and_no_half_file(scored, tmp_path, monkeypatch):
    config, lm, tokenizer, samples, path = scored
    other = tmp_path / "other.parquet"

    def full(table, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scores_module.pq, "write_table", full)
        with pytest.raises(InputError, match="no disk space left"):
            score(lm, tokenizer, samples, other, model_config=config, tokens=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.parquet.journal", "scores.parquet"]
    score(lm, tokenizer, samples, other, model_config=config, tokens=True)
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("packed_first", [True, False])
def test_a_journal_of_other_batches(tiny_model_dir, qa_file, tmp_path, monkeypatch, packed_first):
    """Batches of packed texts are others than of padded ones, and one machine packs where another does not."""
    config = ModelConfig(str(tiny_model_dir), precision="full", device="cpu")
    lm, tokenizer = load_model(config)
    samples = load_samples(data_config(qa_file), tokenizer)
    longest = max(len(s.input_ids) for s in samples.samples)
    options = {"model_config": config, "tokens": True, "batch_tokens": 2 * longest}
    path, whole = tmp_path / "scores.parquet", tmp_path / "whole.parquet"
    lm.packing = packed_first
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)
        score(lm, tokenizer, samples, path, **options)
    path.unlink()
    journal = tmp_path / "scores.parquet.journal"
    header, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([header, *lines[: len(lines) // 2]]))
    lm.packing = not packed_first
    score(lm, tokenizer, samples, path, **options)
    score(lm, tokenizer, samples, whole, **options)
    found, expected = pq.read_table(path), pq.read_table(whole)
    assert len(lines) >= 4
    for name in ("loss_sum", "num_correct"):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-4)
    for a, b in zip(found["token_losses"].to_pylist(), expected["token_losses"].to_pylist(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_torn_journal_line_is_dropped_and_a_foreign_journal_refused(scored, tmp_path):
    config, lm, tokenizer, samples, path = scored
    other = tmp_path / "other.parquet"
    journal = tmp_path / "other.parquet.journal"
    header = {key: read_metadata(path)[key] for key in ("fingerprints", "settings")}
    journal.write_text(json.dumps(header) + '\n{"samples": [1, 2], "loss_su')
    score(lm, tokenizer, samples, other, model_config=config, tokens=True)
    assert other.read_bytes() == path.read_bytes()
    other.unlink()
    header["fingerprints"]["data"] = "other"
    journal.write_text(json.dumps(header) + "\n")
    with pytest.raises(InputError, match=r"unfinished scoring of something else .*data fingerprint"):
        score(lm, tokenizer, samples, other, model_config=config, tokens=True)
    score(lm, tokenizer, samples, other, model_config=config, tokens=True, overwrite=True)
    assert other.read_bytes() == path.read_bytes()


def test_killed_scoring_continues_to_the_same_bytes(tiny_model_dir, tmp_path):
    def command(output):
        return [
            "-m", "flow_finetune.cli", "score", "-m", str(tiny_model_dir), "-d", str(GSM8K),
            "--prompt-field", "question", "--response-field", "answer", "--limit", "120", "--batch-tokens", "512",
            "--max-length", "400", "--tokens", "--device", "cpu", "-o", str(output),
        ]  # fmt: skip

    undisturbed, killed = tmp_path / "a.parquet", tmp_path / "b.parquet"
    run_python(*command(undisturbed))
    journal = tmp_path / "b.parquet.journal"
    kill_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 20, *command(killed))
    assert not killed.exists()
    header, *lines = journal.read_bytes().splitlines(keepends=True)
    num_done = sum(line.endswith(b"\n") for line in lines)
    # The same as two processes would have left it, one of them in the middle of a line.
    shared = tmp_path / "c.parquet"
    whole = [line for line in lines if line.endswith(b"\n")]
    (tmp_path / "c.parquet.journal").write_bytes(b"".join([header, *whole[::2]]))
    (tmp_path / "c.parquet.journal-1").write_bytes(b"".join([header, *whole[1::2]]) + b'{"samples": [1')
    result = run_python(*command(killed))
    assert f"continuing after {num_done} of" in result.stderr.replace("\n", " ")
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert not journal.exists()
    # Two processes go on with it, and two from the beginning; another number may.
    result = run_python(*LAUNCHER, *command(shared))
    assert f"continuing after {num_done} of" in result.stderr.replace("\n", " ")
    run_python(*LAUNCHER, *command(tmp_path / "d.parquet"))
    assert shared.read_bytes() == (tmp_path / "d.parquet").read_bytes() == undisturbed.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.parquet" for name in "abcd"]


def _score_in_two_processes(rank, port, model, data, output):
    """Scores `data`, then again with a model that has no finite loss; leaves how much each process did."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    config = ModelConfig(model, precision="full", device="cpu")
    lm, tokenizer = load_model(config)
    samples = load_samples(data_config(data), tokenizer)
    options = {"model_config": config, "batch_tokens": 1}
    append, done = Journal.append, []
    Journal.append = lambda self, record: [done.append(record), append(self, record)]
    score(lm, tokenizer, samples, output / "s[1].parquet", **options)
    (output / f"{rank}.json").write_text(json.dumps([record["samples"] for record in done]))
    # As where each process has a file system of its own.
    read = Journal.read
    Journal.read = lambda self: [json.loads(line) for line in self._own.read_text().splitlines()[1:]]
    with pytest.raises(InputError, match=r"12 of 24 batches are not in .* must see one file system"):
        score(lm, tokenizer, samples, output / "apart.parquet", **options)
    Journal.read = read
    with torch.no_grad():
        lm.head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss of 24 samples is NaN or infinite"):
        score(lm, tokenizer, samples, output / "bad.parquet", **options)
    torch.distributed.barrier()
    os._exit(0)


def test_two_processes_share_the_batches_and_refuse_what_is_not_finite_together(tiny_model_dir, qa_file, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn_two(_score_in_two_processes, (port, str(tiny_model_dir), qa_file, tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == 12
    assert sorted(i for samples in first + second for i in samples) == list(range(24))
    names = ["0.json", "1.json", "apart.parquet.journal", "apart.parquet.journal-1", "s[1].parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_journal_is_what_its_name_says(scored, tmp_path):
    """A user's own file beside it stays, and so does a journal of another scoring, or what is none."""
    config, lm, tokenizer, samples, path = scored
    other, journal = tmp_path / "other.parquet", tmp_path / "other.parquet.journal"
    backup = tmp_path / "other.parquet.journal-backup"
    backup.write_text("mine")
    found = read_metadata(path)
    header = {"fingerprints": found["fingerprints"], "settings": {**found["settings"], "tokens": False}}
    for text, match in (
        (json.dumps(header), "something else .its tokens is False, this one's True"),
        ('{"a": 1}', "is no journal of a scoring"),
        ("notes", "is no journal of a scoring"),
    ):
        journal.write_text(text + "\n")
        with pytest.raises(InputError, match=match):
            score(lm, tokenizer, samples, other, model_config=config, tokens=True)
        assert journal.read_text() == text + "\n"
    score(lm, tokenizer, samples, other, model_config=config, tokens=True, overwrite=True)
    assert other.read_bytes() == path.read_bytes()
    assert backup.read_text() == "mine"


def test_a_single_sample_has_no_median(scored):
    _, lm, tokenizer, samples, path = scored
    samples.samples = samples.samples[:1]
    found = read_scores(path, samples, scoring_fingerprints(lm, tokenizer, samples))
    with pytest.raises(InputError, match="at least 2 losses"):
        make_weights(MethodConfig(), 1, found)
    zeros = scores_module.Scores(torch.zeros(4, dtype=torch.float64), None, {})
    with pytest.raises(InputError, match="temperature must be positive"):
        make_weights(MethodConfig(), 4, zeros)


def test_effective_sample_size_is_that_of_the_weights(scored):
    _, lm, tokenizer, samples, path = scored
    found = read_scores(path, samples, scoring_fingerprints(lm, tokenizer, samples))
    weights = make_weights(MethodConfig(normalize="mean"), len(samples.samples), found)
    assert weights.mean == pytest.approx(1.0, abs=1e-6)
    assert weights.effective_sample_size == pytest.approx(
        float(flow_kernels.effective_sample_size(weights.per_sample)), rel=1e-6
    )


def test_records_are_on_the_disk_and_of_any_number_of_processes(tmp_path, monkeypatch):
    header = {"fingerprints": {}, "settings": {"tokens": False}}
    for index in (1, 12):
        (tmp_path / f"s.parquet.journal-{index}").write_text(f'{json.dumps(header)}\n{{"samples": [{index}]}}\n')
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), sync(file)))
    journal = Journal(tmp_path / "s.parquet", header, False, Processes(torch.device("cpu")))
    journal.append({"samples": [0]})
    assert synced[-1] == journal.path.stat().st_size
    assert [record["samples"] for record in journal.read()] == [[0], [1], [12]]
    journal.remove()
    assert not os.listdir(tmp_path)


def test_scores_of_another_precision_or_backend_are_others(scored):
    config, lm, tokenizer, samples, path = scored
    for change, message in (({"precision": "bf16"}, "its precision is full, this one's bf16"),
                            ({"backend": "reference"}, "backend is auto")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            score(lm, tokenizer, samples, path, model_config=dataclasses.replace(config, **change), tokens=True)


def test_extremes_are_in_order(scored):
    *_, samples, path = scored
    found = read_metadata(path)
    loss = read_scores(path, samples, found["fingerprints"]).loss.numpy()
    order = np.argsort(loss)
    for name, indices in (("easiest", order[:5]), ("hardest", order[::-1][:5])):
        assert [e["id"] for e in found["extremes"][name]] == [samples.samples[i].id for i in indices]
        assert [e["loss"] for e in found["extremes"][name]] == loss[indices].tolist()


def test_a_second_scoring_into_one_file_is_refused(scored, tmp_path):
    config, lm, tokenizer, samples, _ = scored
    path = tmp_path / "other.parquet"
    with exclusive_file(path), pytest.raises(InputError, match=r"another process makes .*other.parquet; wait for it"):
        score(lm, tokenizer, samples, path, model_config=config)
    score(lm, tokenizer, samples, path, model_config=config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.parquet", "scores.parquet"]


def test_scores_of_images_are_told_apart(scored, tmp_path):
    *_, samples, path = scored
    table, metadata = pq.read_table(path), read_metadata(path)
    metadata = {"fingerprints": {"model": "0", "images": "1"}, "temperature": metadata["temperature"]}
    other = tmp_path / "images.parquet"
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()}), other)
    with pytest.raises(InputError, match=r"images\.parquet has the scores of images; score this data with"):
        read_scores(other, samples, {"model": "0", "tokenizer": "2"})
