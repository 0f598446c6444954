"""`run`: everything in one directory, continued where it stopped, from a file or from options."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model
import torch
import yaml
from flow_finetune import pipeline as pipeline_module
from flow_finetune.cli import app
from flow_finetune.config import ModelConfig, RunConfig, TaskConfig, from_mapping
from flow_finetune.data import ALPACA_TEMPLATE
from flow_finetune.errors import InputError
from flow_finetune.models import load_model
from flow_finetune.pipeline import run
from flow_finetune.results import find_pretrained, load_runs
from flow_finetune.scores import read_metadata
from flow_finetune.tasks import prepare
from processes import run_python
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mapping(tiny_model_dir, qa_file, tmp_path):
    """A whole run that takes seconds."""
    (tmp_path / "text.txt").write_text("The answer is the third choice, Anna takes 3 of the 12 apples. " * 40)
    rows = [{"context": f"Is {i} best?", "choices": [" yes", " the no", " 12"], "answer": i % 3} for i in range(9)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"prompt_field": "question", "response_field": "answer"}
    return {
        "model": {"source": str(tiny_model_dir), "precision": "full", "device": "cpu"},
        "data": {"source": str(qa_file), **fields},
        "methods": [
            {"name": "standard", "weights": "none"}, {"name": "flow"},
            {"name": "token", "weights": "token", "quantile": 0.8, "clip_low": 0.1, "normalize": "mean"},
            {"name": "averaged", "of": "flow", "wise_ft": 0.25},
        ],
        "train": {"epochs": 1, "learning_rate": 1e-3},
        "tasks": [
            {"kind": "qa", "source": str(qa_file), "role": "target", "limit": 6, "num_generate": 2,
             "max_new_tokens": 4, **fields},
            {"kind": "perplexity", "source": str(tmp_path / "text.txt"), "window": 32},
            {"kind": "multiple_choice", "source": str(tmp_path / "choices.jsonl")},
        ],
    }  # fmt: skip


def test_a_run_makes_everything_and_a_second_call_makes_nothing_again(mapping, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "report: " in " ".join(result.output.split())
    for name in ("pretrained", "standard", "flow", "token", "averaged"):
        found = json.loads((tmp_path / "out" / name / "evaluation.json").read_text())
        assert {task["kind"] for task in found["tasks"]} == {"qa", "perplexity", "multiple_choice"}
    weights = {
        name: json.loads((tmp_path / "out" / name / "train/summary.json").read_text())["mean_weight"]
        for name in ("standard", "flow", "token")
    }
    assert weights["standard"] == 1.0
    assert 0.2 < weights["flow"] < 0.6
    assert weights["token"] == pytest.approx(1.0, rel=1e-5)
    page = (tmp_path / "out/report/report.md").read_text()
    assert all(name in page for name in ("pretrained", "standard", "flow", "token", "averaged"))
    before, tuned, averaged = (
        load_file(Path(d) / "model.safetensors")["lm_head.weight"]
        for d in (mapping["model"]["source"], tmp_path / "out/flow", tmp_path / "out/averaged")
    )
    torch.testing.assert_close(averaged, 0.75 * before + 0.25 * tuned)
    # What an older version stored, with every default spelled out, is the same run.
    identity = json.loads(json.dumps(dataclasses.asdict(from_mapping(RunConfig, mapping, "test"))))
    (tmp_path / "out/run.json").write_text(json.dumps(identity))

    for name in ("train", "score", "evaluate"):
        original = getattr(pipeline_module, name)
        monkeypatch.setattr(pipeline_module, name, _only_reuse(name, original))
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    mapping["train"]["epochs"] = 2
    with pytest.raises(InputError, match=r"holds another run .its train.epochs differ"):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")


def test_methods_may_be_added_to_a_run_and_taken_away(mapping, tmp_path, monkeypatch):
    mapping["methods"] = [{"name": "standard", "weights": "none"}]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    weights = (tmp_path / "out/standard/model.safetensors").read_bytes()
    mapping["methods"] = [{"name": "standard", "weights": "none"}, {"name": "flow"}]
    page = run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert "| flow |" in page.read_text()
    assert (tmp_path / "out/standard/model.safetensors").read_bytes() == weights
    # What was taken away does not come back as something else.
    mapping["methods"] = [{"name": "flow"}]
    page = run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert "| standard |" not in page.read_text()
    mapping["methods"] = [{"name": "standard", "weights": "none", "learning_rate": 1e-2}, {"name": "flow"}]
    with pytest.raises(InputError, match="has the method standard already, with other options"):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    # One that needs the losses of tokens, which were not kept: not in a file, and not in what a kill left of one.
    mapping["methods"] = [{"name": "flow"}, {"name": "flow-token", "weights": "token"}]
    scores = tmp_path / "out/scores.parquet"
    header = {key: read_metadata(scores)[key] for key in ("fingerprints", "settings")}
    assert not header["settings"]["tokens"]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert read_metadata(scores)["settings"]["tokens"]
    shutil.rmtree(tmp_path / "out/flow-token")
    scores.unlink()
    scores.with_name("scores.parquet.journal").write_text(json.dumps(header) + "\n")
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert (tmp_path / "out/flow-token/model.safetensors").is_file()
    for name in ("train", "score", "evaluate"):
        monkeypatch.setattr(pipeline_module, name, _only_reuse(name, getattr(pipeline_module, name)))
    mapping["methods"] = [{"name": "flow"}, {"name": "standard", "weights": "none"}]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")


def test_rows_stand_in_any_order_and_online_weights_take_the_scores_temperature(mapping, tmp_path):
    mapping["methods"] = [
        {"name": "averaged", "of": "flow", "wise_ft": 0.5}, {"name": "online", "online": True}, {"name": "flow"},
    ]  # fmt: skip
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    tau = {
        name: json.loads((tmp_path / "out" / name / "train/summary.json").read_text())["temperature"]
        for name in ("online", "flow")
    }
    assert tau["online"] == pytest.approx(tau["flow"], rel=1e-12)
    assert (tmp_path / "out/averaged/model.safetensors").is_file()


def test_online_weights_take_the_scores_temperature_also_alone(mapping, tmp_path):
    mapping["methods"] = [{"name": "flow-online", "online": True}]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    summary = json.loads((tmp_path / "out/flow-online/train/summary.json").read_text())
    assert summary["temperature"] == read_metadata(tmp_path / "out/scores.parquet")["temperature"]


def test_an_average_with_a_head_of_its_own_is_refused_before_anything_is_trained(mapping, tmp_path):
    mapping["model"]["source"] = str(tiny_model.build(tmp_path / "tied", bos=True, tied=True))
    mapping["methods"] = [
        {"name": "linear-probe", "weights": "none", "train": "head"}, {"name": "half", "of": "linear-probe", "wise_ft": 0.5},
    ]  # fmt: skip
    with pytest.raises(
        InputError, match="method half: the head of this model is its embeddings' matrix, and linear-probe"
    ):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert not (tmp_path / "out/linear-probe").exists()


def test_the_average_of_a_directory_that_names_its_tensors_otherwise(mapping, tmp_path):
    """A tied head that is stored twice, say: training saves it once."""
    source = Path(mapping["model"]["source"])
    shutil.copytree(source, tmp_path / "model")
    state = load_file(source / "model.safetensors")
    save_file({**state, "unused.weight": torch.zeros(2)}, tmp_path / "model/model.safetensors", {"format": "pt"})
    mapping["model"]["source"] = str(tmp_path / "model")
    mapping["methods"] = [{"name": "flow"}, {"name": "averaged", "of": "flow", "wise_ft": 0.5}]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    tuned, averaged = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("flow", "averaged"))
    for name, value in averaged.items():
        torch.testing.assert_close(value, 0.5 * state[name] + 0.5 * tuned[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"max_grad_norm": -1.0}}, "max_grad_norm must be at least 0"),
        ({"methods": [{"name": "flow", "quantile": 50}]}, "quantile is a share"),
        ({"train": {"grad_filter_eps": 1.0}}, "grad_filter_eps must be in"),
        ({"train": {"checkpoint_every": -1}}, "checkpoint_every must be at least 0"),
        ({"data": {"source": "d", "max_length": -1}}, "max_length of d must be at least 2 tokens, got -1"),
        ({"data": {"source": "d", "limit": 0}}, "limit of d must be at least 1, got 0"),
        (
            {"tasks": [{"kind": "qa", "source": "q", "num_generate": -1}]},
            "num_generate of q must be at least 0, got -1",
        ),
        ({"tasks": [{"kind": "perplexity", "source": "q", "window": 1}]}, "window of q must be at least 2, got 1"),
        ({"methods": [{"name": "standard", "weights": "token"}]}, "the name stands for weights: none"),
        ({"train": {"grad_filter_eps": 1e-6}, "backend": "reference"}, "saves nothing with backend 'reference'"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_made(mapping, tmp_path, change, message):
    mapping["model"]["backend"] = change.get("backend", "auto")
    with pytest.raises(InputError, match=message):
        run(
            from_mapping(RunConfig, {**mapping, **{k: v for k, v in change.items() if k != "backend"}}, "test"),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_an_evaluation_elsewhere_knows_that_its_model_was_trained(mapping, tmp_path):
    mapping["methods"] = [{"name": "flow"}]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    common = ["--perplexity", mapping["tasks"][1]["source"], "--precision", "full", "--device", "cpu"]
    for name, model in (("before", mapping["model"]["source"]), ("after", tmp_path / "out/flow")):
        result = CliRunner().invoke(app, ["evaluate", "-m", str(model), "-o", str(tmp_path / name), *common])
        assert result.exit_code == 0, result.output
    runs = load_runs([tmp_path / "after", tmp_path / "before"])
    assert find_pretrained(runs).name == "before"
    assert runs[0].summary["method"]["name"] == "flow"
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        app, ["evaluate", "-m", mapping["model"]["source"], "-o", str(tmp_path / "file"), *common]
    )
    assert result.exit_code == 2
    assert "is a file" in " ".join(result.output.split())


def test_a_run_that_made_nothing_does_not_hold_its_directory(mapping, tmp_path):
    right = mapping["model"]["source"]
    mapping["model"]["source"] = str(tmp_path / "misspelt")
    with pytest.raises(InputError, match="misspelt"):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    mapping["model"]["source"], mapping["data"]["limit"] = right, 6
    mapping["methods"] = mapping["methods"][:1]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert json.loads((tmp_path / "out/run.json").read_text())["model"]["source"] == right


def _only_reuse(name, original):
    """A stand-in that fails if the part would be made again."""

    def stand_in(lm, tokenizer, *rest, **options):
        assert name != "evaluate", "evaluated again"
        steps = []
        lm.register_forward_pre_hook(lambda *_: steps.append(1))
        found = original(lm, tokenizer, *rest, **options)
        assert not steps, f"{name} ran the model again"
        return found

    return stand_in


def test_options_alone_describe_a_run(mapping, tmp_path):
    command = [
        "run", "-m", mapping["model"]["source"], "-d", mapping["data"]["source"], "--prompt-field", "question",
        "--response-field", "answer", "--method", "flow", "--perplexity", str(tmp_path / "text.txt"),
        "--epochs", "1", "--lr", "1e-3", "--set", "model.precision=full", "--set", "train.batch_size=8",
        "--set", "data.limit=10", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out/flow/train/summary.json").read_text())
    assert (summary["num_samples"], summary["num_steps"]) == (10, 2)
    assert summary["train"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("name", ["report", "pretrained", "a/b", ""])
def test_method_names_are_directories_of_their_own(mapping, tmp_path, name):
    mapping["methods"] = [{"name": name, "weights": "none"}]
    with pytest.raises(InputError, match="must be a plain directory name"):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_targets_questions_are_asked_as_in_training(mapping, tmp_path):
    mapping["data"]["template"] = "Q: {prompt} A:"
    mapping["methods"], qa = [{"name": "standard", "weights": "none"}], mapping["tasks"][0]
    stated = {**qa, "name": "stated", "template": "alpaca", "num_generate": 0}
    retained = {**qa, "name": "retained", "role": "retained", "num_generate": 0}
    mapping["tasks"] = [qa, stated, retained]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    evaluation = json.loads((tmp_path / "out/standard/evaluation.json").read_text())
    tokenizer = load_model(ModelConfig(mapping["model"]["source"], device="cpu"))[1]
    for task, found, template in zip(
        mapping["tasks"], evaluation["tasks"], ("Q: {prompt} A:", "alpaca", "alpaca"), strict=True
    ):
        config = from_mapping(TaskConfig, {**task, "template": template}, "test")
        assert found["fingerprint"] == prepare([config], tokenizer)[0].fingerprint()


def test_a_batch_that_nothing_fits_in_is_refused_before_anything_is_made(mapping, tmp_path):
    mapping["batch_tokens"] = 0
    with pytest.raises(InputError, match="batch_tokens must be at least 1, got 0"):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_refused(mapping, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="used by something else"):
        run(from_mapping(RunConfig, mapping, "test"), tmp_path / "used")


def test_a_revision_is_of_the_hub_alone(mapping, tmp_path, monkeypatch):
    asked, load_model = [], pipeline_module.load_model

    def load(config):
        asked.append((Path(config.source).name, config.revision))
        return load_model(dataclasses.replace(config, revision=None))

    monkeypatch.setattr(pipeline_module, "load_model", load)
    mapping["model"]["revision"] = "v2"
    mapping["methods"] = [{"name": "standard"}]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    base = Path(mapping["model"]["source"]).name
    assert asked == [(base, "v2"), (base, "v2"), ("standard", None)]


def test_a_model_read_from_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_module, "load_model", lambda config: (SimpleNamespace(model=config.source), None))
    monkeypatch.setattr(
        pipeline_module, "save_model", lambda model, tokenizer, directory: directory.mkdir(parents=True)
    )
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name)
    first = ModelConfig(str(tmp_path / "a.gguf"))
    saved = pipeline_module.base_model(first, tmp_path / "out")
    assert saved.source == str(tmp_path / "out/model")
    assert pipeline_module.base_model(first, tmp_path / "out") == saved
    with pytest.raises(InputError, match=r"out/model was made of another file than .*b\.gguf"):
        pipeline_module.base_model(ModelConfig(str(tmp_path / "b.gguf")), tmp_path / "out")
    # Models of one architecture and packing are of one length.
    for other in ("another one", "z.gguf"):
        (tmp_path / "a.gguf").write_text(other)
        with pytest.raises(InputError, match="was made of another file"):
            pipeline_module.base_model(first, tmp_path / "out")
    mark = tmp_path / "out/source.json"
    mark.write_text(json.dumps({"source": "a.gguf", "bytes": 6}))  # as versions before wrote it
    assert pipeline_module.base_model(first, tmp_path / "out") == saved
    mark.write_text(json.dumps({"source": "a.gguf", "bytes": 7}))
    with pytest.raises(InputError, match="was made of another file"):
        pipeline_module.base_model(first, tmp_path / "out")


def test_a_learning_rate_that_rows_would_not_take_is_refused(mapping, tmp_path):
    mapping["methods"] = [{"name": "standard"}, {"name": "l2", "learning_rate": 1e-4}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    command = ["run", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "out"), "--lr", "1e-3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "--lr would not change l2, which has a learning_rate of its own" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


# Nothing of this project: what a user has after the run is a directory, transformers and torch.
_FRESH_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, text_file, qa_file, template_file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory).eval()
tokenizer = AutoTokenizer.from_pretrained(directory)
template = open(template_file).read()

@torch.no_grad()
def loss(ids, start):
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum").item()

tokens = tokenizer(open(text_file).read(), add_special_tokens=False).input_ids
windows = [[tokenizer.bos_token_id, *tokens[i : i + 31]] for i in range(0, len(tokens), 31)]
found = {"text": sum(loss(w, 1) for w in windows) / len(tokens)}
total = count = 0
for line in list(open(qa_file))[:6]:
    row = json.loads(line)
    prompt = tokenizer(template.replace("{prompt}", row["question"])).input_ids
    response = tokenizer(row["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    total, count = total + loss(prompt + response, len(prompt)), count + len(response)
found["qa"] = total / count
print(json.dumps(found))
"""


def test_the_saved_model_reproduces_its_evaluation_in_a_fresh_process(mapping, qa_file, tmp_path):
    mapping["methods"] = mapping["methods"][1:2]
    run(from_mapping(RunConfig, mapping, "test"), tmp_path / "out")
    (tmp_path / "template.txt").write_text(ALPACA_TEMPLATE)
    arguments = [tmp_path / "out/flow", tmp_path / "text.txt", qa_file, tmp_path / "template.txt"]
    result = run_python("-c", _FRESH_PROCESS, *arguments)
    evaluation = json.loads((tmp_path / "out/flow/evaluation.json").read_text())
    reported = {task["name"]: task["metrics"]["nats_per_token"]["value"] for task in evaluation["tasks"][:2]}
    assert reported == pytest.approx(json.loads(result.stdout), rel=1e-5)
