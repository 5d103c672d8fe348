"""Pictures of a tiny random Flux pipeline, from the prompt on, against diffusers' own pipeline with the same noise."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.text.prompt_tokenizer import PromptTokenizer
from mindvl_jax.inference.diffusion.flow_schedule import FlowSchedule
from mindvl_jax.inference.diffusion.pipeline import Wish
from mindvl_jax.inference.diffusion.systems import open_folder
from mindvl_jax.models.flux.model import to_tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ("a red fox", "two blue boats at sea, and more than clip reads")
SIZE = dict(height=12, width=16)


def clip_tokenizer():
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), ",", ",</w>", "fo", "fox</w>", "re", "red</w>"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("f", "o"), ("fo", "x</w>"), ("r", "e"), ("re", "d</w>")]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=14)


def randomised(model, spread=0.12):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.ndim == 1) * ("norm" in name))
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    clip, wide = (
        clip_tokenizer(),
        T5TokenizerFast(
            vocab=[
                ("<pad>", 0.0),
                ("</s>", 0.0),
                ("<unk>", 0.0),
                ("\u2581", -2.0),
                *((letter, -3.0) for letter in LETTERS),
            ],
            extra_ids=0,
        ),
    )
    sizes = dict(vocab_size=len(clip), hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        text_encoder=randomised(
            CLIPTextModel(
                CLIPTextConfig(
                    **sizes,
                    max_position_embeddings=14,
                    eos_token_id=clip.eos_token_id,
                    bos_token_id=clip.bos_token_id,
                    pad_token_id=clip.pad_token_id,
                )
            )
        ),
        tokenizer=clip,
        text_encoder_2=randomised(
            T5EncoderModel(
                T5Config(
                    vocab_size=40,
                    d_model=12,
                    d_kv=6,
                    d_ff=16,
                    num_layers=2,
                    num_heads=2,
                    feed_forward_proj="gated-gelu",
                )
            )
        ),
        tokenizer_2=wide,
        transformer=randomised(
            FluxTransformer2DModel(
                in_channels=12,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=12,
                pooled_projection_dim=16,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        ),
        vae=randomised(
            AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=3,
                norm_num_groups=2,
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=0.3611,
                shift_factor=0.1159,
            )
        ),
    )


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_pictures_equal_those_of_diffusers(theirs, folder, cfg):
    pipeline, batch = open_folder(folder), 2
    wish = Wish(PROMPTS, steps=3, guidance=1.5, cfg=cfg, negative="a grey sea", text_length=20, batch=batch, **SIZE)
    noise = pipeline.noise(wish)
    ours = pipeline.draw(wish, noise=noise)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        list(PROMPTS),
        negative_prompt=["a grey sea"] * 2 if cfg > 1 else None,
        true_cfg_scale=cfg,
        guidance_scale=1.5,
        num_inference_steps=3,
        latents=torch.tensor(np.asarray(to_tokens(noise))),
        max_sequence_length=20,
        output_type="np",
        **SIZE,
    ).images
    assert expected.std() > 0.01, "the reference draws nothing"
    difference = np.abs(ours - expected).max()
    assert difference <= 1e-4, f"pictures differ by {difference:.1e}"
    assert pipeline.warnings == ["prompt 2 is longer than 14 tokens and was cut (tokenizer)", *pipeline.warnings[1:]]


def test_the_command_writes_pictures_that_depend_on_seed_and_number_alone(folder, tmp_path, capsys):
    common = ["imagine", "--weights", str(folder), "--size", "12x16", "--steps", "2", "--text-length", "8"]
    both = [*common, "--prompt", "a fox", "--prompt", "a boat", "--seed", "5"]
    assert main([*both, "--batch", "1", "--out", str(tmp_path / "one")]) == 0
    assert main([*both, "--batch", "3", "--out", str(tmp_path / "three")]) == 0
    for name in ("0000.png", "0001.png"):
        one, three = (np.asarray(Image.open(tmp_path / out / name), int) for out in ("one", "three"))
        assert one.shape == (12, 16, 3) and np.abs(one - three).max() <= 1
    record = json.loads((tmp_path / "one" / "imagine.json").read_text())
    assert record["seed"] == 5 and record["images"][1] == {"file": "0001.png", "prompt": "a boat", "number": 1}
    assert main([*both, "--out", str(tmp_path / "one")]) == 2  # nothing is overwritten
    assert main([*both, "--negative", "fog", "--out", str(tmp_path / "new")]) == 2
    assert main([*common[:3], "--size", "13x16", "--prompt", "a", "--out", str(tmp_path / "new")]) == 2
    assert "sides must be multiples of 4" in capsys.readouterr().err


def test_clip_tokenizers_of_two_files_read_as_in_transformers(folder, tmp_path):
    texts = ["A red  Fox", "", "boats, and red foxes don't", "<|endoftext|> fox", "x" * 40, "caf\u00e9 \u00df 12"]
    expected = clip_tokenizer()(texts, padding="max_length", max_length=14, truncation=True)["input_ids"]
    settings = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(settings["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in settings["merges"]))
    for place in (folder / "tokenizer", tmp_path):
        ids, cut = PromptTokenizer(place)(texts, 14)
        np.testing.assert_array_equal(ids, expected)
        assert 4 in cut and 0 not in cut


def test_sd3_pictures_equal_those_of_diffusers(theirs, tmp_path):
    torch.manual_seed(1)
    encoders = []
    for act in ("quick_gelu", "gelu"):
        sizes = dict(theirs.text_encoder.config.to_dict(), hidden_act=act, projection_dim=10)
        encoders.append(randomised(CLIPTextModelWithProjection(CLIPTextConfig(**sizes))))
    wide = T5Config(**dict(theirs.text_encoder_2.config.to_dict(), d_model=40))
    sd3 = StableDiffusion3Pipeline(
        transformer=randomised(
            SD3Transformer2DModel(
                sample_size=8,
                in_channels=3,
                out_channels=3,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=40,
                caption_projection_dim=16,
                pooled_projection_dim=20,
                pos_embed_max_size=6,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=theirs.vae,
        text_encoder=encoders[0],
        tokenizer=theirs.tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=theirs.tokenizer,
        text_encoder_3=randomised(T5EncoderModel(wide)),
        tokenizer_3=theirs.tokenizer_2,
    )
    sd3.save_pretrained(tmp_path)
    sd3.set_progress_bar_config(disable=True)
    pipeline = open_folder(tmp_path)
    wish = Wish(PROMPTS, steps=3, negative="a grey sea", text_length=20, **SIZE)
    noise = pipeline.noise(wish)
    expected = sd3(
        list(PROMPTS),
        negative_prompt=["a grey sea"] * 2,
        num_inference_steps=3,
        latents=torch.tensor(noise),
        max_sequence_length=20,
        output_type="np",
        **SIZE,
    ).images
    assert expected.std() > 0.01, "the reference draws nothing"
    difference = np.abs(pipeline.draw(wish, noise=noise) - expected).max()
    assert difference <= 1e-4, f"pictures differ by {difference:.1e}"


def test_noise_levels_equal_the_scheduler_of_the_folder(theirs, folder):
    schedule = FlowSchedule.read(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    for tokens, steps in ((12, 4), (1024, 28)):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        theirs.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        np.testing.assert_allclose(schedule.levels(steps, tokens), theirs.scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "'StableDiffusionPipeline' is not supported"),
        (
            "model_index.json",
            {"image_encoder": ["transformers", "CLIP"]},
            "parts that are not supported: image_encoder",
        ),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size is 2"),
        ("vae/config.json", {"latent_channels": 4}, "expected 4 times as many"),
    ],
)
def test_what_a_folder_asks_for_and_is_not_built_is_refused_by_name(folder, tmp_path, file, change, message):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path / "copy")
