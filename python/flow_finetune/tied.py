"""The gradient of one matrix that is both a model's head and its embeddings, made once.

Autograd sums two gradients of the whole matrix: the head's, and the embeddings' of zeros but for the tokens of the batch.
Here the rows of those tokens are added to the head's gradient where it is; the sums are the same.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flow_finetune.trials import is_same, tried_once

if TYPE_CHECKING:
    from flow_finetune.models import CausalLM


class _RowsAndMatrix(torch.autograd.Function):
    """Rows `ids` of a matrix, each id once, and the matrix itself, of which one gradient comes back."""

    @staticmethod
    def forward(ctx, matrix: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.shape = matrix.shape
        return matrix.index_select(0, ids), matrix.view_as(matrix)

    @staticmethod
    def backward(ctx, drows: Tensor | None, dmatrix: Tensor | None) -> tuple[Tensor | None, None]:
        if drows is None:
            return dmatrix, None
        if dmatrix is None:
            dmatrix = drows.new_zeros(ctx.shape)
        # In place: the head's gradient has no other use, and flow_kernels hands out one that may be written to.
        return dmatrix.index_add_(0, *ctx.saved_tensors, drows.to(dmatrix.dtype)), None


def tied_embedding(lm: CausalLM) -> nn.Embedding | None:
    """The embeddings whose trained matrix is the head's too, where one gradient can serve both; else None."""
    embedding = lm.model.get_input_embeddings()
    # Embeddings that do more with their matrix than look up rows keep their own gradient.
    if (
        not isinstance(embedding, nn.Embedding)
        or embedding.max_norm
        or embedding.scale_grad_by_freq
        or embedding.sparse
    ):
        return None
    if embedding.weight is not lm.head.weight or not embedding.weight.requires_grad or not torch.is_grad_enabled():
        return None
    return embedding if _takes_embeddings(lm) else None


def embed(embedding: nn.Embedding, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `embedding` makes of `input_ids` `[B, T]`, and its matrix `[V, D]` for the head: a gradient that both share."""
    ids, places = input_ids.unique(return_inverse=True)
    rows, matrix = _RowsAndMatrix.apply(embedding.weight, ids)
    if embedding.padding_idx is not None:
        # Its row gets no gradient from the embeddings; the index is one of the whole matrix.
        rows = torch.where((ids == embedding.padding_idx)[:, None], rows.detach(), rows)
    with _without_padding(embedding):
        # The module itself: it may scale what it looks up.
        return torch.func.functional_call(embedding, {"weight": rows}, (places,)), matrix


@contextlib.contextmanager
def _without_padding(embedding: nn.Embedding):
    index, embedding.padding_idx = embedding.padding_idx, None
    try:
        yield
    finally:
        embedding.padding_idx = index


@tried_once
def _takes_embeddings(lm: CausalLM) -> bool:
    """Whether the body makes of embeddings what it makes of tokens, and of any embeddings: some look at the tokens."""
    body, embedding = lm.model.base_model, lm.model.get_input_embeddings()
    # Two only: a body that finds the tokens again compares each with the whole matrix.
    ids = torch.tensor([[7, 3]], device=embedding.weight.device)
    try:
        expected = body(input_ids=ids, use_cache=False).last_hidden_state
        embedded, _ = embed(embedding, ids)
        found = body(inputs_embeds=embedded, use_cache=False).last_hidden_state
        body(inputs_embeds=embedded * 1.5 + 0.1, use_cache=False)  # those of no token
    except Exception:  # whatever a model without such an argument raises; tokens serve every model
        return False
    return is_same(found, expected)
