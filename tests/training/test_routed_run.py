"""MindVL with a routed decoder under the trainer: load, selection bias, accumulation, devices, resume."""

import jax
import numpy as np
import pytest

from mindvl_jax.config import loader as config_loader
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.flops import FlopCounter
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.objectives.routed_sft import BIAS, MTP_BIAS
from mindvl_jax.training.trainer import train
from mindvl_jax.weights import open_model

TEXT = {
    "family": "deepseek_v3",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 3,
    "dense_layers": 1,
    "num_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "mtp_layers": 1,
    "moe": {
        "experts": 8,
        "experts_per_token": 2,
        "intermediate_size": 16,
        "shared_experts": 1,
        "scoring": "sigmoid",
        "selection_bias": True,
        "groups": 2,
        "groups_kept": 1,
        "renormalize": True,
        "scale": 2.5,
        "bias_update_rate": 0.01,
        "balance_loss": 0.01,
        "balance": "sequence",
    },
}


@pytest.fixture
def routed_config(run_mapping, monkeypatch):
    # Pages are drawn and tested elsewhere; here they would take most of the time.
    monkeypatch.setattr("mindvl_jax.evaluation.report.write_report", lambda run_dir: f"{run_dir}/report.html")

    def make(*phases, **options):
        mapping = run_mapping(*phases, **options)
        mapping["model"] |= {"family": "mindvl_moe", "text": TEXT}
        return config_loader.from_mapping(mapping)

    return make


def _parameters(config) -> dict:
    return {path: np.asarray(value) for path, value in open_model(config.run.dir).parameters().items()}


def test_every_token_reaches_its_experts_and_the_bias_moves_once_a_step_by_the_global_load(routed_config, read_metrics):
    config = routed_config({"steps": 4})
    assert train(config).finished
    rows = read_metrics(config)
    assert all(row["dropped_tokens"] == 0 for row in rows)
    assert all(row["expert_load_worst"] >= row["expert_load_mean"] >= 1 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["mtp_loss"] < rows[0]["mtp_loss"]
    loads = [row[f"expert_load/{layer}.{expert}"] for row in rows for layer in range(3) for expert in range(8)]
    assert abs(np.mean(loads) - 1) < 1e-3 and rows[0]["router_bias"] == 0
    np.testing.assert_allclose([row["router_bias"] for row in rows[1:]], [0.01, 0.02, 0.03], atol=0.0101)
    parameters = _parameters(config)
    bias = np.concatenate([parameters[BIAS], parameters[MTP_BIAS]])
    # Four moves of one hundredth, up, down or (at exactly the mean) not at all; Adam adds nothing, as the bias has no
    # gradient.
    moves = bias / 0.01
    assert np.abs(moves - np.round(moves)).max() < 1e-4 and 0 < np.abs(moves).max() <= 4.001


@pytest.mark.parametrize(
    "other",
    [
        dict(phase={"rows": 4, "gradient_accumulation": 2}),
        # Half a minute of compilation; experts on meshes are in tests/parallel/test_experts.py.
        pytest.param(dict(phase={"rows": 8}, mesh={"data": 2, "fsdp": 2, "tensor": 2}), marks=pytest.mark.slow),
    ],
    ids=["accumulated", "eight devices"],
)
def test_one_step_moves_the_bias_as_one_large_batch_on_one_device(routed_config, other):
    """One step: after it the balancing terms, means within a micro-batch, differ a little, and a load near the mean may
    tip over.
    """
    phase, options = other["phase"], {name: value for name, value in other.items() if name == "mesh"}
    whole = routed_config({"steps": 1, "rows": 8}, name="whole")
    apart = routed_config({"steps": 1, **phase}, name="apart", **options)
    for config in (whole, apart):
        train(config)
    expected, found = map(_parameters, (whole, apart))
    for bias in (BIAS, MTP_BIAS):
        assert np.any(expected[bias])
        np.testing.assert_array_equal(found[bias], expected[bias])
    if not options:
        return
    for path, value in found.items():
        # Adam's first step is the sign of the gradient times the rate (3e-3): only gradients near 0 may differ.
        assert np.mean(np.abs(value - expected[path]) > 1e-4) < 0.01, path


def test_a_run_that_is_stopped_resumes_to_equal_bits(routed_config):
    through = routed_config({"steps": 4}, name="through")
    stopped = routed_config({"steps": 4}, name="stopped")
    train(through)
    train(stopped, stop_after=2)
    train(stopped)
    expected = _parameters(through)
    for path, value in _parameters(stopped).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_frozen_decoder_keeps_its_bias(routed_config):
    config = routed_config({"steps": 2, "train": ["projector/**"]})
    train(config)
    assert not np.any(_parameters(config)[BIAS])


def test_flops_count_the_experts_that_a_token_passes(routed_config):
    config = routed_config()
    model, shapes = config.model, outline_of(config.model).shapes
    counter = FlopCounter(model, shapes, [])
    counts = dict.fromkeys(("label_tokens", "patches", "segment_squares", "image_squares", "window_squares"), 0.0) | {
        "tokens": 1.0
    }
    D, heads = 32, 4
    attention = D * 16 + 16 * heads * 16 + D * (16 + 8) + 16 * heads * 16 + heads * 8 * D
    routed = D * 8 + (2 + 1) * 3 * D * 16
    expected = 2 * (3 * attention + 3 * D * 64 + 2 * routed + (attention + routed + 2 * D * D))  # the last: MTP
    assert counter(counts).language == expected
    assert model.text.token_products * 2 == expected


def test_validation_scores_without_the_balancing_terms(routed_config):
    config = routed_config()
    objective = make_objective(config.model, config.training.phases[0], loss_chunk=64)
    held = objective.for_validation()
    assert objective.aux_shapes.shape == (3, 8) and held.aux_shapes is None and held.moe.balance_loss == 0
    assert objective.mtp_heads == 1 and held.mtp_heads == 0
    assert hash(held) != hash(objective) and jax.tree.leaves(objective.aux_shapes)
