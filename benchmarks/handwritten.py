"""The model written by hand in torch for one device: torch's fused calls, masks computed once, no framework.

It reads our parameters by path and computes on the packed batch: the code that the bridge replaces.
B rows, T tokens, P patches, N query heads, K key/value heads, H head dim, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

from mindvl_jax.config.schema import OptimizerConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.mindvl.vision import IMAGE_MEAN, IMAGE_STD
from mindvl_jax.models.vision_language.batch import Batch

Tensors = dict[str, torch.Tensor]


class Handwritten:
    """Parameters and the constants of one batch; `loss()` is the mean over labelled tokens."""

    def __init__(
        self, config: MindVLConfig, parameters: Mapping[str, np.ndarray], batch: Batch, *, device: str = "cpu"
    ):
        self.config, self.device = config, device
        self.parameters: Tensors = {
            path: torch.tensor(np.asarray(value), device=device, requires_grad=True)
            for path, value in parameters.items()
        }

        def put(x):
            return torch.tensor(np.asarray(x), device=device)

        self.tokens, self.targets, self.weights = (
            put(batch.tokens).long(),
            put(batch.targets).long(),
            put(batch.loss_weights),
        )
        vision, text = config.vision, config.text
        self.pixels = _normalised(put(batch.patches), vision)
        segments = put(batch.segment_ids)
        T = segments.shape[1]
        self.causal = _same(segments) & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        self.image, self.window = _same(put(batch.patch_segment_ids)), _same(put(batch.patch_window_ids))
        self.vision_tables = _vision_tables(
            put(batch.patch_positions), vision.hidden_size // vision.num_heads, vision.rope_theta
        )
        self.text_tables = _text_tables(
            put(batch.positions), text.head_dim, text.rope_theta, text.mrope_section if text.rope == "mrope" else None
        )
        index = put(batch.visual_index).long()
        self.is_visual, self.visual_index = (index >= 0)[..., None], index.clamp(min=0)[..., None]

    def loss(self) -> torch.Tensor:
        p, config = self.parameters, self.config
        x = F.embedding(self.tokens, p["language/embed/embedding"])
        visual = self._project(self._see())
        x = torch.where(self.is_visual, visual.gather(1, self.visual_index.expand(-1, -1, visual.shape[-1])), x)
        text = config.text
        for layer in range(text.num_layers):
            x = x + self._attend(
                "language/layers",
                layer,
                x,
                self.text_tables,
                self.causal,
                text.num_heads,
                text.num_kv_heads,
                text.rms_norm_eps,
            )
            x = x + self._feed_forward("language/layers", layer, x, text.rms_norm_eps)
        x = F.rms_norm(x, x.shape[-1:], p["language/norm/scale"], text.rms_norm_eps)
        head = p["language/embed/embedding"].T if text.tie_word_embeddings else p["language/head/kernel"]
        losses = F.cross_entropy((x @ head).flatten(0, 1).float(), self.targets.flatten(), reduction="none").view_as(
            self.weights
        )
        return (losses * self.weights).sum() / self.weights.sum()

    def _see(self) -> torch.Tensor:
        vision = self.config.vision
        x = self.pixels @ self.parameters["vision/patch_embed/kernel"]
        for layer in range(vision.depth):
            mask = self.image if layer in vision.fullatt_block_indexes else self.window
            x = x + self._attend(
                "vision/blocks",
                layer,
                x,
                self.vision_tables,
                mask,
                vision.num_heads,
                vision.num_heads,
                vision.rms_norm_eps,
            )
            x = x + self._feed_forward("vision/blocks", layer, x, vision.rms_norm_eps)
        return x

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        p = self.parameters
        x = F.rms_norm(x, x.shape[-1:], p["projector/norm/scale"], self.config.vision.rms_norm_eps)
        x = x.view(x.shape[0], -1, self.config.vision.merge_unit * x.shape[-1])
        x = F.gelu(x @ p["projector/linear1/kernel"] + p["projector/linear1/bias"])
        return x @ p["projector/linear2/kernel"] + p["projector/linear2/bias"]

    def _linear(self, path: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        bias = self.parameters.get(f"{path}/bias")
        y = x @ self.parameters[f"{path}/kernel"][layer]
        return y if bias is None else y + bias[layer]

    def _attend(self, stack: str, layer: int, x, tables, mask, heads: int, kv_heads: int, eps: float) -> torch.Tensor:
        p, at = self.parameters, f"{stack}/attention"
        x = F.rms_norm(x, x.shape[-1:], p[f"{stack}/norm1/scale"][layer], eps)
        q, k, v = (
            self._linear(f"{at}/{name}", layer, x).unflatten(-1, (count, -1))
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        if f"{at}/query_norm/scale" in p:
            q = F.rms_norm(q, q.shape[-1:], p[f"{at}/query_norm/scale"][layer], eps)
            k = F.rms_norm(k, k.shape[-1:], p[f"{at}/key_norm/scale"][layer], eps)
        q, k = _turn(q, *tables), _turn(k, *tables)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=heads != kv_heads
        )
        return self._linear(f"{at}/output", layer, out.transpose(1, 2).flatten(2))

    def _feed_forward(self, stack: str, layer: int, x, eps: float) -> torch.Tensor:
        x = F.rms_norm(x, x.shape[-1:], self.parameters[f"{stack}/norm2/scale"][layer], eps)
        return self._linear(
            f"{stack}/mlp/down",
            layer,
            F.silu(self._linear(f"{stack}/mlp/gate", layer, x)) * self._linear(f"{stack}/mlp/up", layer, x),
        )


def _same(ids_BT: torch.Tensor) -> torch.Tensor:
    """Segment mask (B, 1, T, T); padding attends to itself, because an empty softmax is NaN."""
    same = (ids_BT[:, :, None] == ids_BT[:, None, :]) & (ids_BT[:, :, None] > 0)
    return (same | torch.eye(ids_BT.shape[1], dtype=torch.bool, device=ids_BT.device))[:, None]


def _turn(x_BTNH, cos, sin):
    half = x_BTNH.shape[-1] // 2
    return (x_BTNH * cos + torch.cat([-x_BTNH[..., half:], x_BTNH[..., :half]], -1) * sin).to(x_BTNH.dtype)


def _tables(angles: torch.Tensor):
    both = torch.cat([angles, angles], -1)[:, :, None]
    return both.cos(), both.sin()


def _text_tables(positions_B3T, head_dim: int, theta: float, sections):
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions_B3T.device).float() / head_dim)
    angles = positions_B3T[..., None].float() * frequencies
    if sections is None:
        return _tables(angles[:, 0])
    return _tables(torch.cat([part[:, row] for row, part in enumerate(angles.split(list(sections), -1))], -1))


def _vision_tables(positions_BP2, head_dim: int, theta: float):
    """Rotary tables of the vision tower: the first half of the angles is for the height, the second for the width."""
    frequencies = theta ** -(torch.arange(0, head_dim // 2, 2, device=positions_BP2.device).float() / (head_dim // 2))
    return _tables((positions_BP2[..., None].float() * frequencies).flatten(2))


def _normalised(patches, config: VisionConfig) -> torch.Tensor:
    mean, std = (torch.tensor(x, device=patches.device)[:, None] for x in (IMAGE_MEAN, IMAGE_STD))
    pixels = patches.float().unflatten(-1, (config.in_channels, -1)) / 255
    return ((pixels - mean) / std).flatten(2)


def trainer(
    model: Handwritten, *, learning_rate: float, weight_decay: float, config: OptimizerConfig
) -> Callable[[], tuple[float, float]]:
    """Return a function that runs one step and returns (loss before the update, gradient norm)."""
    plain = [value for path, value in model.parameters.items() if path.endswith(("scale", "bias"))]
    decayed = [value for path, value in model.parameters.items() if not path.endswith(("scale", "bias"))]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)],
        lr=learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        fused=True,
    )
    everything = [*decayed, *plain]

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(everything, config.clip_norm)
        optimizer.step()
        return loss.detach().item(), norm.item()

    return step
