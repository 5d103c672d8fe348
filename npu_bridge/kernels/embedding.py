"""Embedding over one shard of the vocabulary. V rows of this shard, D model width."""

from __future__ import annotations

import torch

from npu_bridge.kernels.registry import register

_CALL = "torch.nn.functional.embedding(ids - first, table), masked"
_CALL_BACKWARD = "aten.embedding_dense_backward(g.float(), ids - first, V + 1, V, False)[:V]"


def _local(ids, first, rows):
    """Return row numbers inside this shard, and a mask of the ids that belong to it."""
    local = ids.long() - first
    return local, (local >= 0) & (local < rows)


@register(
    "embedding",
    family="embedding",
    call=_CALL,
    note="aclnnEmbedding; ids of other shards give zeros and the shards add up",
)
def embedding(table, ids, *, first=0):
    local, mine = _local(ids, first, table.shape[0])
    rows = torch.nn.functional.embedding(torch.where(mine, local, 0), table)
    return (rows.masked_fill(~mine[..., None], 0),)


@register(
    "embedding_backward",
    family="embedding",
    call=_CALL_BACKWARD,
    note="aclnnEmbeddingDenseBackward in float32; one spare row takes the ids of other shards",
)
def embedding_backward(g, ids, *, rows, first=0):
    local, mine = _local(ids, first, rows)
    spare = torch.where(mine, local, rows)
    return (torch.ops.aten.embedding_dense_backward(g.float(), spare, rows + 1, rows, False)[:rows],)
