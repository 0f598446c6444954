"""What an experiment keeps in its working directory, when the file or the data change under it."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import tiny_images
from flow_finetune.config import MethodConfig, from_mapping
from flow_finetune.data import load_samples
from flow_finetune.errors import InputError
from flow_finetune.evaluation_files import read_items
from flow_finetune.scores import read_metadata
from flow_finetune.storage import write_json
from flow_finetune.tasks import prepare
from flow_finetune.vision.config import ImageRunConfig, read_image_run
from paper_cells import MAPPING, write_experiment
from transformers import AutoTokenizer

from experiment import ImageSearch, read_experiment  # isort: skip
from image_laboratory import ImageLaboratory  # isort: skip
from laboratory import LanguageLaboratory  # isort: skip
from records import Records  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


def rows(first, count):
    return [
        {"question": f"How much is {i} + 1?", "answer": f"The answer is {i + 1}."} for i in range(first, first + count)
    ]


def write_rows(path, written):
    path.write_text("".join(json.dumps(row) + "\n" for row in written))


@pytest.fixture
def make(tiny_model_dir, tmp_path):
    """Makes the laboratory, with `tokens` as given."""
    fields = {"prompt_field": "question", "response_field": "answer"}
    mapping = {
        **MAPPING,
        "model": {"source": str(tiny_model_dir), "precision": "full", "device": "cpu"},
        "data": {"source": "train.jsonl", "limit": 4, **fields},
        "search": {"num_samples": 2, "validation_first": 4, "validation_samples": 3},
    }
    experiment = read_experiment(write_experiment(tmp_path / "tiny.yaml", mapping))
    write_rows(tmp_path / "train.jsonl", rows(0, 8))
    setup = experiment.located(tmp_path, str(tiny_model_dir))
    return lambda tokens=False: LanguageLaboratory(setup, experiment.search, tmp_path / "work", tokens=tokens)


def test_scores_that_do_not_fit_any_more_are_made_beside_the_old_ones(make, tmp_path):
    laboratory = make()
    data = laboratory.setup.data
    _, plain, seconds = laboratory._scored(data, "scores")
    made = plain.stat().st_mtime_ns
    assert laboratory._scored(data, "scores")[1:] == (plain, seconds)
    assert plain.stat().st_mtime_ns == made
    # A row with token weights was added.
    _, tokens, _ = make(tokens=True)._scored(data, "scores")
    assert tokens != plain
    assert [read_metadata(path)["settings"]["tokens"] for path in (plain, tokens)] == [False, True]
    # The data are others under the same name.
    write_rows(tmp_path / "train.jsonl", rows(50, 8))
    samples, other, _ = laboratory._scored(data, "scores")
    assert other not in (plain, tokens)
    assert read_metadata(other)["fingerprints"]["data"] == samples.fingerprints["data"]
    assert read_metadata(plain)["fingerprints"]["data"] != samples.fingerprints["data"]


def test_the_scores_of_a_directory_from_before_are_used_where_they_fit(make):
    laboratory = make()
    _, path, _ = laboratory._scored(laboratory.setup.data, "scores")
    old = path.with_name("scores.parquet")
    path.rename(old)
    path.with_suffix(".json").rename(old.with_suffix(".json"))
    assert laboratory._scored(laboratory.setup.data, "scores")[1] == old
    assert make(tokens=True)._scored(laboratory.setup.data, "scores")[1] != old


def test_the_validation_file_follows_the_data(make, tmp_path):
    laboratory = make()
    for first in (0, 50):
        write_rows(tmp_path / "train.jsonl", rows(first, 8))
        task = laboratory._validation(laboratory.setup.data)
        with open(task.source) as file:
            assert [json.loads(line) for line in file] == rows(first + 4, 3)


def test_validation_responses_may_be_choices(make, tmp_path, tiny_model_dir):
    """The search's rows become a file of their own, with the same samples as a slice of the data."""
    chosen = [{**row, "choices": [row["answer"], " no"], "answer": i % 2} for i, row in enumerate(rows(0, 8))]
    write_rows(tmp_path / "train.jsonl", chosen)
    laboratory = make()
    data = replace(laboratory.setup.data, choices_field="choices")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (task,) = prepare([laboratory._validation(data)], tokenizer)
    wanted = load_samples(replace(data, split="train[4:7]", limit=None), tokenizer).samples
    assert [s.response for s in wanted] == ["The answer is 5.", " no", "The answer is 7."]
    assert [s.input_ids.tolist() for s in task.samples] == [s.input_ids.tolist() for s in wanted]


def test_a_training_from_another_start_than_the_records_is_refused_before_it_begins(make, tmp_path):
    laboratory = make()
    records = Records(read_experiment(tmp_path / "tiny.yaml"), tmp_path / "records")
    laboratory.check_start = records.check_start
    _, scores, _ = laboratory._scored(laboratory.setup.data, "scores")
    found = read_metadata(scores)["fingerprints"]
    write_json(records.path / "cells/pretrained/evaluation.json", {"fingerprints": {"model": found["model"]}})
    laboratory.check_start(found)
    for cell, name, kind in (("pretrained", "evaluation.json", "model"), ("l2-seed0", "train/summary.json", "data")):
        shutil.rmtree(records.path)
        write_json(records.path / "cells" / cell / name, {"fingerprints": {**found, kind: "another"}})
        with pytest.raises(InputError, match=f"{cell} was made from another {kind} than this training would be"):
            laboratory.train(None, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_of_images_is_tried_on_the_share_that_is_held_out(image_mapping, tmp_path):
    setup = read_image_run({**image_mapping, "data": {**image_mapping["data"], "id_field": None}}, "test")
    laboratory = ImageLaboratory(setup, ImageSearch(holdout=0.25), tmp_path / "work")
    loss = laboratory.try_out(MethodConfig("standard", weights="none"), 0, tmp_path / "work/search/standard")
    evaluation = json.loads((tmp_path / "work/search/standard/evaluation.json").read_text())
    (task,) = evaluation["tasks"]
    assert (task["name"], task["num_items"]) == ("validation", tiny_images.NUM_IMAGES // 4)
    assert loss == task["metrics"]["nats"]["value"] > 0
    trained = pq.read_table(tmp_path / "work/search-setup/scores.parquet")["id"].to_pylist()
    held_out = {item for item in read_items(tmp_path / "work/search/standard")["validation", "nats"].ids}
    assert len(trained) == tiny_images.NUM_IMAGES - len(held_out)
    assert held_out.isdisjoint(trained)


def test_an_image_experiment_is_not_tested_on_what_it_trains_on(image_mapping, tmp_path):
    data = image_mapping["data"]
    tasks = [{"source": data["source"], "name": "validation", "role": "target", "part": "validation"}]
    setup = from_mapping(ImageRunConfig, {**image_mapping, "tasks": tasks}, "test")
    with pytest.raises(InputError, match="its validation part would be of images that are trained on"):
        ImageLaboratory(setup, None, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_an_image_training_on_other_images_than_the_records_is_refused_before_it_begins(image_mapping, tmp_path):
    rows = [{"name": "standard", "weights": "none", "learning_rate": 1e-3}]
    mapping = {key: value for key, value in image_mapping.items() if key != "methods"}
    experiment = read_experiment(write_experiment(tmp_path / "tiny.yaml", {**mapping, "rows": rows}))
    records = Records(experiment, tmp_path / "records")
    setup = experiment.located(tmp_path, mapping["model"]["source"])
    laboratory = ImageLaboratory(setup, None, tmp_path / "work", check_start=records.check_start)
    method, directory = experiment.rows[0].method, tmp_path / "work/cells/standard-seed0"
    start = {"images": "another", "model": "this machine's own"}
    write_json(records.path / "cells/standard-seed0/train/summary.json", {"fingerprints": start})
    with pytest.raises(InputError, match="standard-seed0 was made from another images than this training would be"):
        laboratory.train(method, 0, directory)
    assert not directory.exists()
    shutil.rmtree(records.path)
    laboratory.train(method, 0, directory)
    summary = json.loads((directory / "train/summary.json").read_text())
    write_json(records.path / "cells/standard-seed0/train/summary.json", summary)
    records.check_start(summary["fingerprints"])
    laboratory.train(method, 1, tmp_path / "work/cells/standard-seed1")


def test_an_evaluation_in_another_role_is_made_again_and_not_copied(image_mapping, tmp_path, capfd):
    _, source = image_mapping["tasks"]

    def accuracy(role, directory):
        # Their numbers, 0 to 2, are classes of both heads.
        task = {**source, "source": image_mapping["data"]["source"], "name": "both", "role": role}
        setup = read_image_run({**image_mapping, "tasks": [task]}, "test")
        ImageLaboratory(setup, None, directory).make_pretrained(directory / "cells/pretrained")
        (found,) = json.loads((directory / "cells/pretrained/evaluation.json").read_text())["tasks"]
        return found["role"], found["fingerprint"], found["metrics"]["nats"]["value"]

    before = accuracy("retained", tmp_path / "work")
    after = accuracy("target", tmp_path / "work")
    assert after == accuracy("target", tmp_path / "fresh")
    assert (before[0], after[0]) == ("retained", "target")
    assert before[1] == after[1]  # the same images: the fingerprint alone does not tell
    assert before[2] != after[2]
    assert "pretrained was evaluated in another role of both; evaluating it again" in capfd.readouterr().err


def test_a_learning_rate_of_images_of_the_hub_is_tried_on_the_split_that_is_trained_on(
    image_mapping, tmp_path, monkeypatch
):
    setup = read_image_run({**image_mapping, "data": {"source": "org/images", "subset": "small"}}, "test")
    laboratory = ImageLaboratory(setup, ImageSearch(), tmp_path / "work")
    asked = []

    def prepared(run, output):
        asked.append([(part.source, part.subset, part.split) for part in (run.data, *run.tasks)])
        raise InputError("enough")

    monkeypatch.setattr(laboratory, "_prepare", prepared)
    with pytest.raises(InputError, match="enough"):
        laboratory.try_out(MethodConfig("standard", weights="none"), 0, tmp_path / "search")
    # Not given, the split of training data is train, but that of a task would be test.
    assert asked == [[("org/images", "small", None), ("org/images", "small", "train")]]
