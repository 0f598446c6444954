"""The command line's training and evaluation on a GPU against the CPU; collected by `make test DEVICE=cuda` only."""

import json
import os

import pytest
import torch
from flow_finetune.config import RunConfig, from_mapping
from flow_finetune.pipeline import run

# The tests of this file themselves are tried where there is no GPU by naming the CPU.
DEVICE = os.environ.get("TRAINING_DEVICE", "cuda")
METHODS = [
    {"name": "standard"}, {"name": "flow"}, {"name": "flow-token"}, {"name": "lora", "lora_rank": 4, "lora_alpha": 4},
    {"name": "l2", "penalty_strength": 10.0}, {"name": "sfa"}, {"name": "flow-online"}, {"name": "linear-probe"},
    {"name": "averaged", "of": "flow", "wise_ft": 0.5},
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model_dir, qa_file, files, tmp_path_factory):
    """The same run on both devices."""
    fields = {"prompt_field": "question", "response_field": "answer"}
    root = tmp_path_factory.mktemp("runs")
    for name, device in (("cpu", "cpu"), ("gpu", DEVICE)):
        mapping = {
            "model": {"source": str(tiny_model_dir), "precision": "full", "device": device},
            "data": {"source": str(qa_file), **fields},
            "methods": METHODS,
            "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 2},
            "tasks": [
                {
                    "kind": "qa",
                    "source": files["qa"],
                    "role": "target",
                    "num_generate": 2,
                    "max_new_tokens": 4,
                    **fields,
                },
                {"kind": "perplexity", "source": files["text"], "window": 32},
                {"kind": "multiple_choice", "source": files["mc"]},
            ],
        }
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run(from_mapping(RunConfig, mapping, "test"), root / name)
        _forget_accelerate()
    return root


def _forget_accelerate():
    """Its state is the process's, and belongs to one device."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", [method["name"] for method in METHODS[:-1]])
def test_training_takes_the_same_steps(runs, name):
    logs = [
        [json.loads(line) for line in (runs / device / name / "train/log.jsonl").read_text().splitlines()]
        for device in ("cpu", "gpu")
    ]
    assert len(logs[0]) == len(logs[1]) > 4
    for ours, theirs in zip(*logs, strict=True):
        for key in ("loss", "weighted_loss", "mean_weight"):
            assert theirs[key] == pytest.approx(ours[key], rel=2e-3), (name, ours["step"], key)
    assert logs[1][-1]["distance"] == pytest.approx(logs[0][-1]["distance"], rel=1e-2)


@pytest.mark.parametrize("name", ["pretrained", *(method["name"] for method in METHODS)])
def test_evaluation_finds_the_same(runs, name):
    found = [json.loads((runs / device / name / "evaluation.json").read_text())["tasks"] for device in ("cpu", "gpu")]
    for ours, theirs in zip(*found, strict=True):
        for key in ("nats_per_token", "perplexity"):
            if key in ours["metrics"]:
                value = ours["metrics"][key]["value"]
                assert theirs["metrics"][key]["value"] == pytest.approx(value, rel=2e-3), (name, ours["name"], key)


def test_the_model_was_on_the_device(runs):
    """A GPU's log has the memory allocated on it, a few MB of this model, and not the process's."""
    peaks = [
        json.loads((runs / name / "standard/train/log.jsonl").read_text().splitlines()[-1])["peak_memory_bytes"]
        for name in ("cpu", "gpu")
    ]
    assert peaks[0] > 2**27
    if DEVICE == "cuda":
        assert 0 < peaks[1] < 2**27
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # it plans every length of a batch anew
