"""Sums and gradients of a whole model's micro-step on products of axes, against one device in float32."""

from collections import Counter

import pytest

from mindvl_jax.parallel.exchanges import exchanges
from tests.parallel.meshes import compiled, differences, totals

ONE = (("data", 1),)
CONTEXT = (("context", 2),)
GATHER = "parallel.context_attention=all_gather"
LAYERS = 4  # two of the decoder, two of the tower


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        (CONTEXT, ()),
        pytest.param((("fsdp", 2), ("context", 2), ("tensor", 2)), (), marks=pytest.mark.slow),
        pytest.param((("context", 4),), (), marks=pytest.mark.slow),
        pytest.param(CONTEXT, (GATHER,), marks=pytest.mark.slow),
        pytest.param((("tensor", 2),), ("parallel.sequence_norms=true",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(axes, settings):
    loss, gradient = differences(totals(axes, *settings), totals(ONE))
    assert loss <= 1e-6 and gradient <= 1e-5, f"loss differs by {loss:.1e}, a gradient by {gradient:.1e}"


def test_spread_places_exchange_heads_visual_tokens_and_gradients_alone():
    found = [e for e in exchanges(compiled(CONTEXT)[0].as_text()) if e.is_float and len(e.shape) > 1]
    assert sum(e.kind == "all-to-all" for e in found) == 8 * LAYERS
    # The visual tokens of a row are read by its text wherever that lies: gathered, and their gradient summed.
    visual = Counter(e.kind for e in found if e.shape == (4, 28, 64))
    assert visual == {"all-gather": 1, "all-reduce": 1}
    rest = [e for e in found if e.kind not in ("all-to-all", "all-reduce") and e.shape != (4, 28, 64)]
    assert not rest, "\n".join(map(str, rest))
