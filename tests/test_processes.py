"""Two processes: what a checkpoint holds of each, models with parts that text does not reach, settings of accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model
import torch
from accelerate.utils import DistributedType
from flow_finetune import models
from flow_finetune import processes as processes_module
from flow_finetune.commands.processes import require_one_process
from flow_finetune.errors import InputError
from flow_finetune.models import resolve_device
from flow_finetune.processes import make_accelerator
from run_files import assert_same_files
from safetensors.torch import load_file
from train_in_two_processes import fine_tune
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model_dir):
    """Models, data, and what two processes have made of them."""
    root = tmp_path_factory.mktemp("processes")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    models = {
        # With dropout, so that the random numbers of each process count.
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)),
        "gemma3": tiny_model.with_vision(
            **sizes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=8, pad_token_id=0,
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"prompt": f"q {i}", "response": "the answer is " + "a" * (i % 7) + str(i)} for i in range(16)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(__file__).parent / "train_in_two_processes.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*launcher, script, root], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return root


def test_a_continued_run_is_the_undisturbed_one(root):
    assert_same_files(root / "undisturbed", root / "continued")
    # Dropout is at work: without it the process that rank 1's numbers come from would not matter.
    assert GPT2Config.from_pretrained(root / "gpt2").resid_pdrop > 0


def test_another_number_of_processes_does_not_continue(root):
    with pytest.raises(InputError, match=r"written by 2 processes and this call has 1; continue with as many"):
        fine_tune(root, "gpt2", "left")


def test_what_text_does_not_reach_stays(root):
    before, after = (load_file(root / d / "model.safetensors") for d in ("gemma3", "multimodal"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    is_of_text = {name for name in before if "language_model" in name}
    assert 0 < len(is_of_text) < len(before)
    assert changed == is_of_text


def test_settings_of_accelerate_change_nothing(root, monkeypatch):
    fine_tune(root, "gemma3", "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    fine_tune(root, "gemma3", "with settings")
    assert_same_files(root / "plain", root / "with settings")
    module = torch.nn.Linear(1, 1)
    assert type(make_accelerator(torch.device("cpu")).prepare(module)) is torch.nn.Linear


def test_other_ways_of_accelerate_are_refused(monkeypatch):
    kind = DistributedType.DEEPSPEED
    monkeypatch.setattr(
        processes_module, "Accelerator", lambda **options: SimpleNamespace(distributed_type=kind, device=CPU)
    )
    with pytest.raises(InputError, match="accelerate is set to DEEPSPEED"):
        make_accelerator(torch.device("cpu"))


def test_each_process_has_its_own_gpu_and_one_process_the_one_named(monkeypatch):
    monkeypatch.setattr(models.torch, "empty", lambda size, device: SimpleNamespace(device=torch.device(device)))
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(
        processes_module,
        "Accelerator",
        lambda **options: SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cuda", 1)),
    )
    make_accelerator(torch.device("cuda:1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    make_accelerator(torch.device("cuda:0"))
    assert current == [torch.device("cuda:1")]
    assert resolve_device("cuda") == torch.device("cuda:1")
    with pytest.raises(InputError, match="device 'cuda:1' is one GPU, and every process has its own"):
        resolve_device("cuda:1")


def test_commands_for_one_process(monkeypatch):
    require_one_process("score")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="score was started as 2 processes"):
        require_one_process("score")
