"""Cross-entropy with one weight per sample, scoring, FLOW weights, and attention in packed rows, as PyTorch operators."""

from flow_kernels.attention import packed_attention
from flow_kernels.backends import BackendUnavailable
from flow_kernels.losses import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from flow_kernels.scoring import (
    SampleScores,
    SampleWeights,
    TokenEntropies,
    TokenScores,
    linear_score_samples,
    linear_score_tokens,
    score_samples,
    score_tokens,
    sum_samples,
    weigh_samples,
)
from flow_kernels.weighting import effective_sample_size, flow_weights, temperature

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "SampleScores",
    "SampleWeights",
    "TokenEntropies",
    "TokenScores",
    "cross_entropy",
    "effective_sample_size",
    "flow_weights",
    "linear_cross_entropy",
    "linear_score_samples",
    "linear_score_tokens",
    "packed_attention",
    "score_samples",
    "score_tokens",
    "sum_samples",
    "temperature",
    "weigh_samples",
]
