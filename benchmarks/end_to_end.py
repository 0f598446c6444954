"""Scoring and training of a real model on real text: our loss against the path that transformers takes.

    python benchmarks/end_to_end.py score --model MODEL --samples 512 --part 1/4     (2/4, 3/4, 4/4: minutes each)
    python benchmarks/end_to_end.py train --model MODEL --steps 2
    python benchmarks/end_to_end.py exact --model MODEL --samples 16
    python benchmarks/end_to_end.py train --model MODEL --device cuda --batch-tokens 16384

Both sides are `flow_finetune`'s own scoring and training steps on the same batches, in turn, in one process; only the
loss differs. The baseline is what `AutoModelForCausalLM` does with labels: logits of every position, in the body's
precision, widened to fp32, then `F.cross_entropy`. `--baseline targets` spares it the positions without a target. `exact`
says how far the losses of both are from fp64 arithmetic on the same hidden states.

Parts are every M-th batch of one run; their sums are printed and written to results/end_to_end.csv when the last is in.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from flow_finetune.batches import token_batches
from flow_finetune.config import DataConfig, ModelConfig, TrainConfig
from flow_finetune.data import Batch, Sample, collate, load_samples
from flow_finetune.methods import Weights
from flow_finetune.models import CausalLM, autocast, load_model
from flow_finetune.train import Meter, accumulate_gradients, make_optimizer, step_plan
from torch import Tensor

import flow_kernels

KEYS = ("program", "device", "baseline", "model", "samples", "batch_tokens")


class EagerCausalLM(CausalLM):
    """The same model with the loss of transformers: full logits, fp32, `F.cross_entropy`."""

    targets_only = False

    def _losses(self, batch: Batch) -> Tensor:
        if self.targets_only:
            logits = self.head(self.target_hidden(batch)).float()
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return F.cross_entropy(logits, batch.target, reduction="none")
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = self.model(**inputs, use_cache=False).logits.float()
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


def clock(device: torch.device) -> float:
    """Seconds, when all that has been asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _sample_means(scores: flow_kernels.TokenScores, batch: Batch) -> Tensor:
    sums = flow_kernels.sum_samples(scores, batch.target, batch.cu_seqlens)
    return sums.loss_sum / sums.num_targets


def bench_score(lm: CausalLM, eager: CausalLM, samples, arguments) -> dict:
    """Every batch of the part through both, the order swapped from batch to batch."""
    number, parts = (int(word) for word in arguments.part.split("/"))
    batches = token_batches([len(s.input_ids) for s in samples], arguments.batch_tokens)[number - 1 :: parts]
    sides, device = [("flow", lm), ("transformers", eager)], next(lm.parameters()).device
    for _, side in sides:  # warm: thread pools, kernels made for the shapes
        with autocast(device, "bf16"):
            side.score(collate([samples[i] for i in batches[-1]], 0).to(device))
    seconds, differences, num_tokens, num_targets = dict.fromkeys(dict(sides), 0.0), [], 0, 0
    for number, indices in enumerate(batches):
        batch = collate([samples[i] for i in indices], 0).to(device)
        means = {}
        for name, side in sides if number % 2 else sides[::-1]:
            started = clock(device)
            with autocast(device, "bf16"):
                scores = side.score(batch)
            means[name] = _sample_means(scores, batch)
            seconds[name] += clock(device) - started
        differences.append((means["flow"] - means["transformers"]).cpu())
        num_tokens += int(batch.attention_mask.sum())
        num_targets += len(batch.target)
    return _part(num_tokens, num_targets, seconds, torch.cat(differences))


def bench_train(lm: CausalLM, eager: CausalLM, samples, arguments) -> dict:
    """Optimiser steps on a copy each, the order swapped from step to step, after a pass of each that is not timed.

    The losses of the first step are compared, where the weights are equal.
    """
    config = TrainConfig(micro_batch_tokens=arguments.batch_tokens, learning_rate=1e-5)
    weights = Weights(torch.linspace(0.2, 0.6, len(samples)), None, None, 0.4, float(len(samples)))
    model_config = ModelConfig("", precision="bf16")
    device = next(lm.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu")
    sides = {"flow": lm.train(), "transformers": eager.train()}
    lm.shares_tied_gradient = True  # as training sets it
    optimizers = {name: make_optimizer(side, config, config.learning_rate) for name, side in sides.items()}
    seconds, losses = dict.fromkeys(sides, 0.0), {name: [] for name in sides}
    num_tokens = num_targets = 0
    plan = step_plan(len(samples), config)[: arguments.steps]
    for side in sides.values():  # warm: thread pools, kernels made for the shapes, the memory of the gradients
        accumulate_gradients(side, samples, plan[0], weights, accelerator, config, model_config, Meter())
        side.zero_grad()
    for number, indices in enumerate(plan):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            side, meter = sides[name], Meter()
            started = clock(device)
            accumulate_gradients(side, samples, indices, weights, accelerator, config, model_config, meter)
            torch.nn.utils.clip_grad_norm_(side.parameters(), config.max_grad_norm)
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name] += clock(device) - started
            losses[name].append(float(meter.weighted_sum) / meter.num_targets)
        num_tokens += sum(len(samples[i].input_ids) for i in indices)
        num_targets += sum(samples[i].num_targets for i in indices)
        print(f"step {number + 1}: losses {losses}, seconds so far {seconds}", flush=True)
    return _part(
        num_tokens, num_targets, seconds, torch.tensor([losses["flow"][0] - losses["transformers"][0]])
    ) | {"steps": min(arguments.steps, len(losses["flow"]))}  # fmt: skip


def exact(lm: CausalLM, eager: CausalLM, samples, arguments) -> None:
    """Print the largest error of a sample's mean loss on both sides, against fp64 of the same bf16 hidden states."""
    if lm.softcap or lm.head.bias is not None:
        raise SystemExit(f"{arguments.model} has a soft-cap or a bias behind its head, which the fp64 losses here lack")
    errors = {"flow": [], "transformers": []}
    weight = lm.head.weight.to(torch.bfloat16).double()
    for indices in token_batches([len(s.input_ids) for s in samples], arguments.batch_tokens):
        batch = collate([samples[i] for i in indices], 0)
        with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
            hidden = lm.target_hidden(batch).to(torch.bfloat16)
            found = {"flow": lm.score(batch), "transformers": eager.score(batch)}
        rows = [
            F.cross_entropy(h.double() @ weight.T, t, reduction="none")
            for h, t in zip(hidden.split(64), batch.target.split(64), strict=True)
        ]
        truth = _sample_means(flow_kernels.TokenScores(torch.cat(rows), torch.zeros(len(batch.target))), batch)
        for name, scores in found.items():
            errors[name].append(_sample_means(scores, batch) - truth)
    row = {"model": Path(arguments.model).name, "samples": len(samples)}
    for name, parts in errors.items():
        row[f"{name}_largest_error"] = f"{float(torch.cat(parts).abs().max()):.1e}"
        row[f"{name}_mean_error"] = f"{float(torch.cat(parts).mean()):.1e}"
    row |= harness.provenance_of_model("end_to_end.py", arguments.model)
    print(row)
    harness.update_csv("end_to_end_exact", [row], ("model", "samples"))


def _part(num_tokens: int, num_targets: int, seconds: dict[str, float], differences: Tensor) -> dict:
    return {
        "tokens": num_tokens,
        "targets": num_targets,
        "flow_seconds": round(seconds["flow"], 2),
        "transformers_seconds": round(seconds["transformers"], 2),
        "compared": len(differences),
        "difference_sum": f"{float(differences.double().sum()):.3e}",
        "largest_difference": f"{float(differences.abs().max()):.1e}",
    }


def total(parts: list[dict]) -> dict:
    """One row for a run from the rows of its parts: tokens per second of both sides, their ratio, the losses apart."""

    def sums(column):
        return sum(float(part[column]) for part in parts)

    tokens, flow_s, other_s = sums("tokens"), sums("flow_seconds"), sums("transformers_seconds")
    return {
        "tokens": int(tokens),
        "targets": int(sums("targets")),
        "flow_tokens_per_second": round(tokens / flow_s, 1),
        "transformers_tokens_per_second": round(tokens / other_s, 1),
        "ratio": round(other_s / flow_s, 3),
        "ratio_of_each_part": " ".join(
            f"{float(p['transformers_seconds']) / float(p['flow_seconds']):.2f}" for p in parts
        ),
        # The baseline rounds its logits to bf16: single samples move by that, their mean hardly.
        "mean_loss_difference": f"{abs(sums('difference_sum')) / sums('compared'):.1e}",
        "largest_loss_difference": max((p["largest_difference"] for p in parts), key=float),
        "commit": " ".join(dict.fromkeys(part["commit"] for part in parts)),
    }


def load(model: str, data: str, limit: int, device: str = "cpu") -> tuple[CausalLM, list[Sample]]:
    """The model and the first `limit` samples of a file of questions and answers."""
    # Both sides see the same padded batches: what is compared is the head and the loss.
    lm, tokenizer = load_model(ModelConfig(model, device=device, packing=False))
    config = DataConfig(data, prompt_field="question", response_field="answer", limit=limit)
    return lm, load_samples(config, tokenizer).samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("score", "train", "exact"))
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--data", default="examples/data/gsm8k_train.jsonl.gz")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--part", default="1/1", help="score: the K-th of M parts of the batches, K/M")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--grad-filter-eps", type=float, default=0.0, help="train: of our loss")
    parser.add_argument("--baseline", choices=("all", "targets"), default="all", help="positions it makes logits of")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, help="folder of the records; benchmarks/results if not given")
    arguments = parser.parse_args()
    if arguments.program == "exact" and arguments.device != "cpu":
        parser.error("exact compares with fp64 on the CPU; leave --device out")
    harness.RESULTS = arguments.results or harness.RESULTS
    lm, samples = load(arguments.model, arguments.data, arguments.samples, arguments.device)
    lm.grad_filter_eps = arguments.grad_filter_eps
    # Scoring shares the weights; training changes them, so each side has its own.
    eager = EagerCausalLM(copy.deepcopy(lm.model) if arguments.program == "train" else lm.model).eval()
    eager.targets_only = arguments.baseline == "targets"
    if arguments.program == "exact":
        exact(lm, eager, samples, arguments)
        return
    about = {
        "program": arguments.program + (f", grad_filter_eps {lm.grad_filter_eps:.1e}" if lm.grad_filter_eps else ""),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "baseline": arguments.baseline, "model": Path(arguments.model).name,
        "samples": len(samples), "batch_tokens": arguments.batch_tokens, "part": arguments.part,
    }  # fmt: skip
    row = {"score": bench_score, "train": bench_train}[arguments.program](lm, eager, samples, arguments)
    print(about | row)
    harness.update_csv(
        "end_to_end_parts",
        [about | row | harness.provenance_of_model("end_to_end.py", arguments.model)],
        (*KEYS, "part"),
    )
    parts = [
        part for part in harness.read_csv("end_to_end_parts")
        if all(part[k] == str(about[k]) for k in KEYS) and part["part"].split("/")[1] == arguments.part.split("/")[1]
    ]  # fmt: skip
    if len(parts) == int(arguments.part.split("/")[1]):
        about["part"] = f"all {len(parts)}"
        print(total(parts))
        source = harness.provenance_of_model("end_to_end.py", arguments.model)
        # The parts may be of several commits, of which this process has the last.
        harness.update_csv("end_to_end", [about | source | total(parts)], KEYS)


if __name__ == "__main__":
    main()
