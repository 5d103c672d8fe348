"""Presets have the published sizes: parameters counted without building anything."""

import jax
import pytest

from mindvl_jax.config import families
from mindvl_jax.models.mindvl import presets
from mindvl_jax.models.outline import outline_of


def count(config, prefix=""):
    sizes = {path: like.size for path, like in outline_of(config).shapes.items()}
    return sum(size for path, size in sizes.items() if path.startswith(prefix))


def decoder_by_hand(V, D, F, L, N, K, H, tied, biases, norms):
    layer = (
        D * N * H
        + 2 * D * K * H
        + N * H * D
        + 3 * D * F
        + 2 * D
        + (N * H + 2 * K * H if biases else 0)
        + (2 * H if norms else 0)
    )
    return V * D * (1 if tied else 2) + L * layer + D


# Published figures in billions (three or four digits).
@pytest.mark.parametrize(
    "name, billions",
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-4b", 4.022), ("qwen3-8b", 8.191), ("qwen3-32b", 32.76)],
)
def test_qwen3_has_its_published_number_of_parameters(name, billions):
    found = count(families.preset(name))
    assert abs(found / 1e9 - billions) < 0.0006 * max(1, billions / 8), (
        f"{name}: {found / 1e9:.4f} B against {billions} B"
    )


@pytest.mark.parametrize(
    "name, billions",
    [("qwen2.5-vl-3b", 0.669), ("qwen2.5-vl-7b", 0.677), ("qwen2.5-vl-32b", 0.689), ("qwen2.5-vl-72b", 0.705)],
)
def test_qwen2_5_vl_tower_and_merger_have_their_published_number_of_parameters(name, billions):
    config = families.preset(name)
    found = count(config, "vision/") + count(config, "projector/")
    assert abs(found / 1e9 - billions) < 0.0006, f"{name}: {found / 1e9:.4f} B against {billions} B"


# Written out from the table of sizes, not from the presets: vocabulary, width, feed-forward, layers, heads, kv heads,
# tied.
@pytest.mark.parametrize(
    "name, sizes",
    [
        ("qwen2.5-vl-3b", (151936, 2048, 11008, 36, 16, 2, True)),
        ("qwen2.5-vl-7b", (152064, 3584, 18944, 28, 28, 4, False)),
        ("qwen2.5-vl-32b", (152064, 5120, 27648, 64, 40, 8, False)),
        ("qwen2.5-vl-72b", (152064, 8192, 29568, 80, 64, 8, False)),
    ],
)
def test_qwen2_5_vl_decoders_count_as_their_sizes_say(name, sizes):
    V, D, F, L, N, K, tied = sizes
    found = count(families.preset(name), "language/")
    want = decoder_by_hand(V, D, F, L, N, K, 128, tied, biases=True, norms=False)
    assert found == want, f"{name}: {found:,} against {want:,}"


def test_mindvl_8b_is_qwen3_8b_with_the_tower_of_qwen2_5_vl():
    found = count(families.preset("mindvl-8b"))
    assert abs(found / 1e9 - 8.87) < 0.005, f"{found / 1e9:.3f} B against 8.87 B"


@pytest.mark.parametrize("name", sorted(presets.MODELS))
def test_every_preset_is_consistent_and_frozen(name):
    config = families.preset(name)
    assert max(config.vision.fullatt_block_indexes) < config.vision.depth
    assert max(config.image_token_id, config.video_token_id) < config.text.vocab_size
    assert hash(config) == hash(families.preset(name))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'qwen2.5-vl-7b'"):
        families.preset("qwen2.5-vl-7B")


def test_the_tiny_preset_is_a_few_million_parameters():
    assert 2e6 < count(families.preset("mindvl-tiny")) < 4e6


def test_presets_need_no_jax():
    import subprocess
    import sys

    code = (
        "import sys; from mindvl_jax.config import families; families.preset('mindvl-8b'); assert 'jax' not in "
        "sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_building_and_reading_presets_touches_no_device_memory():
    before = len(jax.live_arrays())
    assert outline_of(families.preset("qwen2.5-vl-72b")).shapes
    assert len(jax.live_arrays()) <= before + 2
