"""The weighted fused loss inside training programs of others."""
