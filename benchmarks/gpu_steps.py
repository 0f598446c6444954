"""Every optimiser step's time on a GPU, with and without cuDNN's attention: flow_finetune's own training loop.

    python benchmarks/gpu_steps.py --config config.json --data gsm8k_train.jsonl.gz --batch-size 16 --steps 16
    python benchmarks/gpu_steps.py ... --side transformers --cudnn-attention

The model of `--config` has random weights, and the samples are random tokens as long as those of the data, as
tokenised by `--tokenizer` (the config's directory when not given). A step's time does not depend on either. Seconds go
to results/gpu_steps.csv, one row a step: the first ones, which compile and plan, are part of what is shown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import harness
import numpy as np
import torch
from accelerate import Accelerator
from end_to_end import EagerCausalLM
from flow_finetune.config import DataConfig, ModelConfig, TrainConfig
from flow_finetune.data import Sample, load_samples
from flow_finetune.methods import Weights
from flow_finetune.models import CausalLM
from flow_finetune.train import Meter, accumulate_gradients, make_optimizer, step_plan
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

KEYS = ("device", "side", "cudnn_attention", "batch_size", "step")


def random_samples(data: str, tokenizer: str, limit: int) -> list[Sample]:
    """Random tokens as long as the first samples of `data`."""
    config = DataConfig(data, prompt_field="question", response_field="answer", limit=limit)
    rng = np.random.default_rng(0)
    return [
        Sample(s.id, rng.integers(1000, 20000, len(s.input_ids)).astype(np.int32), s.start, "", "", False)
        for s in load_samples(config, AutoTokenizer.from_pretrained(tokenizer)).samples
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config.json of a language model")
    parser.add_argument("--tokenizer", help="directory of its tokenizer")
    parser.add_argument("--data", default="examples/data/gsm8k_train.jsonl.gz")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--side", choices=("flow", "transformers"), default="flow", help="whose loss")
    parser.add_argument("--cudnn-attention", action="store_true", help="as torch chooses it on a Hopper GPU")
    parser.add_argument("--device", default="cuda", help="cpu tries the program")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cuda.enable_cudnn_sdp(arguments.cudnn_attention)
    samples = random_samples(
        arguments.data, arguments.tokenizer or str(Path(arguments.config).parent), arguments.samples
    )
    with device:
        body = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.config))
    lm = (CausalLM if arguments.side == "flow" else EagerCausalLM)(body.to(device)).train()
    lm.shares_tied_gradient = arguments.side == "flow"  # as training sets it
    config = TrainConfig(batch_size=arguments.batch_size, micro_batch_tokens=arguments.batch_tokens, learning_rate=1e-5)
    weights = Weights(torch.linspace(0.2, 0.6, len(samples)), None, None, 0.4, float(len(samples)))
    accelerator = Accelerator(cpu=device.type == "cpu")
    optimizer = make_optimizer(lm, config, config.learning_rate)
    rows = []
    for number, indices in enumerate(step_plan(len(samples), config)[: arguments.steps]):
        _wait(device)
        started, meter = time.perf_counter(), Meter()
        accumulate_gradients(
            lm, samples, indices, weights, accelerator, config, ModelConfig("", precision="bf16"), meter
        )
        torch.nn.utils.clip_grad_norm_(lm.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        rows.append({
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "side": arguments.side,
            "cudnn_attention": arguments.cudnn_attention, "batch_size": config.batch_size, "step": number,
            "seconds": f"{time.perf_counter() - started:.4f}",
            "tokens": sum(len(samples[i].input_ids) for i in indices), "targets": meter.num_targets,
        } | harness.provenance("gpu_steps.py", programs=("harness", "end_to_end", "gpu_steps")))  # fmt: skip
        print({key: rows[-1][key] for key in ("step", "seconds", "tokens", "targets")}, flush=True)
    harness.update_csv("gpu_steps", rows, KEYS)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
