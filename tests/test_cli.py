"""The command line: every input that cannot be used is a message with exit code 2, and nothing is half-written."""

import json
from importlib.metadata import version

import pytest
from flow_finetune.cli import app
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def call(tmp_path, tiny_model_dir, qa_file, monkeypatch):
    """Run a command in an empty directory; returns its exit code and everything it printed."""
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny_model_dir), "DATA": str(qa_file)}

    def run(command: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [names.get(word, word) for word in command.split()])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


FIELDS = "--prompt-field question --response-field answer --device cpu --precision full"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("score -m MODEL -d none.jsonl -o s.parquet", "no such file: none.jsonl"),
        ("score -m MODEL -d DATA -o s.parquet", "no field 'prompt'; it has question, answer"),
        (f"score -m ./none -d DATA -o s.parquet {FIELDS}", "no model directory ./none"),
        (f"score -m none.gguf -d DATA -o s.parquet {FIELDS}", "no such file: none.gguf"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --template plain", "template must be"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --template chat", "no chat template"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --max-length 5", "none of the 24 samples"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --dtype int8", "dtype must be one of"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --backend cuda", "backend='cuda' cannot serve"),
        (f"train -m MODEL -d DATA -o out {FIELDS}", "needs the pre-trained model's scores"),
        (f"train -m MODEL -d DATA -o out {FIELDS} --scores none.parquet", "no such file: none.parquet"),
        (f"train -m MODEL -d DATA -o out {FIELDS} --weights all", "weights must be one of none, sequence, token"),
        (f"train -m MODEL -d DATA -o out {FIELDS} --weights none --lr 0", "learning_rate must be positive"),
        ("evaluate -m MODEL -o e", "nothing to evaluate"),
        ("evaluate -m MODEL -o e --perplexity none.txt", "no such file: none.txt"),
        (f"evaluate -m MODEL -o e --qa DATA --num-shots 2 {FIELDS}", "give shots_source"),
        (f"evaluate -m MODEL -o e --qa DATA --num-shots 2 --shots DATA {FIELDS}", "is row 0 of"),
        ("report none -o r", "none is not an evaluated run"),
        ("run none.yaml -o r", "no such file: none.yaml"),
        ("run -o r -m MODEL", "lacks 'data'"),
        ("run -o r -m MODEL -d DATA --set train", "--set takes name=value"),
        ("run -o r -m MODEL -d DATA --set data=[", "--set data is not valid YAML"),
        (
            f"evaluate -m MODEL -o e --qa DATA {FIELDS} --include-path x",
            "--include-path has no effect without --lm-eval",
        ),
        ("evaluate -m MODEL -o e --perplexity x.txt --split train[2:]", "--split has no effect without --qa or --mult"),
        (f"evaluate -m MODEL -o e --qa DATA --split test {FIELDS}", "split 'test' is of a hub data set"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --choices-field texts", "has no field 'texts'"),
        ("evaluate -m MODEL -o e --perplexity x.txt --num-shots 5", "--num-shots has no effect without --qa or --mult"),
        (
            "evaluate -m MODEL -o e --perplexity x.txt --max-length 50",
            "--max-length has no effect without --qa or --mult",
        ),
        (f"evaluate -m MODEL -o e --qa DATA {FIELDS} --window 50", "--window has no effect without --perplexity"),
        (f"score -m MODEL -d DATA -o . {FIELDS}", ". is a directory; give a file for the scores"),
        (f"score -m MODEL -d DATA -o . {FIELDS} --overwrite", ". is a directory; give a file for the scores"),
        (f"score -m MODEL -d DATA -o s.parquet {FIELDS} --subset main", "subset 'main' is of a hub data set"),
        (f"train -m MODEL -d DATA -o out {FIELDS} --method standard --seed -1", "seed must be between 0 and 2^32 - 1"),
        ("wise-ft MODEL MODEL -o w --alpha 0.3 --alpha 30", "alpha must be in [0, 1], got 30"),
        ("run -o r -m MODEL -d DATA --method best", "--method must be one of"),
        ("run -o r -m MODEL -d DATA", "at least one evaluation task"),
        ("run -o r -m MODEL -d DATA --qa DATA --method flow --method flow", "two methods are named 'flow'"),
    ],
)
def test_what_cannot_be_used_is_named_and_leaves_nothing(call, tmp_path, command, message):
    code, output = call(command)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_foreign_scores_are_refused_by_name(call, tmp_path):
    assert call(f"score -m MODEL -d DATA -o s.parquet {FIELDS} --limit 20")[0] == 0
    for change, name in (("", "data"), ("--limit 20 --max-length 90", "template")):
        code, output = call(f"train -m MODEL -d DATA -o out --scores s.parquet {FIELDS} {change}")
        assert code == 2
        assert f"its {name} fingerprint is" in output
        assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


def test_one_sample_has_no_median_and_a_number_serves_instead(call, tmp_path):
    assert call(f"score -m MODEL -d DATA -o s.parquet {FIELDS} --limit 1")[0] == 0
    code, output = call(f"train -m MODEL -d DATA -o out --scores s.parquet {FIELDS} --limit 1")
    assert (code, "at least 2 losses" in output) == (2, True)
    code, output = call(f"train -m MODEL -d DATA -o out --scores s.parquet {FIELDS} --limit 1 --temperature 2.5")
    assert (code, "mean weight" in output) == (0, True)


def test_score_train_evaluate_report(call, tmp_path, qa_file):
    (tmp_path / "text.txt").write_text("The answer is the third choice, Anna takes 3 of the 12 apples. " * 40)
    assert call(f"score -m MODEL -d DATA -o s.parquet {FIELDS} --tokens")[0] == 0
    code, output = call(f"score -m MODEL -d DATA -o s.parquet {FIELDS} --tokens")
    assert (code, "complete already" in output) == (0, True)
    for weights in ("none", "sequence", "token"):
        command = (
            f"train -m MODEL -d DATA -o {weights} --scores s.parquet --weights {weights} {FIELDS} --epochs 1 --lr 1e-3"
        )
        assert call(command)[0] == 0
    completion = "--completion words.jsonl --completion-prompt-field question --completion-response-field answer"
    (tmp_path / "words.jsonl").write_text(qa_file.read_text())
    evaluation = f"--perplexity text.txt --qa DATA --num-generate 2 --limit 8 {FIELDS} {completion}"
    for model, output in (("MODEL", "pre"), ("none", "none"), ("sequence", "sequence")):
        code, text = call(f"evaluate -m {model} -o {output} {evaluation}")
        assert code == 0
        assert "perplexity:" in text
        assert "words nats_per_byte:" in text
    code, output = call(f"evaluate -m MODEL -o pre {evaluation}")
    assert code == 2, "an evaluation that is there already is not replaced"
    assert call("report pre none sequence --scores s.parquet -o report")[0] == 0
    page = (tmp_path / "report/report.md").read_text()
    value = json.loads((tmp_path / "sequence/evaluation.json").read_text())["tasks"][0]["metrics"]["perplexity"][
        "value"
    ]
    assert f"{value:.2f}" in page


def test_what_the_system_refuses_is_a_message(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command, message in (
        (f"score -m MODEL -d DATA -o file/s.parquet {FIELDS}", "choose another place"),
        (f"train -m MODEL -d DATA -o file/out {FIELDS} --method standard", "choose another place"),
        (f"evaluate -m MODEL -o file/e --qa DATA {FIELDS}", "file is a file"),
    ):
        code, output = call(command)
        assert code == 2, command
        assert message in output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_an_overwrite_that_is_refused_leaves_what_is_there(call, tmp_path):
    train = f"train -m MODEL -d DATA -o out {FIELDS} --method standard --epochs 1 --limit 4"
    assert call(train)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, output = call(f"{train} --overwrite --grad-filter-eps 1e-6 --backend reference")
    assert (code, "grad_filter_eps saves nothing" in output) == (2, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_flow_is_the_method_when_none_is_named(call, tmp_path):
    assert call(f"score -m MODEL -d DATA -o s.parquet {FIELDS} --limit 4")[0] == 0
    train = f"train -m MODEL -d DATA -o out --scores s.parquet {FIELDS} --epochs 1 --limit 4"
    assert call(train)[0] == 0
    code, output = call(f"{train} --method flow")
    assert (code, "holds this run already" in output) == (0, True)


def test_help_shows_examples(call):
    for command in ("score", "train", "wise-ft", "evaluate", "report", "run"):
        code, output = call(f"{command} --help")
        assert code == 0
        assert f"flow-finetune {command}" in output


def test_the_version_is_the_packages(call):
    assert call("--version") == (0, f"flow-kernels {version('flow-kernels')}")


def test_an_interruption_is_told(call, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flow_finetune.scores.score", interrupt)
    code, output = call(f"score -m MODEL -d DATA -o s.parquet {FIELDS}")
    assert code == 130
    assert "interrupted; what was finished is kept" in output
