"""Replace the loss of a training loop you already have: one weight per sample, and no logits held.

Before:  loss = F.cross_entropy(head(hidden).float().view(-1, V), labels.view(-1))
After:   loss = linear_cross_entropy(hidden, head.weight, labels, sample_weight=weights)

Scores a toy model once, makes FLOW weights from its losses, and trains with them.
"""

import torch
from torch import nn

from flow_kernels import flow_weights, linear_cross_entropy, linear_score_samples


def main(num_steps: int = 30) -> tuple[float, float]:
    """Returns the weighted loss of the first and of the last step, in nats per target token."""
    torch.manual_seed(0)
    num_samples, length, vocabulary, width = 16, 12, 1000, 64
    body = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.GELU())
    head = nn.Linear(width, vocabulary, bias=False)
    tokens = torch.randint(0, vocabulary, (num_samples, length))
    labels = tokens.clone()
    labels[:, :4] = -100  # the prompt has no loss

    # Once, before training: the pre-trained model's loss on every sample, and the weights it gives. In eval mode, since
    # dropout would make noise of both.
    body.eval()
    with torch.no_grad():
        scores = linear_score_samples(body(tokens), head.weight, labels, shift=True)
    body.train()
    weights = flow_weights(scores.loss_sum / scores.num_targets)

    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        # shift=True: position t predicts the label at t + 1, as in a language model.
        loss = linear_cross_entropy(body(tokens), head.weight, labels, sample_weight=weights, shift=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"weighted loss {first:.3f} -> {last:.3f} nats/token")
