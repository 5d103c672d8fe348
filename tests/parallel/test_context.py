"""Attention over rows whose places are spread: numbers of one device, and exactly the exchanges of each form."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import npu_bridge
from mindvl_jax.config.schema import MeshConfig, ParallelConfig
from mindvl_jax.parallel.activations import Placement, tracing
from mindvl_jax.parallel.attention import attention, key_head_copies, order_of_places
from mindvl_jax.parallel.exchanges import exchanges
from mindvl_jax.parallel.mesh import make_mesh

B, T, N, K, H = 2, 32, 4, 2, 8
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
# Segments cross the borders between devices (8 and 16 places); one row ends in padding.
IDS = np.stack(
    [np.select([np.arange(T) < a, np.arange(T) < 20, np.arange(T) < b], [1, 2, 3], 0) for a, b in ((5, 28), (9, 32))]
)
IDS = IDS.astype(np.int32)
WEIGHTS = RNG.random((B, T, N, H)).astype(np.float32) * (IDS > 0)[..., None, None]


# Causal without and with a promise of short segments; among all places, as towers attend, likewise.
KINDS = ((True, None), (True, 20), (False, None), (False, 16))


def program(*kinds):
    """Losses of each kind, and the gradients of each. Rings want causal rows in an order of their own."""

    def one(q, k, v, causal, longest):
        order, ids, weights = order_of_places(T) if causal else None, IDS, WEIGHTS
        if order is not None:
            q, k, v, ids, weights = (jnp.take(x, order, axis=1) for x in (q, k, v, ids, weights))
        out = attention(q, k, v, segment_ids=ids, causal=causal, max_segment_length=longest, padding="unread")
        return jnp.sum(jnp.square(out) * weights)

    def both(q, k, v):
        losses, pull = jax.vjp(lambda *a: [one(*a, *kind) for kind in kinds], q, k, v)
        return losses, [pull([jnp.float32(n == m) for m in range(len(kinds))]) for n in range(len(kinds))]

    return both


def placed_program(kinds, axes, form, manual=True):
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
    placement = Placement(mesh, parallel=ParallelConfig(context_attention=form), manual=manual)
    return tracing(program(*kinds), placement), NamedSharding(mesh, P(None, "context")), mesh


MESHES = [{"context": 4}, {"context": 2, "tensor": 2}]
HAND_COUNTED = {
    # q, k, v and the result change places, and so do their gradients.
    "ulysses": Counter({"all-to-all": 8}),
    "all_gather": Counter({"all-gather": 2, "reduce-scatter": 2}),
    # Of two devices: keys and values turn once (the backward pass reads what came); their gradients turn, and go home.
    "ring": Counter({"collective-permute": 2 + 2 + 2}),
}


KINDS_OF_BRIDGE = {"permute": "collective-permute"}


@functools.cache
def on_one_device():
    return jax.tree.map(np.asarray, jax.jit(program(*KINDS))(Q, KEYS, VALUES))


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("form", HAND_COUNTED)
def test_spread_places_attend_as_whole_rows(axes, form):
    spread, sharding, _ = placed_program(KINDS, axes, form)
    got = jax.jit(spread)(*(jax.device_put(x, sharding) for x in (Q, KEYS, VALUES)))
    want = on_one_device()
    assert np.allclose(got[0], want[0], rtol=1e-6, atol=0)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 1e-5 * np.linalg.norm(b.astype(np.float64))


@pytest.mark.parametrize("form", HAND_COUNTED)
def test_xla_exchanges_what_is_counted_by_hand(form):
    spread, sharding, _ = placed_program([(False, None)], {"context": 2}, form)
    compiled = jax.jit(spread, in_shardings=(sharding,) * 3).lower(Q, KEYS, VALUES).compile()
    assert Counter(e.kind for e in exchanges(compiled.as_text()) if e.shape) == HAND_COUNTED[form]


@pytest.mark.parametrize("form", HAND_COUNTED)
def test_the_bridge_exchanges_what_is_counted_by_hand(form):
    spread, sharding, mesh = placed_program([(False, None)], {"context": 2}, form, manual=False)
    whole = NamedSharding(mesh, P())
    lowered = npu_bridge.jit(
        spread,
        mesh=mesh,
        in_shardings=(sharding,) * 3,
        out_shardings=([whole], [(sharding,) * 3]),
        device="cpu",
    ).lower(Q, KEYS, VALUES)
    found = [c for c in lowered.collectives() if c["dtype"] == "f32" and c["shape"]]
    several = [{axis for axis in c["axes"] if mesh.shape[axis] > 1} for c in found]
    assert all(axes == {"context"} and c["times"] == 1 for axes, c in zip(several, found, strict=True))
    assert Counter(KINDS_OF_BRIDGE.get(c["kind"], c["kind"].replace("_", "-")) for c in found) == HAND_COUNTED[form]
    if form == "all_gather":
        assert {c["shape"] for c in found} == {(B, T, K, H)}


@pytest.mark.parametrize(
    ("heads", "key_heads", "places", "copies"),
    [(28, 4, 4, 1), (28, 4, 2, 1), (32, 2, 8, 4), (24, 6, 4, 2), (8, 8, 8, 1)],
)
def test_key_heads_are_repeated_as_often_as_needed_and_no_more(heads, key_heads, places, copies):
    assert key_head_copies(heads, key_heads, places) == copies
    assert key_heads * copies % places == 0 and heads % (key_heads * copies) == 0


def test_heads_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match="28 query heads cannot be spread over 8"):
        key_head_copies(28, 4, 8)
