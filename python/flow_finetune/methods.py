"""From a method and the pre-trained losses to the weight of every sample or token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import flow_kernels
from flow_finetune.config import MethodConfig, choose
from flow_finetune.errors import InputError
from flow_finetune.scores import Scores


@dataclass(frozen=True)
class Weights:
    """The weights of a training set: one tensor entry per sample, or one per target token of each sample."""

    per_sample: Tensor | None  # [S] fp32
    per_token: list[Tensor] | None  # [num_targets] fp32 each
    temperature: float | None
    mean: float  # over what carries the weights
    effective_sample_size: float

    def of(self, indices: list[int]) -> Tensor:
        """The `sample_weight` of a batch of these samples: per sample, or per target token in a row."""
        if self.per_token is not None:
            return torch.cat([self.per_token[i] for i in indices])
        return self.per_sample[indices].clone()


# What a name alone stands for; a configuration file describes any other.
_BY_NAME = {"standard": "none", "flow": "sequence", "flow-token": "token"}


def named_method(name: str) -> MethodConfig:
    """The method of that name with its defaults."""
    return MethodConfig(name=name, weights=_BY_NAME[choose("--method", name, tuple(_BY_NAME))])


def needs_scores(method: MethodConfig) -> bool:
    """Whether a method weights by pre-trained losses."""
    return choose(f"method {method.name}: weights", method.weights, ("none", "sequence", "token")) != "none"


def make_weights(method: MethodConfig, num_samples: int, scores: Scores | None) -> Weights:
    """The weights that `method` gives to `num_samples` samples.

    Raises:
        InputError: too few losses for a temperature, a temperature of 0, or options out of range.
    """
    if not needs_scores(method):
        return Weights(torch.ones(num_samples), None, None, 1.0, float(num_samples))
    by_token = method.weights == "token"
    losses = torch.from_numpy(np.concatenate(scores.token_losses)).double() if by_token else scores.loss
    clip = None if method.clip_low is None and method.clip_high is None else (method.clip_low, method.clip_high)
    try:
        tau = method.temperature
        if tau is None:
            tau = float(flow_kernels.temperature(losses, quantile=method.quantile))
        weights = flow_kernels.flow_weights(losses, tau, clip=clip, normalize=method.normalize).float()
    except ValueError as error:
        raise InputError(f"method {method.name}: {error}") from error
    mean, size = float(weights.double().mean()), float(flow_kernels.effective_sample_size(weights))
    if by_token:
        parts = list(weights.split([len(values) for values in scores.token_losses]))
        return Weights(None, parts, tau, mean, size)
    return Weights(weights, None, tau, mean, size)
