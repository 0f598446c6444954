"""Methods: what names stand for, what contradicts, the weights of each, and runs of each that continue after a kill."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from flow_finetune import checkpoint as checkpoint_module
from flow_finetune.checkpoint import TrainDirectory
from flow_finetune.cli import app
from flow_finetune.config import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    from_mapping,
    non_defaults,
    without_defaults,
)
from flow_finetune.errors import InputError
from flow_finetune.methods import check_method, check_methods, make_weights, named_method, needs_scores, weigh
from flow_finetune.scores import Scores
from processes import kill_when
from run_files import assert_same_files
from safetensors.torch import load_file
from training import Setup
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standard", {"weights": "none"}),
        ("flow", {}),
        ("flow-token", {"weights": "token"}),
        ("flow-mean", {"normalize": "mean"}),
        ("flow-online", {"online": True}),
        ("dro", {"direction": "hard"}),
        ("easiest", {"weights": "none", "keep_easiest": 0.5}),
        ("l2", {"weights": "none", "penalty": "l2"}),
        ("l1", {"weights": "none", "penalty": "l1"}),
        ("lora", {"weights": "none", "train": "lora"}),
        ("linear-probe", {"weights": "none", "train": "head"}),
        ("sfa", {"weights": "none", "average_every": 0.25}),
        ("flow+lora", {"train": "lora"}),
        ("flow+l2", {"penalty": "l2"}),
        ("flow-token+easiest+linear-probe+l1+sfa",
         {"weights": "token", "keep_easiest": 0.5, "train": "head", "penalty": "l1", "average_every": 0.25}),
        ("flow-online+lora", {"online": True, "train": "lora"}),
    ],
)  # fmt: skip
def test_names(name, options):
    method = named_method(name)
    assert method == MethodConfig(name=name, **options)
    check_method(method)


def test_what_a_name_leaves_open_is_as_in_the_paper():
    flow, lora, l2, sfa = map(named_method, ("flow", "lora", "l2", "sfa"))
    assert (flow.quantile, flow.temperature, flow.normalize) == (0.5, None, "none")
    assert (lora.lora_rank, lora.lora_alpha) == (64, 64)
    assert l2.penalty_strength == 1e-3
    assert (sfa.average_every, sfa.average_share) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("flow+dro", "flow and dro both say how samples are weighted; choose one"),
        ("lora+linear-probe", "both say what is trained"),
        ("l1+flow+l2", "l1 and l2 both say what is penalised"),
        ("best", "--method must be one of standard, flow,"),
        ("flow+", "--method must be one of"),
        ("flow+wise-ft", "WiSE-FT trains nothing; average a finished model with flow-finetune wise-ft"),
    ],
)
def test_names_that_say_nothing_or_two_things(name, match):
    with pytest.raises(InputError, match=match):
        named_method(name)


def test_a_name_in_a_file_brings_its_options_along():
    rows = [
        {"name": name} for name in ("standard", "flow", "flow-mean", "dro", "l2", "flow+lora", "linear-probe", "sfa")
    ]
    mapping = {
        "model": {"source": "m"},
        "data": {"source": "d"},
        "methods": [*rows, {"name": "mine", "weights": "token"}],
    }
    methods = from_mapping(RunConfig, mapping, "file").methods
    assert methods[:-1] == tuple(named_method(row["name"]) for row in rows)
    assert methods[-1] == MethodConfig("mine", weights="token")
    stronger = from_mapping(MethodConfig, {"name": "flow+l2", "penalty_strength": 1.0, "quantile": 0.9}, "row")
    assert stronger == MethodConfig("flow+l2", penalty="l2", penalty_strength=1.0, quantile=0.9)
    with pytest.raises(InputError, match=r"row: method l1\+l2: l1 and l2 both say what is penalised"):
        from_mapping(MethodConfig, {"name": "l1+l2"}, "row")
    for name in ("standart", "flow+lorra", "wise-ft", "lora+wise-ft"):
        with pytest.raises(InputError, match=f"row: the name '{re.escape(name)}' stands for no method; join names of"):
            from_mapping(MethodConfig, {"name": name, "learning_rate": 1e-4}, "row")
    averaged = from_mapping(MethodConfig, {"name": "lora", "of": "flow", "wise_ft": 0.5}, "row")
    assert averaged == MethodConfig("lora", of="flow", wise_ft=0.5)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("standard", {"weights": "sequence"}, "weights is sequence, where the name stands for weights: none; leave it away"),
        ("flow", {"weights": "none"}, "weights is none, where the name stands for weights: sequence.* call it standard"),
        ("standard", {"weights": "token"}, "or call it flow-token"),
        ("flow-mean", {"normalize": "none"}, "normalize is none, where the name stands for normalize: mean"),
        ("dro", {"direction": "easy"}, "direction is easy"),
        ("standard", {"average_every": 0.5}, r"or call it standard\+sfa"),
        ("flow", {"keep_easiest": 0.5}, r"or call it flow\+easiest"),
        ("flow+l2", {"penalty": "l1"}, "penalty is l1, where the name stands for penalty: l2.* a name of its own"),
        ("lora", {"train": "head"}, "train is head"),
        ("l2", {"train": "head"}, r"call it l2\+linear-probe"),
    ],
)  # fmt: skip
def test_a_name_that_stands_for_something_else_is_refused(name, options, match):
    method = dataclasses.replace(named_method(name), **options)
    with pytest.raises(InputError, match=f"method {re.escape(name)}: .*{match}"):
        check_methods((method,))
    check_methods((dataclasses.replace(method, name="mine"),))


def test_an_average_has_no_trainings_name():
    average = MethodConfig("flow", of="standard", wise_ft=0.5)
    with pytest.raises(InputError, match=r"method flow: it is an average \(WiSE-FT of standard\).* standard\+wise-ft"):
        check_methods((named_method("standard"), average))
    check_methods((named_method("standard"), dataclasses.replace(average, name="standard+wise-ft")))


def test_amounts_and_normalisation_go_with_any_name():
    for name, options in (("easiest", {"keep_easiest": 0.1}), ("flow+sfa", {"average_every": 1.0}),
                          ("flow+l2", {"normalize": "mean", "quantile": 0.1})):  # fmt: skip
        check_methods((dataclasses.replace(named_method(name), **options),))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"normalize": "simplex"}, "normalize must be one of none, mean, got 'simplex'"),
        ({"train": "lora", "penalty": "l2"}, "LoRA freezes the weights that l2 would hold; use train: all"),
        ({"train": "lora", "average_every": 0.5}, "LoRA freezes the weights that SFA would average"),
        ({"online": True, "weights": "none"}, "online weights need weights: sequence"),
        ({"online": True, "weights": "token"}, "online weights are one per sample; use weights: sequence"),
        ({"online": True, "normalize": "mean"}, "use normalize: none"),
        ({"online": True, "keep_easiest": 0.5}, "use online: false"),
        ({"online": True, "train": "head", "online_copy": "bfloat16"}, "what is frozen is not copied"),
        ({"wise_ft": 0.5}, "wise_ft needs `of`"),
        ({"of": "flow"}, "`of` needs wise_ft"),
        ({"of": "m", "wise_ft": 0.5}, "`of` names the method itself"),
        ({"of": "flow", "wise_ft": 0.5, "penalty": "l2"}, "WiSE-FT trains nothing, so penalty would have no effect"),
        ({"of": "flow", "wise_ft": 1.5}, r"wise_ft must be in \[0, 1\], got 1.5"),
        ({"lora_rank": 8}, "lora_rank has no effect without train: lora"),
        ({"penalty_strength": 1.0}, "penalty_strength has no effect without penalty"),
        ({"penalty_copy": "disk"}, "penalty_copy has no effect without penalty: l2"),
        ({"average_share": 0.1}, "average_share has no effect without average_every"),
        ({"online_copy": "bfloat16"}, "online_copy has no effect without online: true"),
        ({"weights": "none", "direction": "hard", "quantile": 0.1}, "direction, quantile has no effect without weights"),
        ({"weights": "none", "normalize": "mean"}, "normalize has no effect without weights"),
        ({"temperature": 1.0, "quantile": 0.9}, "temperature is given, so quantile"),
        ({"weights": "words"}, "weights must be one of none, sequence, token, got 'words'"),
        ({"direction": "up"}, "direction must be one of easy, hard"),
        ({"train": "body"}, "train must be one of all, head, lora"),
        ({"penalty": "l3"}, "penalty must be one of none, l2, l1"),
        ({"penalty_copy": "gpu"}, "penalty_copy must be one of bfloat16, float32, disk"),
        ({"keep_easiest": 0.0}, r"keep_easiest is a share in \(0, 1\], got 0.0"),
        ({"average_every": 1.5}, r"average_every is a share of all steps, in \(0, 1\], got 1.5"),
        ({"average_every": 0.5, "average_share": -1.0}, r"average_share must be in \[0, 1\]"),
        ({"train": "lora", "lora_rank": 0}, "lora_rank must be at least 1"),
        ({"penalty": "l2", "penalty_strength": -1.0}, "penalty_strength must be at least 0"),
        ({"penalty": "l2", "penalty_strength": math.nan}, "penalty_strength must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"quantile": 50}, r"quantile is a share of the losses, in \[0, 1\], got 50"),
        ({"temperature": -1.0}, "temperature is a number of nats above 0, got -1.0"),
        ({"clip_high": 0.0}, "clip_high must be above 0, or nothing is trained"),
        ({"clip_low": -0.5}, "clip_low must be at least 0"),
        ({"clip_low": 0.9, "clip_high": 0.1}, "clip_low must not be above clip_high, got 0.9 and 0.1"),
    ],
)  # fmt: skip
def test_contradictions_are_named_with_a_remedy(options, match):
    with pytest.raises(InputError, match=f"method m: .*{match}"):
        check_method(MethodConfig(name="m", **options))


def test_a_wise_ft_row_names_a_trained_row_of_its_run():
    rows = (MethodConfig(), MethodConfig("wise", of="flow", wise_ft=0.5))
    check_methods(rows)
    for of in ("l2", "wise2"):
        with pytest.raises(InputError, match=f"method wise: of must be one of flow, got '{of}'"):
            check_methods((MethodConfig(), MethodConfig("wise", of=of, wise_ft=0.5),
                           MethodConfig("wise2", of="flow", wise_ft=0.1)))  # fmt: skip


def test_which_methods_need_scores():
    needing = ["flow", "flow-token", "flow-mean", "dro", "easiest", "flow+lora"]
    others = ["standard", "flow-online", "l2", "l1", "lora", "linear-probe", "sfa"]
    assert [name for name in needing + others if needs_scores(named_method(name))] == needing
    assert not needs_scores(MethodConfig("wise", of="flow", wise_ft=0.5))


LOSSES = torch.tensor([0.9, 3.5, 1.1, 2.0, 1.8, 1.1, 2.6, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("quantile", [0.5, 0.1])
def test_dro_weights_are_exp_plus_loss_over_tau(quantile):
    weights, tau = weigh(MethodConfig(direction="hard", quantile=quantile, clip_high=20.0), LOSSES, None)
    assert tau == pytest.approx(np.quantile(LOSSES, quantile), rel=1e-12)
    assert weights.tolist() == pytest.approx([min(math.exp(f / tau), 20.0) for f in LOSSES.tolist()], rel=1e-6)


@pytest.mark.parametrize("normalize", ["none", "mean"])
@pytest.mark.parametrize("kind", ["none", "sequence"])
def test_keep_easiest_gives_the_others_weight_0(kind, normalize):
    weights, tau = weigh(MethodConfig(weights=kind, keep_easiest=0.4, normalize=normalize), LOSSES, None)
    # round(0.4 * 8) = 3 of 8: 0.2, 0.9 and the earlier 1.1; tau is the median of all.
    kept = [0, 2, 7]
    assert weights.nonzero().flatten().tolist() == kept
    raw = torch.ones(3) if kind == "none" else torch.exp(-LOSSES[kept] / np.median(LOSSES))
    expected = raw * (8 / float(raw.sum()) if normalize == "mean" else 1)
    assert weights[kept].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert tau == (None if kind == "none" else pytest.approx(float(np.median(LOSSES)), rel=1e-12))
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6) or normalize == "none"


def test_keeping_all_is_keeping_every_weight_and_at_least_one_is_kept():
    assert torch.equal(weigh(MethodConfig(keep_easiest=1.0), LOSSES, None)[0], weigh(MethodConfig(), LOSSES, None)[0])
    assert weigh(MethodConfig(keep_easiest=1e-6), LOSSES, 1.0)[0].nonzero().tolist() == [[7]]
    # 0.45 x 8 is nearer to 4 than to 3.
    assert len(weigh(MethodConfig(keep_easiest=0.45), LOSSES, 1.0)[0].nonzero()) == 4


def test_token_weights_of_dro_and_a_cut_off_are_per_token():
    tokens = [np.array([0.5, 4.0], np.float32), np.array([1.0], np.float32), np.array([2.0, 0.1, 3.0], np.float32)]
    scores = Scores(torch.tensor([2.25, 1.0, 1.7], dtype=torch.float64), tokens, {})
    weights = make_weights(MethodConfig(weights="token", direction="hard", keep_easiest=0.5), 3, scores)
    tau = 1.5
    assert weights.temperature == pytest.approx(tau)
    assert [w.tolist() for w in weights.per_token] == [
        pytest.approx([math.exp(0.5 / tau), 0.0]), pytest.approx([math.exp(1.0 / tau)]),
        pytest.approx([0.0, math.exp(0.1 / tau), 0.0]),
    ]  # fmt: skip


def test_weights_beyond_fp32_are_refused():
    with pytest.raises(InputError, match="set clip_high or normalize: mean"):
        weigh(MethodConfig(direction="hard"), torch.tensor([1.0, 2.0, 900.0], dtype=torch.float64), 1.0)
    weights, _ = weigh(
        MethodConfig(direction="hard", normalize="mean"), torch.tensor([1.0, 2.0, 900.0], dtype=torch.float64), 1.0
    )
    assert weights.tolist() == [0.0, 0.0, 3.0]


def test_identities_leave_defaults_out_and_old_ones_compare_alike():
    assert non_defaults(MethodConfig()) == {}
    config = RunConfig(ModelConfig("m"), DataConfig("d", limit=3), methods=(MethodConfig(), named_method("l2")))
    identity = non_defaults(config)
    assert identity == {
        "model": {"source": "m"}, "data": {"source": "d", "limit": 3},
        "methods": [{}, {"name": "l2", "weights": "none", "penalty": "l2"}],
    }  # fmt: skip
    # As a version without penalties wrote it: every entry, but not those that came later.
    old = json.loads(json.dumps(dataclasses.asdict(config)))
    for row in old["methods"]:
        del row["lora_rank"], row["online"]
    assert without_defaults(RunConfig, old) == identity
    assert without_defaults(RunConfig, old | {"later": 1}) == identity | {"later": 1}
    assert non_defaults(RunConfig(ModelConfig("m"), DataConfig("d"))) == {
        "model": {"source": "m"}, "data": {"source": "d"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def setup(tiny_model_dir, qa_file, tmp_path_factory):
    return Setup(tiny_model_dir, qa_file).score(tmp_path_factory.mktemp("methods"))


def test_steps_in_which_nothing_counts_have_no_loss(setup, tmp_path):
    method = MethodConfig("easiest", "none", keep_easiest=0.25)
    summary = setup.train(tmp_path / "out", method, epochs=1, batch_size=1, learning_rate=1e-3)
    lines = [json.loads(text) for text in (tmp_path / "out/train/log.jsonl").read_text().splitlines()]
    assert sum(line["loss"] is None for line in lines) == 18
    assert all(line["loss"] is None or line["loss"] > 0.1 for line in lines)
    assert summary["final_loss"] == lines[-1]["loss"]


def test_a_run_of_an_older_version_is_still_known(setup, tmp_path):
    first = setup.train(tmp_path / "out", MethodConfig(), epochs=1)
    path = tmp_path / "out/train/identity.json"
    identity = json.loads(path.read_text())
    assert identity["train"] == {"epochs": 1}
    old = ("name", "weights", "temperature", "quantile", "clip_low", "clip_high", "normalize", "learning_rate")
    identity["method"] = {name: getattr(MethodConfig(), name) for name in old}
    identity["train"] = dataclasses.asdict(TrainConfig(epochs=1))
    path.write_text(json.dumps(identity))
    assert setup.train(tmp_path / "out", MethodConfig(), epochs=1) == first
    with pytest.raises(InputError, match=r"differs in method\.penalty"):
        setup.train(tmp_path / "out", MethodConfig(penalty="l2"), epochs=1)


def test_a_row_that_trains_nothing_is_not_trained(setup, tmp_path):
    with pytest.raises(InputError, match="averages what flow gave and trains nothing"):
        setup.train(tmp_path / "out", MethodConfig("wise", of="flow", wise_ft=0.5))


# The SFA average of step 3 lies before the checkpoint of step 4, that of step 6 after it.
CONTINUED = {
    "l2": {"penalty": "l2", "penalty_strength": 1e3},
    "l1 on disk, sfa": {"penalty": "l1", "penalty_copy": "disk", "penalty_strength": 10.0, "average_every": 0.3},
    "lora": {"train": "lora", "lora_rank": 4},
    "head": {"train": "head"},
    "online": {"online": True},
    "online lora": {"online": True, "train": "lora", "lora_rank": 4},
    "online, sfa": {"online": True, "average_every": 0.3},
}


@pytest.mark.parametrize("name", CONTINUED)
def test_an_interrupted_run_continues_to_the_same_bytes(setup, tmp_path, monkeypatch, name):
    method = MethodConfig(**CONTINUED[name])
    options = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_every": 4, "log_every": 3}
    setup.train(tmp_path / "undisturbed", method, **options)
    save = checkpoint_module.TrainDirectory.save_checkpoint

    def interrupt(self, step, *rest):
        save(self, step, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainDirectory, "save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.train(tmp_path / "continued", method, **options)
    if method.train != "all":
        # What is frozen is not in the checkpoint.
        stored = load_file(tmp_path / "continued/checkpoints/step-00000004/model.safetensors")
        assert all("lora_" in key or key == "lm_head.weight" for key in stored)
    if name == "l2":
        # A checkpoint that lacks a part, as one of an older version does.
        state = tmp_path / "continued/checkpoints/step-00000004/state.pt"
        content = state.read_bytes()
        parts = torch.load(state, weights_only=True)
        torch.save({k: v for k, v in parts.items() if k != "weights"}, state)
        with pytest.raises(InputError, match="was written by another version"):
            setup.train(tmp_path / "continued", method, **options)
        state.write_bytes(content)
    setup.train(tmp_path / "continued", method, **options)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "continued")


def test_a_killed_run_continues_to_the_same_bytes(setup, qa_file, tmp_path):
    """kill -9, of FLOW with L2 and SFA at once."""
    command = [
        "train", "-m", setup.config.source, "-d", str(qa_file),
        "--prompt-field", "question", "--response-field", "answer", "--scores", str(setup.scores), "--method",
        "flow+l2+sfa", "--penalty-strength", "100", "--precision", "full", "--device", "cpu", "--lr", "1e-3",
        "--epochs", "12", "--batch-size", "4", "--checkpoint-every", "4",
    ]  # fmt: skip
    kill_when(
        lambda: any((tmp_path / "killed").glob("checkpoints/step-*")),
        "-m", "flow_finetune.cli", *command, "-o", tmp_path / "killed",
    )  # fmt: skip
    assert not (tmp_path / "killed/train/summary.json").exists()
    again = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "killed")])
    assert again.exit_code == 0, again.output
    assert "after step" in again.output
    assert CliRunner().invoke(app, [*command, "-o", str(tmp_path / "undisturbed")]).exit_code == 0
    assert_same_files(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method lora+l2", "LoRA freezes the weights that l2 would hold"),
        ("--method flow+dro", "both say how samples are weighted"),
        ("--method flow --lora-rank 8", "lora_rank has no effect without train: lora"),
        ("--method wise-ft", "flow-finetune wise-ft"),
        ("--method flow-online --weights token", "online weights are one per sample"),
        ("--keep-easiest 2", "keep_easiest is a share in (0, 1]"),
    ],
)
def test_the_command_line_names_contradictions(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", "-m", "none", "-d", "none", "-o", "out", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
