"""Our torch_npu calls against the documents' formulas (fake_torch_npu.py): arguments, layouts, masks, statistics."""

import numpy as np
import pytest
import torch

from npu_bridge.kernels import KERNELS, activations, attention, check, moe, norms
from npu_bridge.kernels.attention import cumulative_lengths

from . import fake_torch_npu

# Packed attention keeps its statistics in an order of its own, so its backward is tested behind its forward below.
FUSED = sorted(
    name
    for name, kernel in KERNELS.items()
    if kernel.npu is not None and name not in ("attention_packed_backward", "attention_ring_backward")
)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    for module in (activations, attention, moe, norms):
        monkeypatch.setattr(module, "torch_npu", lambda: fake_torch_npu.MODULE)
    fake_torch_npu.calls.clear()


def run(name, tensors, params):
    return KERNELS[name].npu(*tensors, **params)


@pytest.mark.parametrize("dtype", check.DTYPES)
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_call_computes_what_its_equivalent_computes(name, dtype):
    _, tensors = check.inputs(name, dtype)
    params = check.CASES[name].params
    fused, equivalent = run(name, [x.clone() for x in tensors], params), KERNELS[name].equivalent(*tensors, **params)
    skipped = {1} if name in ("attention_packed", "attention_ring") else set()
    assert len(fused) == len(equivalent)
    for i, (a, b) in enumerate(zip(fused, equivalent)):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"result {i}: {a.dtype}{tuple(a.shape)}, expected {b.dtype}{tuple(b.shape)}"
        )
        if i not in skipped:
            difference = check.difference(a, b.double().numpy())
            bound = 2 * KERNELS[name].tolerance[dtype]  # each side may use up its own
            assert difference <= bound, f"result {i}: difference {difference:.2e}, bound {bound:.1e}"


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 6), (False, 6)])
@pytest.mark.parametrize("form", ["", "_segments", "_packed"])
@pytest.mark.parametrize(
    "heads", [(4, 4, 16, 16), (4, 2, 64, 64), (4, 1, 80, 80), (2, 2, 128, 128), (2, 1, 192, 128)], ids=str
)
def test_attention_forward_and_backward_hold_together_in_every_form(form, causal, window, heads):
    N, K, H, J = heads
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 70, n, d, generator=generator) for n, d in ((N, H), (K, H), (K, J), (N, J)))
    segments = {"": [], "_segments": check._segments(), "_packed": [*check._segments(), check._LENGTHS]}[form]
    segments = [torch.from_numpy(np.asarray(x)) for x in segments]
    params = dict(causal=causal, window=window, scale=H**-0.5, blocks=(0, 0, 0))

    def both(which):
        forward, backward = (getattr(KERNELS["attention" + form + tail], which) for tail in ("", "_backward"))
        out, lse = forward(q, k, v, *segments, **params)
        return out, *backward(g, q, k, v, out, lse, *segments, **params)

    for result, a, b in zip(("out", "dq", "dk", "dv"), both("npu"), both("equivalent")):
        difference = check.difference(a, b.double().numpy())
        assert difference <= 1e-5, f"{result}: largest relative difference {difference:.2e}"  # float32 on both sides
    layout = {call[1]["layout"] for call in fake_torch_npu.calls}
    assert layout == {"TND" if form == "_packed" else "BSND"}
    modes = {call[1]["sparse_mode"] for call in fake_torch_npu.calls}
    assert modes == {0 if form == "_segments" else 4 if window else 3 if causal else 0}


def test_a_round_of_a_ring_takes_lengths_of_queries_and_keys_apart():
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 70, n, 16, generator=generator) for n in (4, 2, 2, 4))
    segments = [torch.from_numpy(np.asarray(x)) for x in (*check._parts(), *check._PARTS)]
    params = dict(causal=False, window=None, scale=0.25, blocks=(0, 0, 0))

    def both(which):
        forward, backward = (getattr(KERNELS["attention_ring" + tail], which) for tail in ("", "_backward"))
        out, lse = forward(q, k, v, *segments, wide=True, **params)
        assert out.dtype == torch.float32 and torch.isneginf(lse).any(), "row 1 has queries without a key"
        finite = lse.masked_fill(torch.isneginf(lse), 0)
        return out, torch.exp(lse), *backward(g, q, k, v, out, finite, *segments, **params)

    for result, a, b in zip(("out", "exp(lse)", "dq", "dk", "dv"), both("npu"), both("equivalent")):
        difference = check.difference(a, b.double().numpy())
        assert difference <= 1e-5, f"{result}: largest relative difference {difference:.2e}"
    assert {call[1]["layout"] for call in fake_torch_npu.calls} == {"TND"}
    assert fake_torch_npu.calls[0][1]["ends"] == [0, 40, 65, 70, 120, 129, 140], "an empty segment keeps its place"
    with attention.recording_lengths() as recorded:  # of one captured call only one list could be exchanged
        KERNELS["attention_ring"].npu(q, k, v, *segments, **params)
    assert not recorded and fake_torch_npu.calls[-1][1]["layout"] == "BSND"


def test_inside_a_capture_lengths_go_to_the_third_version_as_host_tensors():
    generator = torch.Generator().manual_seed(1)
    q, k, v, g = (torch.randn(2, 70, n, 16, generator=generator) for n in (4, 2, 2, 4))
    segments = [torch.from_numpy(np.asarray(x)) for x in (*check._segments(), check._LENGTHS)]
    params = dict(causal=True, window=None, scale=0.25, blocks=(0, 0, 0))
    forward, backward = KERNELS["attention_packed"], KERNELS["attention_packed_backward"]
    with attention.recording_lengths() as recorded:
        out, lse = forward.npu(q, k, v, *segments, **params)
        grads = backward.npu(g, q, k, v, out, lse, *segments, **params)
    assert [places for _, places in recorded] == [70, 70] and all(lengths is segments[2] for lengths, _ in recorded)
    told = attention.replay_lengths(*recorded[0])
    assert told["actual_seq_qlen"].tolist() == [20, 51, 64, 70, 77, 117, 140], (
        "ends over both rows, what is left of a row a segment"
    )
    assert attention.replay_lengths(torch.ones(2, 600, dtype=torch.int32), 600) is None, (
        "more segments than a call takes"
    )
    assert [name for name, _ in fake_torch_npu.calls if name.endswith("_v3")] == [
        "npu_fusion_attention_v3",
        "npu_fusion_attention_grad_v3",
    ]
    wanted_out, wanted_lse = forward.equivalent(q, k, v, *segments, **params)
    wanted = backward.equivalent(g, q, k, v, wanted_out, wanted_lse, *segments, **params)
    for result, a, b in zip(("out", "dq", "dk", "dv"), (out, *grads), (wanted_out, *wanted)):
        difference = check.difference(a, b.double().numpy())
        assert difference <= 1e-5, f"{result}: largest relative difference {difference:.2e}"  # float32 on both sides


@pytest.mark.parametrize("padding", ["zeros", "unread"])
@pytest.mark.parametrize("form", ["", "_segments", "_packed"])
def test_attention_hands_its_statistics_on_as_the_kernel_made_them(form, padding):
    """Forward and gradient by the fused calls against those of the equivalents, and padding that nobody reads left to
    itself.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 70, n, 16, generator=generator) for n in (4, 2, 2, 4))
    segments = {"": [], "_segments": check._segments(), "_packed": [*check._segments(), check._LENGTHS]}[form]
    segments = [torch.from_numpy(np.asarray(x)) for x in segments]
    if segments and padding == "unread":
        g = g.masked_fill((segments[0] == 0)[..., None, None], 0)  # what the promise says
    params = dict(causal=True, window=None, scale=0.25, blocks=(0, 0, 0), padding=padding, statistics=True)

    def both(which):
        forward, backward = (getattr(KERNELS["attention" + form + tail], which) for tail in ("", "_backward"))
        out, peak, total = forward(q, k, v, *segments, **params)
        assert peak.shape == total.shape == (2, 4, 70, 8) and peak.is_contiguous() and total.is_contiguous()
        grads = backward(g, q, k, v, out, peak, total, *segments, **params)
        read = out if padding == "zeros" or not segments else out.masked_fill((segments[0] == 0)[..., None, None], 0)
        return read, *grads

    for result, a, b in zip(("out", "dq", "dk", "dv"), both("npu"), both("equivalent")):
        difference = check.difference(a, b.double().numpy())
        assert difference <= 1e-5, f"{result}: largest relative difference {difference:.2e}"  # float32 on both sides


def test_lengths_become_cumulative_ends_over_all_rows_with_padding_as_its_own_segment():
    lengths = torch.tensor([[3, 2, -1], [4, -1, -1], [2, 3, 1]])
    assert cumulative_lengths(lengths, 6) == [3, 5, 6, 10, 12, 14, 17, 18]
    with pytest.raises(ValueError, match=r"\[3, 2, -1\] add up to 5, but a row has 4 positions"):
        cumulative_lengths(lengths, 4)


def test_more_segments_than_the_kernel_takes_fall_back_to_a_mask():
    ids = (torch.arange(1100, dtype=torch.int32) + 1)[None]
    x = torch.randn(1, 1100, 1, 16)
    out, _ = run(
        "attention_packed",
        (x, x, x, ids, ids, torch.ones(1, 1100, dtype=torch.int32)),
        dict(causal=False, window=None, scale=1.0, blocks=(0, 0, 0)),
    )
    assert fake_torch_npu.calls[0][1]["layout"] == "BSND"
    assert torch.allclose(out, x, atol=1e-6), "a segment of one place attends itself"


def test_more_queries_than_keys_under_a_causal_mask_give_zeros_where_nothing_is_to_be_seen():
    q, kv = torch.randn(1, 9, 2, 16), torch.randn(1, 5, 2, 16)
    params = dict(causal=True, window=None, scale=0.25, blocks=(0, 0, 0))
    fused, equivalent = (
        run("attention", (q, kv, kv), params)[0],
        KERNELS["attention"].equivalent(q, kv, kv, **params)[0],
    )
    assert not fused[:, :4].any() and torch.allclose(fused, equivalent, atol=1e-6)


def test_adamw_never_reads_a_device_scalar_back(monkeypatch):
    _, tensors = check.inputs("adamw", "float32")
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a host synchronisation"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("a host synchronisation"))
    run("adamw", tensors, check.CASES["adamw"].params)


@pytest.mark.parametrize(
    "settings", [dict(scoring="sigmoid", renormalize=False), dict(scoring="softmax", groups=4, groups_kept=2)], ids=str
)
def test_routing_that_no_fused_call_offers_runs_the_equivalent(settings):
    logits = torch.randn(7, 16)
    params = check._GATE | settings
    for a, b in zip(run("moe_gating", (logits,), params), KERNELS["moe_gating"].equivalent(logits, **params)):
        assert torch.equal(a, b)
