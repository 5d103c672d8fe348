"""Attention's sparse modes 5 to 8: open prefixes and batches split over devices, against the formula in float64."""

import numpy as np
import pytest
import torch
import torch_npu

from tests.emulator.device.formulas import TRIANGLE, WITH_PREFIX, banned, gradients

HEADS, KEY_HEADS, DIM, SCALE = 4, 2, 16, 0.25
# float32 sums of a few products of numbers of size one: some units of 6e-8 each.
TOLERANCE = 5e-6


def prefix_mask(queries, keys, prefix):
    """The triangle from the lower right corner, with the first `prefix` keys open to all."""
    return banned(queries, keys, high=keys - queries) & (np.arange(keys) >= prefix)


def made(places, heads, rng):
    return rng.standard_normal((places, heads, DIM)).astype(np.float32)


def on_npu(layout, arrays, g, **options):
    """Output and gradients of query, key and value by torch_npu's autograd."""
    q, k, v = (torch.tensor(x).to("npu").requires_grad_() for x in arrays)
    mask = options.pop("atten_mask").to("npu")
    out = torch_npu.npu_fusion_attention(q, k, v, HEADS, layout, atten_mask=mask, scale=SCALE, **options)[0]
    out.backward(torch.tensor(g).to("npu"))
    return [x.detach().cpu().numpy() for x in (out, q.grad, k.grad, v.grad)]


def ends(lengths):
    return [int(n) for n in np.cumsum(lengths)]


def packed(queries, keys, masks, seed=0):
    """Sequences one after another: their arrays, and output and gradients by hand."""
    rng = np.random.default_rng(seed)
    pieces = [
        (made(s, HEADS, rng), made(t, KEY_HEADS, rng), made(t, KEY_HEADS, rng), made(s, HEADS, rng))
        for s, t in zip(queries, keys)
    ]
    found = [gradients(*piece, mask, SCALE) for piece, mask in zip(pieces, masks)]
    return pieces, found


def joined(parts):
    return [np.concatenate(x) for x in zip(*parts)]


def worst(got, wanted):
    for a, b in zip(got, wanted):
        assert a.shape == b.shape
    return max(float(np.abs(a - b).max()) for a, b in zip(got, wanted))


def test_sequences_with_open_prefixes_follow_the_formula():
    queries, keys, prefix = [3, 5, 2], [4, 5, 6], [2, 0, 5]
    pieces, found = packed(queries, keys, [prefix_mask(*lengths) for lengths in zip(queries, keys, prefix)])
    q, k, v, g = joined(pieces)
    got = on_npu(
        "TND",
        (q, k, v),
        g,
        atten_mask=WITH_PREFIX,
        sparse_mode=6,
        prefix=prefix,
        actual_seq_qlen=ends(queries),
        actual_seq_kvlen=ends(keys),
    )
    error = worst(got, joined(found))
    assert error <= TOLERANCE, f"output or a gradient is off by {error:.1e}"


@pytest.mark.parametrize("mode, heads_of_mask", [(5, 1), (5, HEADS), (6, 1)])
def test_rows_with_open_prefixes_follow_the_formula(mode, heads_of_mask):
    queries, keys, prefix = 6, 8, [3, 8]
    masks = [prefix_mask(queries, keys, n) for n in prefix]
    pieces, found = packed([queries] * 2, [keys] * 2, masks)

    def rows(parts):
        return [np.ascontiguousarray(np.stack(x).transpose(0, 2, 1, 3)) for x in zip(*parts)]

    q, k, v, g = rows(pieces)
    whole = torch.tensor(np.stack(masks))[:, None].expand(-1, heads_of_mask, -1, -1).contiguous()
    got = on_npu("BNSD", (q, k, v), g, atten_mask=whole if mode == 5 else WITH_PREFIX, sparse_mode=mode, prefix=prefix)
    error = worst(got, rows(found))
    assert error <= TOLERANCE, f"output or a gradient is off by {error:.1e}"


# A batch of four sequences of which the second is cut between two devices, each with all its keys. `cut` query
# positions go to the first.
CUTS = {
    "last of the first device, counted from the lower right": dict(
        mode=7, whole=3, queries=[3, 4, 5, 4], keys=[3, 6, 5, 4], limits=(6, -2), banded=0
    ),
    "first of the second device, counted from the upper left": dict(
        mode=8, whole=2, queries=[3, 5, 5, 4], keys=[3, 4, 5, 4], limits=(4, 1), banded=1
    ),
}


@pytest.mark.parametrize("case", CUTS)
def test_the_parts_of_a_batch_cut_for_two_devices_are_those_of_the_whole(case):
    given = CUTS[case]
    queries, keys, cut = given["queries"], given["keys"], 2
    masks = [banned(s, t, high=t - s if given["whole"] == 3 else 0) for s, t in zip(queries, keys)]
    pieces, found = packed(queries, keys, masks)
    second = pieces[1]
    parts = [
        [pieces[0], (second[0][:cut], second[1], second[2], second[3][:cut])],
        [(second[0][cut:], second[1], second[2], second[3][cut:]), *pieces[2:]],
    ]
    results = []
    for i, part in enumerate(parts):
        q, k, v, g = joined(part)
        band = dict(sparse_mode=given["mode"], pre_tockens=given["limits"][0], next_tockens=given["limits"][1])
        options = band if i == given["banded"] else dict(sparse_mode=given["whole"])
        results.append(
            on_npu(
                "TND",
                (q, k, v),
                g,
                atten_mask=TRIANGLE,
                **options,
                actual_seq_qlen=ends([len(p[0]) for p in part]),
                actual_seq_kvlen=ends([len(p[1]) for p in part]),
            )
        )
    (out_a, dq_a, dk_a, dv_a), (out_b, dq_b, dk_b, dv_b) = results
    n = keys[0]

    # The keys of the cut sequence get gradients from both parts.
    def add(a, b):
        return np.concatenate((a[:n], a[n:] + b[: keys[1]], b[keys[1] :]))

    got = [np.concatenate((out_a, out_b)), np.concatenate((dq_a, dq_b)), add(dk_a, dk_b), add(dv_a, dv_b)]
    error = worst(got, joined(found))
    assert error <= TOLERANCE, f"output or a gradient is off by {error:.1e}"


PACKED = dict(
    layout="TND", shapes=((5, HEADS, DIM), (9, KEY_HEADS, DIM)), actual_seq_qlen=[3, 5], actual_seq_kvlen=[3, 9]
)
ROWS = dict(layout="BNSD", shapes=((1, HEADS, 6, DIM), (1, KEY_HEADS, 8, DIM)))
REFUSED = {
    "an uncompressed prefix of sequences": (
        PACKED | dict(sparse_mode=5, prefix=[1, 1], atten_mask=torch.zeros(2, 1, 3, 6, dtype=torch.bool)),
        "sparse_mode value must be in range",
    ),  # torch_npu itself
    "a mask that is no prefix": (
        ROWS | dict(sparse_mode=5, prefix=[4], atten_mask=torch.zeros(1, 1, 6, 8, dtype=torch.bool)),
        "not the triangle from the lower right corner",
    ),
    "a whole mask without rows": (
        ROWS | dict(sparse_mode=5, prefix=[4], atten_mask=torch.zeros(6, 8, dtype=torch.bool)),
        r"expected \[B, 1, Sq, Skv\]",
    ),
    "no prefix": (
        ROWS | dict(sparse_mode=6, atten_mask=WITH_PREFIX),
        "with 0 numbers in prefix; expected one for each of 1 rows",
    ),
    "a prefix shorter than the triangle": (
        ROWS | dict(sparse_mode=6, prefix=[1], atten_mask=WITH_PREFIX),
        r"prefix\[0\] = 1 for 6 queries and 8 keys; expected 2 to 8",
    ),
    "a triangle without the rectangle": (
        ROWS | dict(sparse_mode=6, prefix=[4], atten_mask=TRIANGLE),
        r"expected the compressed triangle \[3072, 2048\]",
    ),
    "another rectangle": (
        ROWS | dict(sparse_mode=6, prefix=[4], atten_mask=torch.cat((TRIANGLE, TRIANGLE[:1024]))),
        "lower 1024 rows of atten_mask",
    ),
    "a cut outside of TND": (
        ROWS | dict(sparse_mode=7, atten_mask=TRIANGLE),
        "sparse_mode value must be in range",
    ),  # torch_npu itself
    "a band that looks ahead": (
        PACKED | dict(sparse_mode=7, pre_tockens=6, next_tockens=1, atten_mask=TRIANGLE),
        "next_tokens 1 in sparse_mode 7; expected -4 to 0",
    ),
    "a band that forgets": (
        PACKED | dict(sparse_mode=7, pre_tockens=5, next_tockens=-2, atten_mask=TRIANGLE),
        "expected at least the 6 keys",
    ),
    "a mask missing": (PACKED | dict(sparse_mode=8, pre_tockens=6, next_tockens=0), "sparse_mode 8 without atten_mask"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mode_that_is_given_something_else_is_refused(case):
    given, message = REFUSED[case]
    given = dict(given)
    layout, (query, key) = given.pop("layout"), given.pop("shapes")
    q, k = torch.ones(query, device="npu"), torch.ones(key, device="npu")
    given = {name: value.to("npu") if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(q, k, k, HEADS, layout, **given)
        torch.npu.synchronize()
