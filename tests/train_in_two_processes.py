"""Run by test_processes under torchrun: a run with dropout killed at its first checkpoint, and a model with a vision part."""

import contextlib
import os
import sys
from pathlib import Path

import torch
from flow_finetune.checkpoint import TrainDirectory
from flow_finetune.config import DataConfig, MethodConfig, ModelConfig, TrainConfig
from flow_finetune.data import load_samples
from flow_finetune.models import load_model
from flow_finetune.train import train

# log_every is no divisor of checkpoint_every: the sums of an unfinished interval are part of a checkpoint.
CONFIG = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3, checkpoint_every=2, log_every=3)


class Killed(Exception):
    """Raised where a run is to end."""


def fine_tune(root: Path, model: str, output: str) -> None:
    """Plain fine-tuning of `root/model` into `root/output`."""
    config = ModelConfig(str(root / model), precision="full", device="cpu")
    lm, tokenizer = load_model(config)
    samples = load_samples(DataConfig(str(root / "data.jsonl"), template="{prompt}"), tokenizer)
    method = MethodConfig("standard", weights="none")
    train(lm, tokenizer, samples, root / output, method=method, config=CONFIG, model_config=config)


def main(root: Path) -> None:
    """All runs."""
    torch.set_num_threads(1)
    fine_tune(root, "gpt2", "undisturbed")
    save = TrainDirectory.save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        raise Killed

    TrainDirectory.save_checkpoint = save_and_die
    for output in ("continued", "left"):
        with contextlib.suppress(Killed):
            fine_tune(root, "gpt2", output)
    TrainDirectory.save_checkpoint = save
    fine_tune(root, "gpt2", "continued")
    fine_tune(root, "gemma3", "multimodal")
    torch.distributed.barrier()
    # Not through Gloo's destructor, which can wait for the GIL for ever.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
