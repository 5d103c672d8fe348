"""MindVL's forward pass as an engineer writes it for torch_npu: the fused calls, packed attention by lengths,
parameters a layer apart.

B rows, T tokens, P patches, N query heads, K key/value heads, H head dim, D width.
"""

import torch
import torch.nn.functional as F
import torch_npu

from mindvl_jax.models.mindvl.vision import IMAGE_MEAN, IMAGE_STD
from npu_bridge.kernels.attention import COMPRESSED, cumulative_lengths


class Handwritten:
    """`loss()` is the mean over labelled tokens of one batch; `leaves` are its parameters, stacked ones taken apart by
    layer.
    """

    def __init__(self, config, parameters, batch, device="npu"):
        self.config, vision, text = config, config.vision, config.text

        def put(x):
            return torch.tensor(x).to(device)

        depth = {"vision/blocks": vision.depth, "language/layers": text.num_layers}
        self.leaves = {}
        for path, value in parameters.items():
            stack = next((name for name in depth if path.startswith(name)), None)
            parts = (
                {path: value} if stack is None else {f"{path}@{layer}": value[layer] for layer in range(depth[stack])}
            )
            self.leaves |= {name: put(part).requires_grad_() for name, part in parts.items()}
        self.tokens, self.targets, self.weights = put(batch.tokens), put(batch.targets).long(), put(batch.loss_weights)
        index = put(batch.visual_index).long()
        self.is_visual, self.visual_index = (index >= 0)[..., None], index.clamp(min=0)[..., None]
        pixels = put(batch.patches).float().unflatten(-1, (vision.in_channels, -1)) / 255
        mean, std = (put(list(x))[:, None] for x in (IMAGE_MEAN, IMAGE_STD))
        self.pixels = ((pixels - mean) / std).flatten(2)

        def ends(lengths, places):
            return cumulative_lengths(torch.tensor(lengths), places)

        self.segments = ends(batch.segment_lengths, batch.tokens.shape[1])
        self.images, self.windows = (
            ends(x, batch.patches.shape[1]) for x in (batch.image_lengths, batch.window_lengths)
        )
        self.triangle = torch.triu(torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool), 1).to(device)
        self.vision_tables = vision_tables(
            put(batch.patch_positions), vision.hidden_size // vision.num_heads, vision.rope_theta
        )
        self.text_tables = text_tables(put(batch.positions), text.head_dim, text.rope_theta, text.mrope_section)

    def loss(self):
        p, text = self.leaves, self.config.text
        x = F.embedding(self.tokens, p["language/embed/embedding"])
        visual = self.project(self.see())
        x = torch.where(self.is_visual, visual.gather(1, self.visual_index.expand(-1, -1, visual.shape[-1])), x)
        for layer in range(text.num_layers):
            x = self.block(
                "language/layers",
                layer,
                x,
                self.text_tables,
                self.segments,
                text.num_heads,
                text.num_kv_heads,
                text.rms_norm_eps,
                causal=True,
            )
        x = self.norm("language/norm/scale", x, text.rms_norm_eps)
        losses = F.cross_entropy(
            (x @ p["language/head/kernel"]).flatten(0, 1), self.targets.flatten(), reduction="none"
        ).view_as(self.weights)
        return (losses * self.weights).sum() / self.weights.sum()

    def see(self):
        vision = self.config.vision
        x = self.pixels @ self.leaves["vision/patch_embed/kernel"]
        for layer in range(vision.depth):
            ends = self.images if layer in vision.fullatt_block_indexes else self.windows
            x = self.block(
                "vision/blocks",
                layer,
                x,
                self.vision_tables,
                ends,
                vision.num_heads,
                vision.num_heads,
                vision.rms_norm_eps,
                causal=False,
            )
        return x

    def project(self, x):
        vision = self.config.vision
        x = self.norm("projector/norm/scale", x, vision.rms_norm_eps).view(
            x.shape[0], -1, vision.merge_unit * x.shape[-1]
        )
        x = torch_npu.npu_gelu(self.linear("projector/linear1", x), approximate="none")
        return self.linear("projector/linear2", x)

    def linear(self, path, x, layer=""):
        weight, bias = self.leaves[f"{path}/kernel{layer}"], self.leaves.get(f"{path}/bias{layer}")
        rows = x.flatten(0, -2)
        return (rows @ weight if bias is None else torch.addmm(bias, rows, weight)).view(*x.shape[:-1], -1)

    def norm(self, path, x, eps):
        return torch_npu.npu_rms_norm(x, self.leaves[path], eps)[0]

    def block(self, stack, layer, x, tables, ends, heads, kv_heads, eps, *, causal):
        at, own = f"{stack}/attention", f"@{layer}"
        h = self.norm(f"{stack}/norm1/scale{own}", x, eps)
        q, k, v = (
            self.linear(f"{at}/{name}", h, own).unflatten(-1, (n, -1))
            for name, n in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        if f"{at}/query_norm/scale{own}" in self.leaves:
            q, k = self.norm(f"{at}/query_norm/scale{own}", q, eps), self.norm(f"{at}/key_norm/scale{own}", k, eps)
        q, k = torch_npu.npu_rotary_mul(q, *tables), torch_npu.npu_rotary_mul(k, *tables)
        mask = dict(atten_mask=self.triangle, sparse_mode=3) if causal else {}
        out = torch_npu.npu_fusion_attention(
            *(y.flatten(0, 1) for y in (q, k, v)),
            heads,
            "TND",
            scale=q.shape[-1] ** -0.5,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            **mask,
        )[0]
        x = x + self.linear(f"{at}/output", out.view(*x.shape[:2], -1), own)
        h = self.norm(f"{stack}/norm2/scale{own}", x, eps)
        both = torch.cat((self.linear(f"{stack}/mlp/gate", h, own), self.linear(f"{stack}/mlp/up", h, own)), -1)
        return x + self.linear(f"{stack}/mlp/down", torch_npu.npu_swiglu(both), own)


def _tables(angles):
    both = torch.cat([angles, angles], -1)[:, :, None]
    return both.cos(), both.sin()


def text_tables(positions_B3T, head_dim, theta, sections):
    frequencies = (theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)).to(positions_B3T.device)
    angles = positions_B3T[..., None].float() * frequencies
    return _tables(torch.cat([part[:, row] for row, part in enumerate(angles.split(list(sections), -1))], -1))


def vision_tables(positions_BP2, head_dim, theta):
    """The first half of the angles is the height's, the second the width's."""
    frequencies = (theta ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))).to(positions_BP2.device)
    return _tables((positions_BP2[..., None].float() * frequencies).flatten(2))
