"""Compiled layers: the same numbers under the same names, compiled a few times at most, and what cannot be compiled."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import tiny_model
import torch
from evaluation_cases import MC, metrics_of, run, write_rows
from flow_finetune import compiled_layers, generate
from flow_finetune.config import MethodConfig, ModelConfig, TaskConfig
from flow_finetune.data import collate
from flow_finetune.errors import InputError
from flow_finetune.models import autocast, load_model
from flow_finetune.scores import score
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from training import Setup

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = MethodConfig("m", weights="none")
STEPS = {"epochs": 1, "batch_size": 6, "micro_batch_tokens": 256, "learning_rate": 1e-2}


@pytest.fixture
def counter(monkeypatch):
    """Layers are traced and run as they were written: how often, without the time that a compiler takes."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, *, dynamic, options: compile(self, backend=counter, dynamic=dynamic)
    )
    monkeypatch.setattr("flow_finetune.models.check_compiler", lambda device: None)
    yield counter
    torch._dynamo.reset()


class CompiledSetup(Setup):
    """`training.Setup` with a model whose layers are compiled."""

    def __init__(self, model_dir: Path, qa_file: Path) -> None:
        super().__init__(model_dir, qa_file)
        self.config = dataclasses.replace(self.config, compile=True)
        self.lm, _ = load_model(self.config)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_losses_and_gradients_of_the_compiler(tmp_path, qa_file):
    """torch's own compiler: in fp32 nothing but the last bits differs, and with bf16 products the errors are no larger."""
    torch._dynamo.reset()
    directory = tiny_model.build(tmp_path / "model", bos=True, tied=True)
    plain, compiled = Setup(directory, qa_file), CompiledSetup(directory, qa_file)
    assert compiled.lm.model.state_dict().keys() == plain.lm.model.state_dict().keys()
    batch, weight = collate(plain.samples.samples[:3], 0), torch.tensor([0.2, 1.0, 0.5])

    def gradients(setup, precision):
        setup.lm.train().zero_grad()
        with autocast(torch.device("cpu"), precision):
            loss = setup.lm(batch, weight, 10)
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in setup.lm.named_parameters()}}

    expected = gradients(plain, "full")
    for precision, limit in (("full", 1e-5), ("bf16", None)):
        found, eager = gradients(compiled, precision), gradients(plain, precision)
        for name, value in expected.items():
            errors = [float((tensors[name] - value).norm() / value.norm()) for tensors in (found, eager)]
            assert errors[0] < (limit or 1.5 * errors[1] + 1e-4), (precision, name, errors)


def test_layers_share_their_code(tmp_path, qa_file, counter):
    """Batches of many lengths, two layers: compiled once for scoring and once for training, not once a layer or a length."""
    setup = CompiledSetup(tiny_model.build(tmp_path / "model", bos=True), qa_file)
    assert counter.frame_count == 0
    setup.score(tmp_path)
    assert counter.frame_count == 1
    setup.train(tmp_path / "out", MethodConfig(), lm=setup.lm, **STEPS)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("method", "options", "num_compiled"),
    [
        # For scoring and for training; once more with adapters, and for weights that the frozen model makes.
        (MethodConfig("flow"), {"gradient_checkpointing": True}, 2),
        (MethodConfig("lora", train="lora", lora_rank=2), {}, 3),
        (MethodConfig("flow-online", online=True), {}, 3),
        (MethodConfig("linear-probe", train="head"), {}, 2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_method_trains_as_without(tmp_path, qa_file, counter, method, options, num_compiled):
    directory = tiny_model.build(tmp_path / "model", bos=True)
    found = []
    for kind in (Setup, CompiledSetup):
        output = tmp_path / kind.__name__
        output.mkdir()
        setup = kind(directory, qa_file).score(output)
        setup.train(output / "out", method, **options, **STEPS)
        found.append(load_file(output / "out" / "model.safetensors"))
    assert counter.frame_count == num_compiled
    for key, weight in found[0].items():
        torch.testing.assert_close(found[1][key], weight, rtol=1e-5, atol=1e-7, msg=key)


def test_what_keeps_a_cache_is_not_compiled(tmp_path, qa_file, counter):
    directory = tiny_model.build(tmp_path / "model", bos=True)
    rows = [{"context": " ".join([row["context"]] * 3), **{k: row[k] for k in ("choices", "answer")}} for row in MC]
    task = TaskConfig("multiple_choice", write_rows(tmp_path / "mc.jsonl", rows), name="choices")
    plain, compiled = Setup(directory, qa_file), CompiledSetup(directory, qa_file)
    for setup in (plain, compiled):
        setup.lm.packing = False  # packed questions need no cache
    expected = run((plain.lm, plain.tokenizer), [task], tmp_path / "a")
    assert metrics_of(run((compiled.lm, plain.tokenizer), [task], tmp_path / "b"), "choices") == metrics_of(
        expected, "choices"
    )
    prompts = [s.input_ids[: s.start] for s in plain.samples.samples[:3]]
    options = {"until": [], "max_new_tokens": 5, "batch_tokens": 512, "precision": "full"}
    texts = [generate.generate_texts(lm, plain.tokenizer, prompts, **options) for lm in (plain.lm, compiled.lm)]
    assert texts[0] == texts[1]
    assert counter.frame_count == 0


def test_files_say_that_layers_were_compiled(tmp_path, qa_file, counter):
    directory = tiny_model.build(tmp_path / "model", bos=True)
    plain, compiled = Setup(directory, qa_file).score(tmp_path), CompiledSetup(directory, qa_file)
    with pytest.raises(InputError, match=r"holds other scores .*compile"):
        score(compiled.lm, compiled.tokenizer, compiled.samples, plain.scores, model_config=compiled.config)
    plain.train(tmp_path / "out", PLAIN, **STEPS)
    with pytest.raises(InputError, match="compile"):
        compiled.train(tmp_path / "out", PLAIN, **STEPS)


def test_a_missing_compiler_is_named_before_anything_is_loaded(tiny_model_dir, monkeypatch, tmp_path):
    config = ModelConfig(str(tiny_model_dir), device="cpu", compile=True)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(InputError, match=r"compiling needs a C\+\+ compiler, and .*no-compiler is not there; install"):
        load_model(config)
    compiled_layers.check_compiler(torch.device("cuda"))  # Triton compiles there


def test_a_model_without_named_layers_is_refused(tiny_model_dir):
    lm, _ = load_model(ModelConfig(str(tiny_model_dir), device="cpu"))
    lm.model._no_split_modules = None
    with pytest.raises(InputError, match="LlamaForCausalLM does not say which of its modules are its layers"):
        compiled_layers.compile_layers(lm.model)
