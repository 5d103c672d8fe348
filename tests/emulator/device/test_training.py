"""A step of a small vision-language model written for torch_npu, through its own autograd, against plain torch on the
CPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import nn

WIDTH, HEADS, KEY_HEADS, DIM, INNER, VOCABULARY, ROWS, TOKENS = 32, 4, 2, 8, 48, 61, 2, 12


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.q, self.kv = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, 2 * KEY_HEADS * DIM)
        self.out, self.up, self.down = (
            nn.Linear(HEADS * DIM, WIDTH),
            nn.Linear(WIDTH, 2 * INNER),
            nn.Linear(INNER, WIDTH),
        )

    def forward(self, x, cos, sin, mask, fused):
        norm = (
            (lambda h, w: torch_npu.npu_rms_norm(h, w, 1e-6)[0])
            if fused
            else (lambda h, w: F.rms_norm(h, w.shape, w, 1e-6))
        )
        h = norm(x, self.first)
        q = self.q(h).view(ROWS, TOKENS, HEADS, DIM)
        k, v = (part.contiguous() for part in self.kv(h).view(ROWS, TOKENS, 2 * KEY_HEADS, DIM).chunk(2, 2))
        if fused:
            q, k = torch_npu.npu_rotary_mul(q, cos, sin), torch_npu.npu_rotary_mul(k, cos, sin)
            a = torch_npu.npu_fusion_attention(
                q, k, v, HEADS, "BSND", atten_mask=mask, scale=1 / math.sqrt(DIM), sparse_mode=2
            )[0]
        else:

            def turn(t):
                return torch.cat((-t[..., DIM // 2 :], t[..., : DIM // 2]), -1)

            q, k = q * cos + turn(q) * sin, k * cos + turn(k) * sin
            a = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
        x = x + self.out(a.reshape(ROWS, TOKENS, -1))
        both = self.up(norm(x, self.second))
        gate, up = both.chunk(2, -1)
        return x + self.down(torch_npu.npu_swiglu(both) if fused else F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.patches = nn.Embedding(VOCABULARY, WIDTH), nn.Conv2d(3, WIDTH, 4, 4)
        self.norm, self.join = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, image, where, *rest):
        seen = self.join(F.gelu(self.norm(self.patches(image).flatten(2).transpose(1, 2))))
        x = self.table(ids).masked_scatter(where[..., None].expand(-1, -1, WIDTH), seen)
        for layer in self.layers:
            x = layer(x, *rest)
        return self.head(x)


def train(device, fused, optimizer, steps=3):
    torch.manual_seed(0)
    model = Model().to(device)
    ids, image = torch.randint(0, VOCABULARY, (ROWS, TOKENS)), torch.randn(ROWS, 3, 8, 8)
    where = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    where[:, 1:5] = True
    angle = torch.arange(TOKENS)[:, None] * 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[None, :, None] for f in (torch.cos, torch.sin))
    mask = torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1)
    ids, image, where, cos, sin, mask = (t.to(device) for t in (ids, image, where, cos, sin, mask))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **optimizer)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(
            model(ids, image, where, cos, sin, mask, fused)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        adam.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        found.append((loss.item(), float(norm)))
    return found


@pytest.fixture(scope="module")
def wanted():
    return train("cpu", False, {})


@pytest.mark.parametrize(
    "optimizer", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=["plain", "foreach", "fused"]
)
def test_three_steps_equal_plain_torch_on_the_cpu(optimizer, wanted, record_property):
    worst = 0.0
    for (loss, norm), (loss_wanted, norm_wanted) in zip(train("npu", True, optimizer), wanted):
        # float32 on both sides; Adam divides by small second moments, which widens roundings of the first step's
        # gradients.
        worst = max(worst, abs(loss - loss_wanted) / loss_wanted, abs(norm - norm_wanted) / norm_wanted / 10)
    record_property("difference", f"{worst:.1e}")
    assert worst <= 1e-5, f"losses or a tenth of gradient norms differ by {worst:.2e}, relative"
