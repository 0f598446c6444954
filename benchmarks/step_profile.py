"""Where the time of a training step goes: optimiser steps of flow_finetune's own loop under torch's profiler.

    python benchmarks/step_profile.py --model MODEL --data gsm8k_train.jsonl.gz

Seconds are those that the calling thread spent in an operation and not in one below it, over all steps, into
results/step_profile.csv. `gflops` is the rate of what does nothing but multiply; of the head it is that of its three
products alone, over the time of everything it does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import harness
import torch
from accelerate import Accelerator
from end_to_end import load
from flow_finetune.config import ModelConfig, TrainConfig
from flow_finetune.methods import Weights
from flow_finetune.models import CausalLM
from flow_finetune.train import Meter, accumulate_gradients, make_optimizer, step_plan
from torch.profiler import ProfilerActivity, profile

# Names of operations, whole where they begin with aten:: and in part elsewhere; the first that fits.
GROUPS = {
    "head and loss (fused)": ("flow_kernels_cpu::", "flow_kernels::"),
    "attention": ("scaled_dot_product",),
    "products of the body": ("aten::mm", "aten::addmm", "aten::bmm"),
    "conversions between fp32 and bf16": ("aten::copy_",),
    "zeros": ("aten::fill_", "aten::zero_"),
    "AdamW": ("adamw",),
}


def group_of(name: str) -> str:
    """The row of the table that an operation counts in."""
    for group, parts in GROUPS.items():
        if any(name == part or (part in name and not part.startswith("aten::")) for part in parts):
            return group
    return "everything else"


def optimiser_steps(lm: CausalLM, samples: list, plan: list[list[int]], config: TrainConfig):
    """A function that makes the K-th step of `plan`."""
    weights = Weights(torch.ones(len(samples)), None, None, 1.0, float(len(samples)))
    model_config, accelerator = ModelConfig("", precision="bf16"), Accelerator(cpu=lm.head.weight.device.type == "cpu")
    optimizer = make_optimizer(lm.train(), config, config.learning_rate)
    lm.shares_tied_gradient = True  # as training sets it

    def step(number: int) -> None:
        accumulate_gradients(lm, samples, plan[number], weights, accelerator, config, model_config, Meter())
        torch.nn.utils.clip_grad_norm_(lm.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--data", default="examples/data/gsm8k_train.jsonl.gz")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    arguments = parser.parse_args()
    config = TrainConfig(micro_batch_tokens=arguments.batch_tokens)
    lm, samples = load(arguments.model, arguments.data, config.batch_size * (arguments.steps + 1))
    lm.packing = True  # as training loads it
    plan = step_plan(len(samples), config)[: arguments.steps + 1]
    step = optimiser_steps(lm, samples, plan, config)
    step(0)  # warm: thread pools, the optimiser's state
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as measured:
        for number in range(1, arguments.steps + 1):
            step(number)
    total = time.perf_counter() - started
    seconds, flops = dict.fromkeys([*GROUPS, "everything else"], 0.0), {}
    for event in measured.key_averages():
        group = group_of(event.key)
        seconds[group] += event.self_cpu_time_total / 1e6
        if group == "products of the body":
            flops[group] = flops.get(group, 0) + event.flops
    chosen = [samples[i] for indices in plan[1:] for i in indices]
    num_targets = sum(s.num_targets for s in chosen)
    flops["head and loss (fused)"] = 6 * num_targets * lm.head.weight.numel()
    about = {
        "model": Path(arguments.model).name, "steps": arguments.steps,
        "tokens": sum(len(s.input_ids) for s in chosen), "targets": num_targets, "step_seconds": f"{total:.2f}",
    }  # fmt: skip
    rows = [
        about | {
            "part": group, "seconds": f"{value:.2f}", "share": f"{value / sum(seconds.values()):.3f}",
            "gflops": f"{flops[group] / value / 1e9:.0f}" if group in flops else "",
        } | harness.provenance_of_model("step_profile.py", arguments.model, ("harness", "end_to_end", "step_profile"))
        for group, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]  # fmt: skip
    print(harness.markdown(rows, ["part", "seconds", "share", "gflops"]))
    harness.update_csv("step_profile", rows, ("model", "part"))


if __name__ == "__main__":
    main()
