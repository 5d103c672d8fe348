"""Language models alone under the trainer: text is packed and learned, samples with images are refused and counted."""

import json

import numpy as np
import pytest

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.config import loader as config_loader
from mindvl_jax.data.sources.readers import open_sources
from mindvl_jax.models.layers.text_processor import TextProcessor
from mindvl_jax.models.vision_language.processor import VisionLanguageProcessor
from mindvl_jax.training.trainer import train
from tests.training.conftest import COLOURS
from tests.training.test_backend import launch
from tests.training.test_routed_run import TEXT as DEEPSEEK

QWEN = dict(
    vocab_size=264,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    tie_word_embeddings=False,
    rope="1d",
)
MOE = dict(experts=8, experts_per_token=2, intermediate_size=16, scoring="softmax", renormalize=True, balance_loss=0.01)
FAMILIES = {
    "qwen": dict(QWEN, family="qwen3", intermediate_size=64),
    "qwen3_moe": dict(QWEN, family="qwen3_moe", moe=MOE),
    "deepseek_v3": DEEPSEEK,
}
IMAGES = 2


@pytest.fixture(scope="module")
def texts(assets, tmp_path_factory):
    """40 conversations of one or two exchanges, of which two name an image."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = []
    for index in range(40):
        names = rng.choice(list(COLOURS), 1 + index % 2)
        content = [f"{'<image>' if turn == 0 and index < IMAGES else ''}Say {name}." for turn, name in enumerate(names)]
        messages = [
            {"role": role, "content": text}
            for question, name in zip(content, names, strict=True)
            for role, text in (("user", question), ("assistant", str(name)))
        ]
        lines.append({"id": f"text-{index}", "messages": messages, "images": ["none.png"] if index < IMAGES else []})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def text_mapping(run_mapping, texts):
    """`text_mapping(family, {phase changes}, name=folder, section={changes})`: a configuration as plain data."""

    def make(family, phase=None, **options):
        mapping = run_mapping({"sequence_length": 128, "patches_per_row": 0, **(phase or {})}, **options)
        mapping["model"] = {"family": family, "compute_dtype": "float32", "text": FAMILIES[family]}
        mapping["data"]["sources"] = {"squares": {"path": str(texts), "format": "jsonl"}}
        mapping["data"]["max_error_rate"] = 0.2
        return mapping

    return make


@pytest.mark.parametrize("family", ["qwen", "deepseek_v3"])
def test_a_run_packs_and_learns_text_and_counts_the_samples_with_images(text_mapping, read_metrics, family):
    config = config_loader.from_mapping(text_mapping(family, {"steps": 6, "learning_rate": 1e-2}))
    assert train(config).finished
    rows = read_metrics(config)
    losses = [row["loss"] for row in rows]
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0], losses
    assert all(row["samples"] > config.training.phases[0].rows for row in rows), "rows hold one sample each"
    assert all(row["flops"] > 0 and "patches" not in row for row in rows)
    if family != "qwen":
        assert all(row["dropped_tokens"] == 0 for row in rows)
    refused = [json.loads(line) for line in open(f"{config.run.dir}/quarantine.jsonl", encoding="utf-8")]
    assert {line["id"] for line in refused} == {f"text-{index}" for index in range(IMAGES)}
    assert all(f"model.family={family} is a language model alone" in line["message"] for line in refused)


def test_a_batch_holds_what_a_vision_language_family_writes_for_the_same_text(run_mapping, text_mapping, texts):
    seeing = config_loader.from_mapping(run_mapping({"sequence_length": 128}))
    reading = config_loader.from_mapping(text_mapping("qwen"))
    source = open_sources(reading.data.sources, ["squares"])[0]
    samples = [source[index] for index in range(IMAGES, IMAGES + 6)]
    made = []
    for kind, config in ((VisionLanguageProcessor, seeing), (TextProcessor, reading)):
        processor = kind(config, 0)
        examples = [processor.load(processor.encode(sample)) for sample in samples]
        made.append(processor.collate([examples[:2], examples[2:4], examples[4:6], []]).batch.fields())
    for name, value in made[1].items():
        if value is not None:
            np.testing.assert_array_equal(value, made[0][name], err_msg=name)
    assert {name for name, value in made[1].items() if value is not None} == set(
        TextProcessor.batch_spec(reading, reading.training.phases[0])
    )


@pytest.fixture(scope="module")
def routed_run():
    """One device's run of a routed family, made at its first use: (metrics, parameters)."""
    return {}


def _differences(config, metrics, routed_run, text_mapping, read_metrics) -> tuple[float, float, float]:
    """Largest relative difference from the run on one device: of a loss, a gradient norm, a parameter (L2)."""
    if not routed_run:
        single = config_loader.from_mapping(text_mapping("qwen3_moe", name="single"))
        assert train(single).finished
        routed_run["metrics"] = read_metrics(single)
        routed_run["parameters"] = checkpoint.load_params(single.run.dir)[1]
    assert all(row["dropped_tokens"] == 0 for row in metrics)
    pairs = list(zip(metrics, routed_run["metrics"], strict=True))
    assert all(found["tokens"] == want["tokens"] for found, want in pairs)
    loss, norm = (max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs) for key in ("loss", "grad_norm"))
    found, want = checkpoint.load_params(config.run.dir)[1], routed_run["parameters"]
    assert found.keys() == want.keys()
    worst = max(
        np.linalg.norm(np.asarray(found[path], np.float64) - want[path]) / np.linalg.norm(want[path]) for path in want
    )
    return loss, norm, float(worst)


@pytest.mark.parametrize("experts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_routed_family_trains_on_an_expert_axis_as_on_one_device(experts, routed_run, text_mapping, read_metrics):
    config = config_loader.from_mapping(text_mapping("qwen3_moe", mesh={"expert": experts}))
    assert train(config).finished
    loss, norm, parameter = _differences(config, read_metrics(config), routed_run, text_mapping, read_metrics)
    print(f"expert {experts}: {loss:.1e} {norm:.1e} {parameter:.1e}")
    assert loss <= 1e-6 and norm <= 1e-5 and parameter <= 1e-5, (loss, norm, parameter)


def test_a_routed_family_trains_in_two_processes_of_the_bridge_as_on_one_device(
    routed_run, text_mapping, read_metrics, tmp_path
):
    mapping = text_mapping("qwen3_moe")
    done = launch(tmp_path, mapping, 2, "backend=npu_bridge", "mesh.expert=2")
    assert done.returncode == 0, done.stdout + done.stderr
    config = config_loader.from_mapping(mapping)
    loss, norm, parameter = _differences(config, read_metrics(config), routed_run, text_mapping, read_metrics)
    print(f"bridge: {loss:.1e} {norm:.1e} {parameter:.1e}")
    assert loss <= 1e-6 and norm <= 1e-5 and parameter <= 1e-5, (loss, norm, parameter)
