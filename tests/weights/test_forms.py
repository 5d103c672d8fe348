"""Forms of published tensors against their definitions, and back to the same bytes."""

import numpy as np
import pytest
import torch

from mindvl_jax.models.hf import SAME, TRANSPOSE, Columns, Convolution, Interleaved, Reshaped, Rows, Rule, flatten

RANDOM = np.random.default_rng(0)


def test_interleaved_is_internlm2s_grouped_query_key_value():
    """wqkv is (kv heads, queries of a group + key + value, head dim, width)."""
    K, G, H, D = 3, 2, 4, 5
    wqkv = RANDOM.standard_normal((K * (G + 2) * H, D)).astype(np.float32)
    grouped = wqkv.reshape(K, G + 2, H, D)
    shapes = [(D, K * G * H), (D, K * H), (D, K * H)]
    query, key, value = Interleaved(groups=K).to_ours(wqkv, shapes)
    np.testing.assert_array_equal(query, grouped[:, :G].reshape(-1, D).T)
    np.testing.assert_array_equal(key, grouped[:, G].reshape(-1, D).T)
    np.testing.assert_array_equal(value, grouped[:, G + 1].reshape(-1, D).T)


def test_convolution_in_patch_order_equals_torch_on_the_patches_side_by_side():
    """A 2 x 2 convolution of stride 2 over patches is a matrix on the four patches concatenated, each with its
    channels.
    """
    kernel = RANDOM.standard_normal((6, 3, 2, 2)).astype(np.float32)
    matrix = Convolution((3, 2, 2), order=(1, 2, 0)).to_ours(kernel, [(12, 6)])[0]
    image = RANDOM.standard_normal((1, 3, 2, 2)).astype(np.float32)
    want = torch.nn.functional.conv2d(torch.tensor(image), torch.tensor(kernel), stride=2).numpy().reshape(-1)
    patches = image[0].transpose(1, 2, 0).reshape(-1)
    np.testing.assert_allclose(patches @ matrix, want, rtol=1e-5)


def test_columns_are_gate_and_up_of_experts_side_by_side():
    joined = RANDOM.standard_normal((2, 5, 8)).astype(np.float32)
    gate, up = Columns().to_ours(joined, [(2, 5, 4), (2, 5, 4)])
    np.testing.assert_array_equal(gate, joined[..., :4])
    np.testing.assert_array_equal(up, joined[..., 4:])


@pytest.mark.parametrize("form, shapes", [
    (SAME, [(4, 5)]), (TRANSPOSE, [(5, 4), (5, 6)]), (Rows(), [(4,), (6,)]), (flatten(3, 2, 2), [(12, 7)]),
    (Interleaved(2), [(5, 8), (5, 4)]),
    (Interleaved(2, transpose=False), [(8,), (4,)]), (Columns(), [(3, 4), (3, 5)]),
    (Convolution((3, 2, 2), (1, 2, 0)), [(12, 7)]), (Reshaped((1, 1, 9)), [(9,)]),
])  # fmt: skip
def test_every_form_comes_back_bitwise(form, shapes):
    tensor = RANDOM.standard_normal(form.published_shape(shapes)).astype(np.float32)
    ours = form.to_ours(tensor, shapes)
    assert [part.shape for part in ours] == shapes
    np.testing.assert_array_equal(form.to_published(ours), tensor)


def test_a_tensor_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 9\) cannot hold a parameter of shape \(8,\)"):
        Reshaped((1, 1, 9)).published_shape([(8,)])


def test_names_count_layers_from_the_stacks_first_and_experts_from_zero():
    rule = Rule(
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        ("language/routed/mlp/up/kernel",),
        TRANSPOSE,
        first=3,
    )
    assert rule.stack_axes == 2 and rule.name((1, 7)) == "model.layers.4.mlp.experts.7.up_proj.weight"
    assert Rule("lm_head.weight", ("language/head/kernel",)).name(()) == "lm_head.weight"
