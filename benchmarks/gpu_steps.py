"""Every optimiser step's time on a GPU, with and without cuDNN's attention: flow_finetune's own training loop.

    python benchmarks/gpu_steps.py --config config.json --data gsm8k_train.jsonl.gz --batch-size 16 --steps 16
    python benchmarks/gpu_steps.py ... --side transformers --cudnn-attention

The model of `--config` has random weights, and the samples are random tokens as long as those of the data, as
tokenised by `--tokenizer` (the config's directory when not given). A step's time does not depend on either. Seconds go
to results/gpu_steps.csv, one row a step: the first ones, which compile and plan, are part of what is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import numpy as np
import torch
from end_to_end import EagerCausalLM, clock
from flow_finetune.config import DataConfig, TrainConfig
from flow_finetune.data import Sample, load_samples
from flow_finetune.models import CausalLM
from flow_finetune.train import step_plan
from step_profile import optimiser_steps
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
    config = TrainConfig(batch_size=arguments.batch_size, micro_batch_tokens=arguments.batch_tokens, learning_rate=1e-5)
    plan = step_plan(len(samples), config)[: arguments.steps]
    step = optimiser_steps(lm, samples, plan, config)
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "side": arguments.side,
        "cudnn_attention": arguments.cudnn_attention, "batch_size": config.batch_size,
    }  # fmt: skip
    source = harness.provenance("gpu_steps.py", programs=("harness", "end_to_end", "step_profile", "gpu_steps"))
    rows = []
    for number, indices in enumerate(plan):
        started = clock(device)
        step(number)
        row = {
            "step": number, "seconds": f"{clock(device) - started:.4f}",
            "tokens": sum(len(samples[i].input_ids) for i in indices),
            "targets": sum(samples[i].num_targets for i in indices),
        }  # fmt: skip
        print(row, flush=True)
        rows.append(about | row | source)
    harness.update_csv("gpu_steps", rows, KEYS)


if __name__ == "__main__":
    main()
