"""What is refused, or said, before a training begins."""

import pytest
import torch
from flow_finetune.cli import app
from flow_finetune.config import MethodConfig, ModelConfig, TrainConfig
from flow_finetune.errors import InputError
from flow_finetune.methods import named_method
from flow_finetune.models import load_model
from flow_finetune.train_checks import (
    check_dtype,
    check_gradient_checkpointing,
    check_scores,
    check_train,
    warn_of_lost_updates,
)
from typer.testing import CliRunner


def test_parameters_in_float16_are_refused_but_for_lora():
    for name in ("standard", "flow", "linear-probe"):
        with pytest.raises(InputError, match="parameters in float16 cannot be trained; use dtype float32"):
            check_dtype(named_method(name), "float16", "bf16")
        check_dtype(named_method(name), "bfloat16", "full")
    check_dtype(named_method("flow+lora"), "float16", "bf16")
    # Gradients through a body in float16 would be lost too, as no loss is scaled.
    with pytest.raises(
        InputError, match=r"products in float16 lose the gradients of confident samples.*precision bf16"
    ):
        check_dtype(named_method("flow+lora"), "float16", "full")


def test_updates_that_bfloat16_rounds_away_are_counted(tiny_model_dir, capsys):
    lm, _ = load_model(ModelConfig(str(tiny_model_dir), dtype="bfloat16", device="cpu"))
    num = sum(p.numel() for p in lm.parameters())
    for rate in (1e-5, 1e-3):
        with torch.no_grad():
            # Each parameter is moved for itself: does the move change it?
            kept = sum(int(((p - rate * p.sign()) == p).sum()) for p in lm.parameters())
        warn_of_lost_updates(lm, rate)
        said = float(capsys.readouterr().err.split("%")[0]) / 100
        # The bound is that of the whole power of 2, so it is never more than what is lost, and at least half of it here.
        assert 0.5 * kept / num <= said <= kept / num + 0.005
    warn_of_lost_updates(lm, 1.0)
    lm.float()
    warn_of_lost_updates(lm, 1e-5)
    assert not capsys.readouterr().err


def test_seeds_and_gradient_checkpointing_that_cannot_be(tiny_model_dir):
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match="seed must be between 0 and"):
            check_train(TrainConfig(seed=seed), named_method("standard"))
    check_train(TrainConfig(seed=2**32 - 1), named_method("standard"))
    lm, _ = load_model(ModelConfig(str(tiny_model_dir), device="cpu"))
    check_gradient_checkpointing(TrainConfig(gradient_checkpointing=True), named_method("flow"), lm)
    lm.model.supports_gradient_checkpointing = False
    check_gradient_checkpointing(TrainConfig(), named_method("flow"), lm)
    check_gradient_checkpointing(TrainConfig(gradient_checkpointing=True), named_method("linear-probe"), lm)
    with pytest.raises(InputError, match="does not do gradient checkpointing"):
        check_gradient_checkpointing(TrainConfig(gradient_checkpointing=True), named_method("flow"), lm)


def test_a_missing_score_file_is_named_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match="method flow needs the pre-trained model's scores"):
        check_scores(MethodConfig(), None)
    with pytest.raises(InputError, match=r"no such file.*make it with flow-finetune score"):
        check_scores(MethodConfig(), tmp_path / "none.parquet")
    check_scores(named_method("standard"), tmp_path / "none.parquet")
    command = ["train", "-m", "no/model", "-d", "none.jsonl", "-o", str(tmp_path / "out")]
    for more, message in (([], "needs the pre-trained model's scores"), (["--scores", "none.parquet"], "no such file"),
                          (["--method", "standard", "--dtype", "float16"], "cannot be trained")):  # fmt: skip
        result = CliRunner().invoke(app, command + more)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
