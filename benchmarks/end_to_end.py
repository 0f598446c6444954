"""Scoring and training of a real model on real text: our loss against the path that transformers takes.

    python benchmarks/end_to_end.py score --model MODEL --samples 512
    python benchmarks/end_to_end.py train --model MODEL --steps 4

Both sides are `flow_finetune`'s own scoring and training steps on the same batches, in turn, in one process; only the
loss differs. The baseline is what `AutoModelForCausalLM` does with labels: logits of every position, in the body's
precision, widened to fp32, then `F.cross_entropy`. Prints tokens/s of both, the ratio of their times, and how far
their losses are apart; writes a CSV row with the machine, the versions and the command to benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from flow_finetune.config import DataConfig, ModelConfig, TrainConfig
from flow_finetune.data import Batch, collate, load_samples, token_batches
from flow_finetune.methods import Weights
from flow_finetune.models import CausalLM, autocast, load_model
from flow_finetune.train import Meter, accumulate_gradients, make_optimizer, step_plan
from torch import Tensor

import flow_kernels

RESULTS = Path(__file__).parent / "results" / "end_to_end.csv"


class EagerCausalLM(CausalLM):
    """The same model with the loss of transformers: full logits, fp32, `F.cross_entropy`."""

    def _losses(self, batch: Batch) -> Tensor:
        logits = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits.float()
        labels = torch.full_like(batch.input_ids, -100).reshape(-1)
        labels[batch.positions] = batch.target
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, reduction="none")
        return losses[batch.positions]

    def forward(self, batch: Batch, weight: Tensor, normalizer: float | Tensor) -> Tensor:
        rows = weight.repeat_interleave(batch.cu_seqlens.diff())
        return (rows * self._losses(batch)).sum() / normalizer

    @torch.no_grad()
    def score(self, batch: Batch) -> flow_kernels.TokenScores:
        losses = self._losses(batch)
        return flow_kernels.TokenScores(losses, torch.zeros_like(losses, dtype=torch.bool))


def bench_score(lm: CausalLM, eager: CausalLM, samples, arguments) -> dict:
    """Every batch through both, the order swapped from batch to batch."""
    seconds, differences, num_tokens = {"flow": 0.0, "transformers": 0.0}, [], 0
    batches = token_batches([len(s.input_ids) for s in samples], arguments.batch_tokens)
    sides = [("flow", lm), ("transformers", eager)]
    with torch.no_grad():
        for number, indices in enumerate(batches):
            batch = collate([samples[i] for i in indices], 0)
            means = {}
            for name, side in sides if number % 2 else sides[::-1]:
                started = time.perf_counter()
                with autocast(torch.device("cpu"), "bf16"):
                    scores = side.score(batch)
                sums = flow_kernels.sum_samples(scores, batch.target, batch.cu_seqlens)
                seconds[name] += time.perf_counter() - started
                means[name] = sums.loss_sum / sums.num_targets
            differences.append(means["flow"] - means["transformers"])
            num_tokens += int(batch.attention_mask.sum())
    return _row("score", num_tokens, seconds, torch.cat(differences))


def bench_train(lm: CausalLM, eager: CausalLM, samples, arguments) -> dict:
    """Optimiser steps on a copy each, in turn; the losses are compared at the first step, from equal weights."""
    config = TrainConfig(micro_batch_tokens=arguments.batch_tokens, learning_rate=1e-5)
    weights = Weights(torch.linspace(0.2, 0.6, len(samples)), None, None, 0.4, float(len(samples)))
    model_config = ModelConfig("", precision="bf16")
    accelerator = Accelerator(cpu=True)
    sides = {"flow": lm.train(), "transformers": eager.train()}
    optimizers = {name: make_optimizer(side, config, config.learning_rate) for name, side in sides.items()}
    seconds, losses, num_tokens = dict.fromkeys(sides, 0.0), {name: [] for name in sides}, 0
    for indices in step_plan(len(samples), config)[: arguments.steps]:
        for name, side in sides.items():
            meter = Meter()
            started = time.perf_counter()
            accumulate_gradients(side, samples, indices, weights, accelerator, config, model_config, meter)
            torch.nn.utils.clip_grad_norm_(side.parameters(), config.max_grad_norm)
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name] += time.perf_counter() - started
            losses[name].append(float(meter.weighted_sum) / meter.num_targets)
        num_tokens += sum(len(samples[i].input_ids) for i in indices)
    difference = torch.tensor([losses["flow"][0] - losses["transformers"][0]])
    return _row("train", num_tokens, seconds, difference)


def _row(name: str, num_tokens: int, seconds: dict[str, float], differences: Tensor) -> dict:
    return {
        "program": name,
        "tokens": num_tokens,
        "flow_tokens_per_second": round(num_tokens / seconds["flow"], 1),
        "transformers_tokens_per_second": round(num_tokens / seconds["transformers"], 1),
        "ratio": round(seconds["transformers"] / seconds["flow"], 3),
        # The baseline rounds its logits to bf16: single samples move by that, their mean hardly.
        "mean_loss_difference": f"{abs(float(differences.mean())):.2e}",
        "largest_loss_difference": f"{float(differences.abs().max()):.2e}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("score", "train"))
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--data", default="examples/data/gsm8k_train.jsonl.gz")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    lm, tokenizer = load_model(ModelConfig(arguments.model, device="cpu"))
    config = DataConfig(arguments.data, prompt_field="question", response_field="answer", limit=arguments.samples)
    samples = load_samples(config, tokenizer).samples
    # Scoring shares the weights; training changes them, so each side has its own.
    eager = EagerCausalLM(copy.deepcopy(lm.model) if arguments.program == "train" else lm.model).eval()
    row = {"score": bench_score, "train": bench_train}[arguments.program](lm, eager, samples, arguments)
    row |= {
        "model": Path(arguments.model).name, "samples": len(samples), "cpu": _cpu_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "command": shlex.join(sys.argv),
    }  # fmt: skip
    for key, value in row.items():
        print(f"{key}: {value}")
    is_new = not RESULTS.exists()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
