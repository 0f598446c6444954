"""The weighted fused loss, and weights for it, inside training programs of others."""

from flow_finetune.integrations.sample_weights import add_sample_weights, sample_losses
from flow_finetune.integrations.trainer import use_weighted_loss

__all__ = ["add_sample_weights", "sample_losses", "use_weighted_loss"]
