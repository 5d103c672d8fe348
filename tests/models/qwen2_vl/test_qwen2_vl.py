"""Qwen2-VL against transformers on a tiny model whose parameters are all random: logits, gradients, positions, answers,
files.
"""

import functools
import importlib.util
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

from mindvl_jax.cli.main import main
from mindvl_jax.config import families, loader
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.registry import spec_of
from mindvl_jax.models.vision_language.positions import rotary_positions
from mindvl_jax.parity.check import mean_kl
from mindvl_jax.parity.reference import load_reference
from mindvl_jax.parity.samples import pack, random_sample, reference_inputs
from mindvl_jax.weights import load_parameters, open_model, save_parameters
from mindvl_jax.weights.companions import write_companions
from mindvl_jax.weights.errors import WeightsError
from mindvl_jax.weights.mapping import read_config, slots
from npu_bridge import ops
from tests.models import against_transformers as against

ROOT = Path(__file__).parents[3]
WIDTHS = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
VISION = dict(depth=3, embed_dim=32, hidden_size=64, mlp_ratio=4, num_heads=2)


def published(tokens, vocabulary, folder, *, tied=False, seed=0):
    """A folder written by transformers.

    Norms are away from one and biases away from zero, so that none can be forgotten unseen.
    """
    text = dict(
        WIDTHS,
        vocab_size=vocabulary,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tied, **tokens)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
        gain = 1.3 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = 1 + 0.1 * noise if is_norm else noise * gain
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tokens = dict(image_token_id=192, video_token_id=193, vision_start_token_id=190, vision_end_token_id=191)
    folder = published(tokens, 200, tmp_path_factory.mktemp("qwen2-vl"))
    config = read_config(folder).model_copy(update=dict(compute_dtype="float32"))
    return types.SimpleNamespace(
        folder=folder, config=config, reference=load_reference(folder), parameters=load_parameters(folder, config)
    )


@pytest.fixture(scope="module")
def compared(made):
    """(samples with row and place, their reference logits, our logits and gradients on the packed rows)."""
    draw = functools.partial(random_sample, made.config, np.random.default_rng(7))
    samples = [
        draw(3, ("image", (1, 6, 10)), 5),
        draw(("image", (1, 2, 2)), 2, ("image", (1, 8, 6)), 1, ("image", (1, 4, 4)), 3),
        draw(2, ("video", (3, 4, 6), 1.5), 4, ("image", (1, 4, 2)), 2),
        draw(12),
    ]
    rows, reference = [[samples[0], samples[3]], [samples[1], samples[2]]], made.reference
    logits = []
    for sample in samples:
        out = reference(**reference_inputs(sample, made.config))
        nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(sample.tokens[1:]), reduction="none")
        (nll * torch.tensor(sample.learned[1:]).float()).sum().backward()
        logits.append(out.logits[0].detach().numpy())
    batch = jax.tree.map(jnp.asarray, pack(rows, made.config, reference, tokens=90, patches=168))
    outline = outline_of(made.config)

    def run(params, batch):
        def total(params):
            model = outline.merge(params)
            hidden = model(batch, max_sample_length=80, max_image_patches=80)
            loss = ops.cross_entropy(hidden, model.head_kernel(), batch.targets, batch.loss_weights, chunk=64)
            return loss.sum(), model.logits(hidden)

        return jax.value_and_grad(total, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        (_, ours), grads = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(made.parameters, batch)
    where = {}
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            where[id(sample)] = b, slice(start, start + len(sample.tokens))
            start += len(sample.tokens)
    return [where[id(sample)] for sample in samples], logits, np.asarray(ours), jax.device_get(grads)


def test_logits_of_packed_images_videos_and_text_equal_those_of_transformers(compared):
    places, theirs, ours, _ = compared
    worst = max(float(np.abs(ours[place] - want).max()) for place, want in zip(places, theirs, strict=True))
    kl = max(mean_kl(ours[place], want) for place, want in zip(places, theirs, strict=True))
    assert min(want.std() for want in theirs) > 0.1, (
        "the reference logits hardly vary: the comparison would prove nothing"
    )
    assert worst < 1e-4, f"largest logit difference {worst:.2e}"
    assert kl < 1e-6, f"mean KL {kl:.2e}"


def test_the_gradient_of_every_parameter_equals_that_of_transformers(made, compared):
    grads, theirs = compared[3], dict(made.reference.named_parameters())
    seen, worst = set(), ("", 0.0)
    for slot in slots(made.config, {path: value.shape for path, value in grads.items()}):
        name = (
            "model." + slot.name
            if slot.name.startswith("visual.")
            else slot.name.replace("model.", "model.language_model.", 1)
        )
        for path, want in zip(
            slot.rule.ours, slot.rule.form.to_ours(theirs[name].grad.numpy(), slot.shapes), strict=True
        ):
            relative = float(np.linalg.norm(grads[path][slot.index] - want) / np.linalg.norm(want))
            worst = max(worst, (f"{path}{list(slot.index)}", relative), key=lambda pair: pair[1])
            seen.add(path)
    assert seen == set(grads), f"never compared: {set(grads) - seen}"
    assert worst[1] < 1e-4, f"largest relative L2 difference {worst[1]:.2e} in {worst[0]}"


def test_positions_of_images_and_videos_are_those_of_transformers(made):
    """The temporal position counts frame pairs, whatever time lies between them."""
    sample = random_sample(
        made.config, np.random.default_rng(1), 3, ("image", (1, 4, 6)), 2, ("video", (5, 4, 4), 0.7), 4
    )
    inputs = reference_inputs(sample, made.config)
    want = made.reference.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        video_grid_thw=inputs["video_grid_thw"], attention_mask=inputs["attention_mask"],
    )[0][:, 0]  # fmt: skip
    starts = [
        int(np.flatnonzero(sample.tokens == token)[0])
        for token in (made.config.image_token_id, made.config.video_token_id)
    ]
    spans = [(starts[0], (1, 4, 6), None), (starts[1], (5, 4, 4), 0.7)]
    vision = made.config.vision
    ours = rotary_positions(
        len(sample.tokens),
        spans,
        merge=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
        mrope=True,
    )
    np.testing.assert_array_equal(ours, want.numpy())


def test_an_adapter_of_peft_in_every_part_works_as_there(made, tmp_path):
    against.check_adapter(made, tmp_path, (2, ("image", (1, 4, 6)), 3), ["qkv", "fc2", "mlp.0", "q_proj", "down_proj"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_comes_back_with_the_same_bytes_and_opens_in_transformers(tmp_path, tied):
    tokens = dict(image_token_id=92, video_token_id=93, vision_start_token_id=90, vision_end_token_id=91)
    folder = published(tokens, 96, tmp_path / "in", tied=tied)
    config = read_config(folder)
    assert spec_of(config).name == "qwen2_vl" and config.text.tie_word_embeddings == tied
    save_parameters(tmp_path / "out", config, load_parameters(folder, config))
    write_companions(tmp_path / "out", config, None, 3136, 100352)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    canonical = {spec_of(config).hf.get().canonical(name): tensor for name, tensor in before.items()}
    assert set(canonical) == set(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, canonical[name]), name
    assert read_config(tmp_path / "out") == config
    again = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items() if name in before)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").size["longest_edge"] == 100352


def test_another_activation_is_refused(made):
    import json

    from mindvl_jax.models.hf import ConfigReader
    from mindvl_jax.models.qwen2_vl.hf import read_config as read

    content = json.loads((made.folder / "config.json").read_text())
    content["vision_config"]["hidden_act"] = "silu"
    reader = ConfigReader()
    read(content, reader)
    assert reader.problems == ["vision_config.hidden_act is 'silu'; supported: 'quick_gelu'"]


def test_mindvl_parity_finds_the_same_mathematics_part_by_part(made, tmp_path, capsys):
    assert (
        main(["parity", "--weights", str(made.folder), "--out", str(tmp_path), "--samples", "3", "--text-tokens", "6"])
        == 0
    )
    out = capsys.readouterr().out
    assert "same mathematics" in out and "vision block" in out and "projector" in out and "mlp" in out


def test_greedy_answers_about_images_are_those_of_transformers(tmp_path):
    """Prompts without, with one and with two images, answered together; there one by one."""
    spec = importlib.util.spec_from_file_location("inference_fixtures", ROOT / "tests" / "inference" / "conftest.py")
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    (tmp_path / "tokenizer").mkdir()
    tokenizer = fixtures.byte_tokenizer(tmp_path / "tokenizer")
    names = dict(
        image_token_id="image_pad",
        video_token_id="video_pad",
        vision_start_token_id="vision_start",
        vision_end_token_id="vision_end",
    )
    folder = published(
        {key: tokenizer.token_id(f"<|{name}|>") for key, name in names.items()},
        tokenizer.vocab_size,
        tmp_path / "model",
        seed=4,
    )
    (folder / "tokenizer.json").write_bytes(Path(tokenizer._file).read_bytes())
    generator = Generator(open_model(folder), slots=3, context=256)
    reference = load_reference(folder)
    drawn, low, high = iter(fixtures.pictures(9, seed=9, largest=84)), 28 * 28, 28 * 28 * 12
    images = [[next(drawn) for _ in range(number % 3)] for number in range(6)]
    requests = [
        Request.from_prompt(
            f"what is number {number}?",
            shown,
            id=str(number),
            sampling=Sampling(max_new_tokens=5 + number % 3),
            min_pixels=low,
            max_pixels=high,
        )
        for number, shown in enumerate(images)
    ]
    processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    answers = generator.generate(requests)
    for request, shown, answer in zip(requests, images, answers, strict=True):
        ids = torch.tensor([generator.encode(request).example.tokens.tolist()])
        inputs = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == tokenizer.token_id("<|image_pad|>")).int(),
        )
        if shown:
            inputs |= dict(processor(images=shown, return_tensors="pt"))
        with torch.no_grad():
            want = reference.generate(
                **inputs,
                max_new_tokens=request.sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=list(generator.eos_ids),
                pad_token_id=generator.eos_ids[-1],
            )
        assert list(answer.tokens) == want[0, ids.shape[1] :].tolist(), f"prompt {request.id} with {len(shown)} images"
    assert len({answer.tokens for answer in answers}) > 3, (
        "the prompts hardly matter: the comparison would prove little"
    )


# Written out from the published sizes: vocabulary, width, feed-forward, layers, heads, kv heads, tied.
@pytest.mark.parametrize("name, sizes", [
    ("qwen2-vl-2b", (151936, 1536, 8960, 28, 12, 2, True)),
    ("qwen2-vl-7b", (152064, 3584, 18944, 28, 28, 4, False)),
    ("qwen2-vl-72b", (152064, 8192, 29568, 80, 64, 8, False)),
])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, sizes):
    V, D, F, L, N, K, tied = sizes
    layer = D * N * 128 + 2 * D * K * 128 + N * 128 * D + 3 * D * F + 2 * D + (N + 2 * K) * 128
    decoder = V * D * (1 if tied else 2) + L * layer + D
    W = 1280
    block = 4 * W * W + 4 * W + 2 * 4 * W * W + 5 * W + 4 * W
    merger = 2 * W + (4 * W) ** 2 + 4 * W + 4 * W * D + D
    want = decoder + 3 * 2 * 14 * 14 * W + 32 * block + merger
    found = sum(like.size for like in outline_of(families.preset(name)).shapes.values())
    assert found == want, f"{name}: {found:,} against {want:,}"
    with torch.device("meta"):
        text = dict(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=L,
            num_attention_heads=N,
            num_key_value_heads=K,
            tie_word_embeddings=tied,
        )
        theirs = transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(text_config=text, vision_config=dict(hidden_size=D), tie_word_embeddings=tied)
        )
    assert found == sum(parameter.numel() for parameter in theirs.parameters()), "transformers' class counts otherwise"


def test_the_shipped_recipe_loads_and_its_vision_freezes_by_the_parts_of_the_family():
    config = loader.load(ROOT / "configs" / "qwen2-vl-7b.yaml")
    assert config.model == families.preset("qwen2-vl-7b").model_copy(
        update=dict(preset="qwen2-vl-7b", remat=config.model.remat)
    )
    assert set(spec_of(config.model).parts) == {"vision", "projector", "language"}


def test_a_folder_without_a_tower_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl", "hidden_size": 8}')
    with pytest.raises(WeightsError, match="vision_config is missing"):
        read_config(tmp_path)


def test_the_modules_state_is_what_the_outline_says(made):
    model = outline_of(made.config).merge(made.parameters)
    assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == set(
        made.parameters
    )
