"""What makes a training step shorter: optimiser steps of flow_finetune's own loop with each option, in turn.

    python benchmarks/step_options.py --model MODEL --data gsm8k_train.jsonl.gz

Into results/step_options.csv. "two gradients of the tied matrix" is what autograd makes of a head that is the embeddings'
matrix too, and what the loop made before it added the batch's rows to the head's gradient (flow_finetune/tied.py).
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import harness
from end_to_end import load
from flow_finetune.compiled_layers import compile_layers, uncompiled
from flow_finetune.config import TrainConfig
from flow_finetune.train import step_plan
from step_profile import optimiser_steps

# The first is what the others are compared with.
OPTIONS = {
    "--no-packing": {"packing": False},
    "plain": {},
    "--no-packing, two gradients of the tied matrix": {"packing": False, "tied": False},
    "--no-packing --compile": {"packing": False, "compile": True},
    "--no-packing --compile --grad-filter-eps 2**-20": {"packing": False, "compile": True, "grad_filter_eps": 2.0**-20},
    "--compile": {"compile": True},
    "--compile --grad-filter-eps 2**-20": {"compile": True, "grad_filter_eps": 2.0**-20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--data", default="examples/data/gsm8k_train.jsonl.gz")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further round is begun")
    arguments = parser.parse_args()
    config = TrainConfig(micro_batch_tokens=arguments.batch_tokens)
    lm, samples = load(arguments.model, arguments.data, config.batch_size)
    step = optimiser_steps(lm, samples, step_plan(len(samples), config), config)
    compile_layers(lm.model)

    def with_options(
        packing: bool = True, tied: bool = True, compile: bool = False, grad_filter_eps: float = 0.0
    ) -> None:
        lm.packing, lm.shares_tied_gradient, lm.grad_filter_eps = packing, tied, grad_filter_eps
        with contextlib.nullcontext() if compile else uncompiled(lm.model):
            step(0)

    calls = {name: lambda options=options: with_options(**options) for name, options in OPTIONS.items()}
    for name, call in calls.items():
        for _ in range(3 if "--compile" in name else 1):  # one shape, then any: layers are compiled twice
            call()
    times = harness.interleave(calls, arguments.repetitions, arguments.budget)
    first = times[next(iter(OPTIONS))]
    about = {
        "model": Path(arguments.model).name, "batch_tokens": arguments.batch_tokens,
        "tokens": sum(len(s.input_ids) for s in samples), "targets": sum(s.num_targets for s in samples),
    }  # fmt: skip
    provenance = harness.provenance_of_model(
        "step_options.py", arguments.model, ("harness", "end_to_end", "step_profile", "step_options")
    )
    rows = [
        about | {"options": name} | harness.summary(times[name]) | harness.paired_ratio(times[name], first) | provenance
        for name in OPTIONS
    ]  # fmt: skip
    print(
        harness.markdown(
            rows, ["options", "median_s", "min_s", "cpu_s", "paired_first_case", "paired_low", "paired_high"]
        )
    )
    harness.update_csv("step_options", rows, ("model", "batch_tokens", "options"))


if __name__ == "__main__":
    main()
