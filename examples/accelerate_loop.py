"""Keep your accelerate loop: the weighted loss with gradient accumulation, in one process or several.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py     # accelerate launch, where there are several GPUs

One optimiser step minimises `sum of weight * nll / target tokens of the whole step`, into however many equal parts it is divided: the
normalizer is that count over all micro-batches and processes, and what is averaged afterwards, over micro-batches by
accelerate's `backward` and over processes by DDP, is multiplied back. The count needs the step's micro-batches before the
first of them is trained on, so they are taken from the data loader together; accelerate, which would end a step where
the loader ends, is told not to look at it.
"""

import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flow_kernels import flow_weights, linear_cross_entropy, linear_score_samples


class Model(nn.Module):
    """A toy language model; DDP wants the loss inside `forward`."""

    def __init__(self, vocabulary: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, labels, weights, normalizer):
        return linear_cross_entropy(
            self.body(tokens), self.head.weight, labels, sample_weight=weights, normalizer=normalizer, shift=True
        )


def main(num_steps: int = 30, gradient_accumulation_steps: int = 4, samples_per_step: int = 16) -> list[float]:
    """Returns the weighted loss of every optimiser step, in nats per target token."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    parts = accelerator.num_processes * gradient_accumulation_steps
    if samples_per_step % parts:
        # accelerate counts micro-batches, so every process needs as many in every step.
        raise ValueError(f"samples_per_step must be a multiple of {parts}, got {samples_per_step}")
    model = Model().to(accelerator.device)
    tokens = torch.randint(0, 1000, (32, 12), device=accelerator.device)
    labels = tokens.clone()
    labels[:, :4] = -100  # the prompt has no loss
    labels[::3, 8:] = -100  # and responses differ in length

    with torch.no_grad():
        scores = linear_score_samples(model.body(tokens), model.head.weight, labels, shift=True)
    weights = flow_weights(scores.loss_sum / scores.num_targets)

    # Every step takes as many batches in every process: an incomplete one at the end is left out.
    loader = DataLoader(TensorDataset(tokens, labels, weights), batch_size=samples_per_step // parts, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=5.0), loader)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    losses = []
    for _ in range(num_steps):
        step = list(itertools.islice(batches, gradient_accumulation_steps))
        num_targets = accelerator.reduce(sum((batch[1][:, 1:] != -100).sum() for batch in step), "sum")
        total = torch.zeros((), device=accelerator.device)
        for batch in step:
            with accelerator.accumulate(model):
                loss = model(*batch, num_targets)
                accelerator.backward(loss * accelerator.num_processes * gradient_accumulation_steps)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        losses.append(accelerator.reduce(total, "sum").item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"weighted loss {losses[0]:.3f} -> {losses[-1]:.3f} nats/token")
