"""Rewrites that make programs cheaper: what is written, and that it still equals XLA."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import npu_bridge
from npu_bridge import ops
from tests.bridge.harness import call_three_times

R = np.random.RandomState(0)


def both(fn, *args):
    """The written program, after its results were found equal to XLA's."""
    # float32, sums of tens of terms
    return call_three_times(fn, *args, rtol=0, atol=1e-5).lower(*args).as_text()


def f32(*shape):
    return R.uniform(-1, 1, shape).astype(np.float32)


def test_a_kernel_that_reads_lengths_on_the_host_gets_the_hosts_copy_while_others_read_the_devices():
    segments, lengths = np.ones((2, 6), np.int32), np.array([[4, 2], [6, -1]], np.int32)

    def fn(q, segments, lengths):
        one = ops.attention(q, q, q, causal=True, segment_ids_q=segments, lengths=lengths)
        return ops.attention(one, q, q, causal=True, segment_ids_q=segments, lengths=lengths), (lengths > 0).sum()

    text = both(fn, f32(2, 6, 2, 4), segments, lengths)
    assert text.count("rt.host[2]") == 2 and "a2 > 0" in text, text
    assert npu_bridge.jit(fn).lower(f32(2, 6, 2, 4), segments, lengths).source.host_arguments == [2]


def test_an_unrolled_scan_stacks_nothing_but_the_gradients_of_its_parameters():
    def layer(x, w):
        return (jnp.tanh(x @ w), None)

    def loss(ws, x):
        return lax.scan(layer, x, ws, unroll=True)[0].sum()

    text = both(jax.value_and_grad(loss), f32(4, 8, 8), f32(3, 8))
    assert text.count("torch.cat(") == 1 and "pad(" not in text, text


def test_slices_reach_through_slices_and_into_the_piece_that_holds_them():
    def fn(a, b):
        whole = jnp.concatenate([a, b])[1:]
        return whole[4:6, 1:] * 2, whole[0:2] + 1, whole[2:5]

    text = both(fn, f32(4, 3), f32(5, 3))
    assert text.count("torch.cat(") == 1, "only the slice over the border needs the whole\n" + text


def test_a_slice_with_steps_keeps_its_concatenation():
    assert "torch.cat(" in both(lambda a, b: jnp.concatenate([a, b])[::2], f32(4), f32(4))


def test_padded_pieces_become_a_concatenation_only_where_they_cover_the_whole_side_by_side():
    def pad(x, low, high):
        return lax.pad(x, np.float32(0), [(low, high, 0), (0, 0, 0)])

    a, b, c = f32(2, 3), f32(1, 3), f32(3, 3)
    assert "pad(" not in both(lambda a, b, c: pad(b, 2, 3) + (pad(c, 3, 0) + pad(a, 0, 4)), a, b, c)
    for other in (
        lambda a, b: pad(a, 0, 2) + pad(b, 3, 0),
        lambda a, b: pad(a, 1, 0) + pad(b, 2, 0),
        lambda a, b: pad(a, 0, 1) + pad(b, 0, 2),
    ):
        assert "pad(" in both(other, a, b)


def test_a_padding_with_another_number_is_no_piece():
    def pad(x, low, high):
        return lax.pad(x, np.float32(1), [(low, high, 0)])

    assert "pad(" in both(lambda a, b: pad(a, 0, 2) + pad(b, 2, 0), f32(2), f32(2))


def test_an_integer_target_is_looked_up_not_compared_with_every_class():
    targets = np.array([[1, 0], [4, -1]], np.int32)

    def hit(t):
        return t[..., None] == lax.broadcasted_iota(t.dtype, (1, 1, 5), 2)

    x = f32(2, 2, 5)
    text = both(lambda x, t: (jnp.where(hit(t), x, 0).sum(-1), jnp.sin(x) - hit(t)), x, targets)
    assert "T.pick(" in text and "T.add_at(" in text and "==" not in text, text
    x[0, 0, 0] = np.inf
    assert "T.pick(" in both(lambda x, t: jnp.where(hit(t), x, 0).sum(-1)[0, 0], x, targets), (
        "what is not picked is not touched either"
    )


def test_comparisons_that_are_no_index_stay_comparisons():
    row = np.array([0, 3, 1, 3, 4], np.int32)
    places = jnp.arange(5)
    for fn in (
        lambda x, r: jnp.where(r == places, x, 0).sum(-1),  # another number in every place of the row
        lambda x, r: jnp.where(r[0] == places, x, 1).sum(-1),
        lambda x, r: jnp.where(r[0] == places, x, 0).max(-1),
        lambda x, r: jnp.where(r[0] <= places, x, 0).sum(-1),
        lambda x, r: jnp.where((r[:2, None] == places), x, 0).sum(0),
    ):
        text = both(fn, f32(2, 5), row)
        assert "T.pick(" not in text and "T.add_at(" not in text, text


def _attending(layers, heads, segments, **options):
    def loss(q):
        x = q
        for _ in range(layers):
            x = ops.attention(x, x, x, segment_ids_q=segments, **options)
        return (x * (segments > 0)[..., None, None]).mean()

    return jax.value_and_grad(loss), f32(2, 24, heads, 8)


SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 7, [1] * 24], np.int32)


def test_layers_that_attend_within_equal_segments_share_one_mask_forward_and_backward():
    text = both(*_attending(3, 2, SEGMENTS, causal=True))
    assert text.count("T.math_attention_mask(") == 1 and text.count("masked=True") == 6, text


def test_attention_in_blocks_and_with_lengths_shares_masks_of_its_own_kind():
    def fn(q, lengths):
        def packed(x, window):
            return ops.attention(
                x,
                x,
                x,
                causal=False,
                window=window,
                segment_ids_q=SEGMENTS,
                lengths=lengths,
                max_segment_length=24,
                implementation="banded",
            )

        return packed(packed(packed(q, 5), 9), 5)

    text = both(fn, f32(2, 24, 16, 8), np.array([[9, 8], [24, -1]], np.int32))
    assert text.count("T.math_attention_mask(") == 2 and text.count("masked=True") == 3, text


def test_a_mask_that_would_be_much_larger_than_the_queries_is_not_kept():
    q, segments = f32(1, 96, 1, 8), np.ones((1, 96), np.int32)  # 96 keys beside 8 numbers a query
    assert "math_attention_mask" not in both(
        lambda q, s: ops.attention(q, q, q, segment_ids_q=s, causal=True), q, segments
    )
