"""The weighted fused loss, and weights for it, inside training programs of others; it needs the extra `[train]`."""

try:
    from flow_finetune.integrations.collator import KeepWeights
    from flow_finetune.integrations.sample_weights import add_sample_weights, sample_losses
    from flow_finetune.integrations.trainer import use_weighted_loss
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"flow_finetune.integrations needs the package {error.name!r}; install its requirements with the extra [train], as "
        'in pip install --no-build-isolation ".[train]"',
        name=error.name,
    ) from error

__all__ = ["KeepWeights", "add_sample_weights", "sample_losses", "use_weighted_loss"]
