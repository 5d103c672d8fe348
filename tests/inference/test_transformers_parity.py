"""Greedy generation against transformers' `generate`, one prompt at a time there, batched here."""

import os
import shutil

import numpy as np
import pytest
import torch
import transformers

from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.weights import open_model

PROMPTS = int(os.environ.get("MINDVL_PARITY_PROMPTS", "50"))
GENERATED = 6  # of them by transformers' `generate`, token after token; the others by one pass over prompt and answer
WIDTHS = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def _spread(model, seed):
    """Weights of unit gain: with the library's 0.02 every prompt would end in the same token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.3 / parameter[0].numel() ** 0.5, generator=generator)
    return model.float().eval()


def _qwen2_5_vl(tokenizer):
    ids = {
        name: tokenizer.token_id(f"<|{token}|>")
        for name, token in dict(
            image_token_id="image_pad",
            video_token_id="video_pad",
            vision_start_token_id="vision_start",
            vision_end_token_id="vision_end",
        ).items()
    }
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
        window_size=56,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    text = dict(
        vocab_size=tokenizer.vocab_size,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
        **WIDTHS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    )


def _qwen3(tokenizer):
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=tokenizer.vocab_size,
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e4),
            **WIDTHS,
        )
    )


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3"])
def pair(request, tokenizer, tmp_path_factory):
    """(is it multimodal, transformers' model, ours opened from its saved folder)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    reference = _spread({"qwen2.5-vl": _qwen2_5_vl, "qwen3": _qwen3}[request.param](tokenizer), seed=4)
    reference.save_pretrained(folder)
    shutil.copy(tokenizer._file, folder / "tokenizer.json")
    return request.param != "qwen3", reference, open_model(folder)


def _inputs(tokens, pictures, image_token, pixels):
    inputs = dict(input_ids=torch.tensor([tokens]))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if image_token is not None:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).int()
    if pictures:
        processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
            size={"shortest_edge": pixels[0], "longest_edge": pixels[1]}
        )
        inputs |= dict(processor(images=pictures, return_tensors="pt"))
    return inputs


def _generated(model, tokens, pictures, eos, image_token, steps, pixels):
    with torch.no_grad():
        out = model.generate(
            **_inputs(tokens, pictures, image_token, pixels),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=list(eos),
            pad_token_id=eos[-1],
        )
    return out[0, len(tokens) :].tolist()


def _best_after_each_prefix(model, tokens, answer, pictures, eos, image_token, steps, pixels):
    """The likeliest token after the prompt and each part of the answer: the answer itself, if it is the greedy one.

    It must also end where greedy decoding would.
    """
    assert len(answer) == steps or answer[-1] in eos, "an answer that is not at its length ends with an end token"
    assert not set(answer[:-1]).intersection(eos), "an answer goes on after its end token"
    with torch.no_grad():
        logits = model(**_inputs([*tokens, *answer[:-1]], pictures, image_token, pixels)).logits[0]
    return logits[len(tokens) - 1 :].argmax(-1).tolist()


def test_greedy_tokens_of_mixed_prompts_are_those_of_transformers(pair, draw_pictures):
    sees, reference, opened = pair
    generator = Generator(opened, slots=4, context=256)
    random = np.random.default_rng(5)
    drawn = iter(draw_pictures(3 * PROMPTS, seed=9, largest=84))
    pixels = (28 * 28, 28 * 28 * 12)
    requests, pictures = [], []
    for index in range(PROMPTS):
        pictures.append([next(drawn) for _ in range(index % 3)] if sees else [])
        words = " ".join(random.choice(["what", "is", "here", "?", "read", "the", "number"], random.integers(1, 9)))
        requests.append(
            Request.from_prompt(
                words,
                pictures[-1],
                id=str(index),
                sampling=Sampling(max_new_tokens=int(random.integers(4, 12))),
                min_pixels=pixels[0],
                max_pixels=pixels[1],
            )
        )
    ours = generator.generate(requests)
    image_token = opened.config.image_token_id if sees else None
    different = []
    for number, (request, images, answer) in enumerate(zip(requests, pictures, ours, strict=True)):
        prompt = generator.encode(request).example.tokens.tolist()
        rest = (images, generator.eos_ids, image_token, request.sampling.max_new_tokens, pixels)
        theirs = (
            _generated(reference, prompt, *rest)
            if number < GENERATED
            else _best_after_each_prefix(reference, prompt, list(answer.tokens), *rest)
        )
        if list(answer.tokens) != theirs:
            different.append(f"{request.id}: ours {list(answer.tokens)}, transformers {theirs}")
    assert not different, f"{len(different)} of {PROMPTS} differ\n" + "\n".join(different)
    assert len({answer.tokens for answer in ours}) > PROMPTS // 2, (
        "the prompts hardly matter: the comparison would prove little"
    )
