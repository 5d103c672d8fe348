"""Masks that several calls of attention share."""

from __future__ import annotations

import torch

from npu_bridge.kernels.attention import forbidden


def math_attention_mask(
    ids_q: torch.Tensor,
    ids_kv: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    blocks: tuple[int, int, int],
    dtype: str,
) -> tuple[torch.Tensor]:
    """Additive attention mask: 0, or minus infinity where a query may not attend. ids (B, T), (B, S) -> (B * I, 1, C,
    S'), blocks as in `npu_bridge.kernels.attention`.
    """
    mask = forbidden(ids_q, ids_kv, (ids_q, ids_kv), causal=causal, window=window, blocks=blocks)
    return (torch.where(mask, float("-inf"), 0.0).to(getattr(torch, dtype)).flatten(0, 1)[:, None],)
