"""Fused attention for inference, by both of torch_npu's calls, against the formula in float64."""

import numpy as np
import pytest
import torch
import torch_npu

from tests.emulator.device.formulas import TRIANGLE, attention, banned

HEADS, KEY_HEADS, SCALE = 4, 2, 0.25
# The output is rounded once: half a unit in the last place of numbers below 4 (2^-8 of bfloat16, 2^-11 of float16,
# relative).
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def made(*shape, dtype=torch.bfloat16, seed=0):
    return torch.tensor(np.random.default_rng([seed, *shape]).standard_normal(shape)).to(dtype)


def call(
    version, q, k, v, layout, *, heads=HEADS, key_heads=KEY_HEADS, lengths=None, key_lengths=None, lse=True, **options
):
    """Output and log of the sums (or None), in float64 on the host. Options have the names of the first version."""
    options = {name: value.to("npu") if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if version == 1:
        names, function = (
            ("num_heads", "scale", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag"),
            torch_npu.npu_fused_infer_attention_score,
        )
    else:
        names, function = (
            ("num_query_heads", "softmax_scale", "actual_seq_qlen", "actual_seq_kvlen", "return_softmax_lse"),
            torch_npu.npu_fused_infer_attention_score_v2,
        )
    options |= dict(zip(names, (heads, SCALE, lengths, key_lengths, lse)))
    out, sums = function(
        q.to("npu"), k.to("npu"), v.to("npu"), input_layout=layout, num_key_value_heads=key_heads, **options
    )
    assert out.dtype == q.dtype
    return out.cpu().double().numpy(), sums.cpu().double().numpy() if lse else None


def laid(x, layout):
    """(B, S, N, D) in the layout of an input."""
    return {"BSND": x, "BNSD": x.transpose(1, 2), "BNSD_BSND": x.transpose(1, 2), "BSH": x.flatten(2)}[
        layout
    ].contiguous()


def by_hand(q, k, v, masks, pse=None):
    """Rows (B, S, N, D) of a list of masks (S, T); the output likewise, and sums (B, N, S, 1)."""
    found = [
        attention(
            q[b].double(), k[b].double(), v[b].double(), m, SCALE, 0.0 if pse is None else pse[b].double().numpy()
        )
        for b, m in enumerate(masks)
    ]
    return np.stack([f[0] for f in found]), np.stack([f[2].transpose(1, 0, 2) for f in found])


def close(got, wanted, tolerance, what="the output"):
    assert got.shape == wanted.shape, f"{what} has shape {got.shape}, expected {wanted.shape}"
    error = float(np.abs(got - wanted).max())
    assert error <= tolerance, f"{what} is off by {error:.2e}, allowed {tolerance:.1e}"


def check(found, wanted, dtype=torch.bfloat16):
    close(found[0], wanted[0], TOLERANCE[dtype])
    if found[1] is not None:
        close(found[1], wanted[1], 5e-6, "the log of the sums")  # float32


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
def test_every_layout_follows_the_formula(layout, version):
    dtype = torch.float16 if version == 2 else torch.bfloat16
    q, k, v = (
        made(2, 5, HEADS, 16, dtype=dtype),
        made(2, 7, KEY_HEADS, 16, dtype=dtype, seed=1),
        made(2, 7, KEY_HEADS, 16, dtype=dtype, seed=2),
    )
    out, sums = call(version, *(laid(x, layout) for x in (q, k, v)), layout, atten_mask=TRIANGLE, sparse_mode=3)
    wanted, wanted_sums = by_hand(q, k, v, [banned(5, 7, high=2)] * 2)
    as_rows = {"BNSD": wanted.transpose(0, 2, 1, 3), "BSH": wanted.reshape(2, 5, -1)}.get(layout, wanted)
    check((out, sums), (as_rows, wanted_sums), dtype)


MASK = torch.tensor(np.random.default_rng(5).random((2, 1, 5, 7)) < 0.4)
MASK[..., 0] = False  # every query sees something
MODES = {
    "none": (dict(), lambda b: banned(5, 7)),
    "whole, one a row": (dict(atten_mask=MASK, sparse_mode=1), lambda b: MASK[b, 0].numpy()),
    "whole, for all rows": (dict(atten_mask=MASK[0, 0].to(torch.int8), sparse_mode=1), lambda b: MASK[0, 0].numpy()),
    "whole within a band": (
        dict(atten_mask=MASK[:, 0], sparse_mode=0, pre_tokens=6, next_tokens=3),
        lambda b: MASK[b, 0].numpy() | banned(5, 7, low=-6, high=3),
    ),
    "from the upper left": (dict(atten_mask=TRIANGLE, sparse_mode=2), lambda b: banned(5, 7, high=0)),
    "a band from the lower right": (
        dict(atten_mask=TRIANGLE[None], sparse_mode=4, pre_tokens=3, next_tokens=1),
        lambda b: banned(5, 7, low=2 - 3, high=2 + 1),
    ),
}


@pytest.mark.parametrize("case", MODES)
def test_every_mask_follows_the_formula(case):
    options, mask = MODES[case]
    q, k, v = made(2, 5, HEADS, 16), made(2, 7, KEY_HEADS, 16, seed=1), made(2, 7, KEY_HEADS, 16, seed=2)
    check(call(1, q, k, v, "BSND", **options), by_hand(q, k, v, [mask(b) for b in range(2)]))


def test_rows_have_their_own_lengths_and_what_lies_past_them_is_no_number():
    q, k, v = made(2, 5, HEADS, 16), made(2, 7, KEY_HEADS, 16, seed=1), made(2, 7, KEY_HEADS, 16, seed=2)
    out, _ = call(1, q, k, v, "BSND", lengths=[5, 3], key_lengths=[7, 4], atten_mask=TRIANGLE, sparse_mode=3)
    for b, (s, t) in enumerate([(5, 7), (3, 4)]):
        close(
            out[b, :s],
            attention(q[b, :s].double(), k[b, :t].double(), v[b, :t].double(), banned(s, t, high=t - s), SCALE)[0],
            TOLERANCE[torch.bfloat16],
        )
    assert np.isnan(out[1, 3:]).all()


def test_scores_are_shifted_before_the_softmax():
    q, k, v, pse = (
        made(2, 5, HEADS, 16),
        made(2, 7, KEY_HEADS, 16, seed=1),
        made(2, 7, KEY_HEADS, 16, seed=2),
        made(1, HEADS, 5, 7, seed=3),
    )
    check(call(2, q, k, v, "BSND", pse_shift=pse), by_hand(q, k, v, [banned(5, 7)] * 2, pse.expand(2, -1, -1, -1)))


def test_a_single_query_reads_its_mask_and_its_row_of_keys():
    q, k, v = made(3, 1, HEADS, 24), made(3, 9, KEY_HEADS, 24, seed=1), made(3, 9, KEY_HEADS, 24, seed=2)
    mask = torch.zeros(3, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :4] = True
    out, sums = call(1, q, k, v, "BSND", atten_mask=mask, key_lengths=[9, 6, 2])
    masks = [mask[b, 0].numpy() | (np.arange(9) >= n) for b, n in enumerate([9, 6, 2])]
    check((out, sums), by_hand(q, k, v, masks))


def paged(rows, lengths, size, by_head, seed=7):
    """Keys or values of rows (a list of (T, K, D)) in blocks in a mixed order, with the table that finds them."""
    counts = [-(-n // size) for n in lengths]
    order = np.random.default_rng(seed).permutation(sum(counts) + 2)  # two blocks belong to nobody
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)

    def blocks(rows):
        store = torch.full((len(order), size, *rows[0].shape[1:]), float("nan"), dtype=rows[0].dtype)
        numbers = iter(order)
        for b, (row, count) in enumerate(zip(rows, counts)):
            for i in range(count):
                n = int(next(numbers))
                table[b, i] = n
                part = row[i * size : (i + 1) * size]
                store[n, : len(part)] = part
        return store.transpose(1, 2).contiguous() if by_head else store.flatten(2)

    return table, blocks


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout, by_head", [("BSND", False), ("BNSD", True), ("BNSD", False)])
def test_keys_in_blocks_are_found_by_the_table(layout, by_head, version):
    lengths, size = [37, 16, 5], 16
    q = made(3, 1, HEADS, 32)
    keys, values = ([made(n, KEY_HEADS, 32, seed=s + n) for n in lengths] for s in (1, 100))
    table, blocks = paged(keys, lengths, size, by_head)
    out, sums = call(
        version,
        laid(q, layout),
        blocks(keys),
        blocks(values),
        layout,
        key_lengths=lengths,
        block_table=table,
        block_size=size,
    )
    found = [
        attention(q[b].double(), keys[b].double(), values[b].double(), banned(1, n), SCALE)
        for b, n in enumerate(lengths)
    ]
    wanted = np.stack([f[0] for f in found])
    check(
        (out, sums),
        (
            wanted.transpose(0, 2, 1, 3) if layout == "BNSD" else wanted,
            np.stack([f[2].transpose(1, 0, 2) for f in found]),
        ),
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mode", [0, 3, 4])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_sequences_one_after_another_follow_the_formula(mode, in_blocks, version):
    lengths, key_lengths = [3, 5, 2], [4, 5, 9]

    def ends(n):
        return [int(x) for x in np.cumsum(n)]

    queries = [made(n, HEADS, 16, seed=n) for n in lengths]
    keys, values = ([made(n, KEY_HEADS, 16, seed=s + n) for n in key_lengths] for s in (1, 100))
    options = (
        dict(sparse_mode=mode)
        | (dict(atten_mask=TRIANGLE) if mode else {})
        | (dict(pre_tokens=2, next_tokens=1) if mode == 4 else {})
    )
    if in_blocks:
        table, blocks = paged(keys, key_lengths, 16, False)
        k, v = blocks(keys), blocks(values)
        options |= dict(block_table=table, block_size=16, key_lengths=key_lengths)
    else:
        k, v = torch.cat(keys), torch.cat(values)
        options |= dict(key_lengths=ends(key_lengths))
    out, sums = call(version, torch.cat(queries), k, v, "TND", lengths=ends(lengths), **options)
    limits = {0: lambda c: {}, 3: lambda c: dict(high=c), 4: lambda c: dict(low=c - 2, high=c + 1)}[mode]
    found = [
        attention(q.double(), k.double(), v.double(), banned(len(q), len(k), **limits(len(k) - len(q))), SCALE)
        for q, k, v in zip(queries, keys, values)
    ]
    check((out, sums), (np.concatenate([f[0] for f in found]), np.concatenate([f[2] for f in found])))


def test_heads_before_sequences_give_sequences_before_heads():
    q, k, v = made(5, HEADS, 128), made(6, KEY_HEADS, 128, seed=1), made(6, KEY_HEADS, 128, seed=2)
    heads_first = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
    out, _ = call(1, *heads_first, "NTD_TND", lengths=[2, 5], key_lengths=[2, 6], lse=False)
    wanted = np.concatenate(
        [
            attention(q[a:b].double(), k[c:d].double(), v[c:d].double(), banned(b - a, d - c), SCALE)[0]
            for a, b, c, d in [(0, 2, 0, 2), (2, 5, 2, 6)]
        ]
    )
    close(out, wanted, TOLERANCE[torch.bfloat16])


def test_a_query_that_sees_nothing_is_zero_where_that_is_asked_for_and_no_number_elsewhere():
    q, k = made(1, 4, HEADS, 16), made(1, 4, KEY_HEADS, 16, seed=1)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    plain, mended = (
        call(1, q, k, k, "BSND", atten_mask=mask, sparse_mode=1, inner_precise=precise)[0][0] for precise in (0, 2)
    )
    assert np.isnan(plain[2]).all() and (mended[2] == 0).all()
    close(mended[[0, 1, 3]], plain[[0, 1, 3]], 0)
    late = call(1, made(1, 6, HEADS, 16), k, k, "BSND", atten_mask=TRIANGLE, sparse_mode=3)[0][0]
    assert (late[:2] == 0).all() and np.isfinite(late).all(), "with more queries than keys the kernel knows by itself"


REFUSED = {
    "float32": (dict(dtype=torch.float32), "query is float32.*takes float16, bfloat16"),
    "a head dim of no multiple of 16": (dict(dim=24), "head dim 24; expected at most 512 and a multiple of 16"),
    "another number of heads": (dict(heads=8), "num_heads 8, but query has 4 heads"),
    "key heads that do not divide": (dict(key_heads=3), "4 query heads and 3 key heads"),
    "a layout of split rotary parts": (dict(layout="BSND_NBSD"), 'input_layout "BSND_NBSD" has no emulation'),
    "a prefix mode": (
        dict(sparse_mode=6, atten_mask=TRIANGLE),
        "sparse_mode 6; fused inference attention knows 0 to 4",
    ),
    "a triangle missing": (dict(sparse_mode=3), "sparse_mode 3 without atten_mask"),
    "a small triangle": (
        dict(sparse_mode=3, atten_mask=TRIANGLE[:64, :64]),
        r"expected the compressed triangle \[2048, 2048\]",
    ),
    "a mask the other way round": (dict(sparse_mode=3, atten_mask=~TRIANGLE), "not the upper triangle"),
    "a mask of heads": (
        dict(sparse_mode=1, atten_mask=torch.zeros(2, HEADS, 5, 7, dtype=torch.bool)),
        r"expected \[Sq, Skv\]",
    ),
    "a mask of floats": (
        dict(sparse_mode=1, atten_mask=torch.zeros(5, 7, dtype=torch.bfloat16)),
        "atten_mask is bfloat16",
    ),
    "an empty band": (dict(sparse_mode=4, atten_mask=TRIANGLE, pre_tokens=-2, next_tokens=1), "leave no band"),
    "too long a row": (dict(key_lengths=[7, 8]), r"actual_seq_lengths_kv = \[7, 8\]; expected 0 to 7"),
    "lengths of too few rows": (dict(rows=3, key_lengths=[7, 7]), "actual_seq_lengths_kv has 2 numbers for 3 rows"),
    "blocks without lengths": (
        dict(block_table=torch.zeros(2, 1, dtype=torch.int32), block_size=128, keys=(4, 128, 32)),
        "without the lengths of the keys",
    ),
    "blocks of another size": (
        dict(block_table=torch.zeros(2, 1, dtype=torch.int32), block_size=128, keys=(4, 64, 32), key_lengths=[7, 7]),
        "blocks of 64 places, block_size is 128",
    ),
    "a block that is not there": (
        dict(
            block_table=torch.full((2, 1), 9, dtype=torch.int32), block_size=128, keys=(4, 128, 32), key_lengths=[7, 7]
        ),
        "block_table names block 9 or 9 of 4",
    ),
    "quantisation": (dict(quant_scale2=torch.ones(1), lse=False), "quant_scale2 = .* has no emulation"),
    "padding on the left": (
        dict(query_padding_size=torch.ones(1, dtype=torch.int64)),
        "query_padding_size = .* has no emulation",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_document_forbids_or_nobody_wrote_is_refused(case):
    given, message = REFUSED[case]
    given = dict(given)
    dtype, dim, rows, keys, layout = (
        given.pop(name, default)
        for name, default in (("dtype", torch.bfloat16), ("dim", 16), ("rows", 2), ("keys", None), ("layout", "BSND"))
    )
    q = made(rows, 5, HEADS, dim, dtype=dtype)
    k = made(*(keys or (rows, 7, KEY_HEADS, dim)), dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        call(1, q, k, k, layout, **given)


def test_sequences_with_more_queries_than_keys_are_refused_below_the_triangle():
    q, k = made(5, HEADS, 16), made(4, KEY_HEADS, 16)
    with pytest.raises(RuntimeError, match="wants no more queries than keys"):
        call(2, q, k, k, "TND", lengths=[5], key_lengths=[4], atten_mask=TRIANGLE, sparse_mode=3)
