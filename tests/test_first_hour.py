"""What a first user meets: a second process in the same directory, files that changed in between, odd CSV, full places."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
import typer
from flow_finetune.commands.messages import messages
from flow_finetune.config import MethodConfig, ModelConfig, RunConfig, TaskConfig, from_mapping
from flow_finetune.data import read_rows
from flow_finetune.errors import InputError
from flow_finetune.evaluate import evaluate
from flow_finetune.evaluation_files import require_unused
from flow_finetune.methods import make_weights, weigh
from flow_finetune.models import load_model
from flow_finetune.pipeline import run
from flow_finetune.storage import DirectoryLock, exclusive
from processes import run_python

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mapping(tiny_model_dir, qa_file, tmp_path):
    (tmp_path / "text.txt").write_text("The answer is the third choice, Anna takes 3 of the 12 apples. " * 20)
    return {
        "model": {"source": str(tiny_model_dir), "precision": "full", "device": "cpu"},
        "data": {"source": str(qa_file), "prompt_field": "question", "response_field": "answer"},
        "methods": [{"name": "standard"}, {"name": "flow"}],
        "train": {"epochs": 1, "learning_rate": 1e-3},
        "tasks": [{"kind": "perplexity", "source": str(tmp_path / "text.txt"), "window": 32}],
    }


_HOLD = """
import sys
from flow_finetune.storage import DirectoryLock
from pathlib import Path
from flow_finetune.errors import InputError
try:
    DirectoryLock().take(Path(sys.argv[1]))
except InputError as error:
    sys.exit(str(error))
"""


def test_a_directory_is_one_processs_at_a_time(tmp_path):
    with exclusive(tmp_path / "out"):
        with pytest.raises(InputError, match="another process works in"):
            DirectoryLock().take(tmp_path / "out")
        with pytest.raises(AssertionError, match="another process works in"):
            run_python("-c", _HOLD, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing was made in it"
    with exclusive(tmp_path / "out"):
        (tmp_path / "out" / "file").touch()
    run_python("-c", _HOLD, tmp_path / "out")


def test_a_run_and_a_training_refuse_a_directory_that_is_worked_in(mapping, tmp_path):
    config = from_mapping(RunConfig, mapping, "test")
    with exclusive(tmp_path / "out"), pytest.raises(InputError, match=r"another process works in .*out; wait for it"):
        run(config, tmp_path / "out")
    run(config, tmp_path / "out")
    (tmp_path / "out/flow/train/summary.json").unlink()
    (tmp_path / "out/flow/evaluation.json").unlink()
    with (
        exclusive(tmp_path / "out" / "flow"),
        pytest.raises(InputError, match=r"another process works in .*flow; wait for it"),
    ):
        run(config, tmp_path / "out")
    run(config, tmp_path / "out")
    assert (tmp_path / "out/flow/train/summary.json").is_file()


def test_a_changed_evaluation_file_is_evaluated_again(mapping, tmp_path, capsys):
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    before = {n: (tmp_path / f"out/{n}/evaluation.json").read_text() for n in ("pretrained", "standard", "flow")}
    (tmp_path / "text.txt").write_text("How many apples has Anna? " * 30)
    mapping["methods"] = [{"name": "flow"}]
    capsys.readouterr()
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    for name in ("pretrained", "flow"):
        assert f"{name} was evaluated on other items of text; evaluating it again" in said
        assert json.loads((tmp_path / f"out/{name}/evaluation.json").read_text()) != json.loads(before[name])
    # What this call does not show it says, and leaves as it was.
    assert "standard of" in said
    assert "is not among this call's methods, so not in its report" in said
    assert (tmp_path / "out/standard/evaluation.json").read_text() == before["standard"]


def test_the_evaluation_of_another_model_does_not_go_into_a_trained_ones_directory(mapping, tiny_model_dir, tmp_path):
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    lm, tokenizer = load_model(ModelConfig(str(tiny_model_dir), device="cpu"))
    task = TaskConfig("perplexity", str(tmp_path / "text.txt"), window=32)
    (tmp_path / "out/flow/evaluation.json").unlink()
    with pytest.raises(InputError, match=r"flow holds another model than .*; choose another directory"):
        evaluate(lm, tokenizer, [task], tmp_path / "out/flow", source=str(tiny_model_dir))
    for source in (str(tmp_path / "out/flow"), "", None):
        require_unused(tmp_path / "out/flow", source=source)


def test_weights_that_are_all_zero_are_refused_but_of_a_step():
    scores = SimpleNamespace(loss=torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
    with pytest.raises(InputError, match="all weights are 0; raise the temperature"):
        make_weights(MethodConfig(temperature=0.001), 3, scores)
    assert make_weights(MethodConfig(temperature=0.1), 3, scores).mean > 0
    # The one sample of an online step may have none; the others of the training do.
    weights, _ = weigh(MethodConfig(name="o", online=True), torch.tensor([2.6], dtype=torch.float64), 0.025)
    assert weights.tolist() == [0.0]


def test_fields_of_csv_are_text(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(
        '\ufeffquestion,answer,id\nWhat?,"None",1\nHow many?,2,2\nWhich?,NA,3\nWhere?,,4\n', encoding="utf-8"
    )
    rows = read_rows(str(path))
    assert rows.column_names == ["question", "answer", "id"]
    assert rows["answer"][:] == ["None", "2", "NA", ""]
    assert rows["id"][:] == ["1", "2", "3", "4"]
    assert read_rows(str(path), "train[1:3]")["answer"][:] == ["2", "NA"]


@pytest.mark.parametrize("name", ["zero.jsonl", "zero.csv", "zero.parquet"])
def test_an_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name} is empty"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENAMETOOLONG, errno.EACCES])
def test_a_place_that_takes_nothing_is_named(number, capsys):
    with pytest.raises(typer.Exit), messages():
        raise OSError(number, os.strerror(number), "there/scores.parquet")
    assert f"there/scores.parquet: {os.strerror(number)}; choose another place" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(OSError, match="Input/output"), messages():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "there")
