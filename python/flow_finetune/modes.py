"""Eval mode for a while."""

from __future__ import annotations

import contextlib

from torch import nn


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """Eval mode, and afterwards the mode of every module as it was."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
