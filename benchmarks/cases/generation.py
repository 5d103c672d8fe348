"""Prefill and decoding of prompts with images, against transformers' generate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Bytes, the control tokens, and fillers that only decoding sees: every id of the model has a text."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"w{number}" for number in range(vocabulary - len(alphabet) - len(SPECIAL))]
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate([*alphabet, *fillers])}, merges=[])
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    raw.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, name: str) -> None:
    """Write a Qwen2.5-VL folder with random weights of unit gain. Smaller ones give each prompt the same last token."""
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import workloads
    from mindvl_jax.config.schema import TokenizerConfig
    from mindvl_jax.data.text.tokenizer import load_tokenizer
    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.weights.save import save_parameters

    config = workloads.MODELS[name]("float32")
    write_tokenizer(folder, config.text.vocab_size)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(folder / "tokenizer.json")))
    marks = dict(
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    text = config.text.model_copy(
        update=dict(
            family="qwen2",
            head_dim=config.text.hidden_size // config.text.num_heads,
            tie_word_embeddings=False,
            mrope_section=_sections(config.text.hidden_size // config.text.num_heads),
        )
    )
    config = config.model_copy(update=dict(text=text) | {key: tokenizer.token_id(mark) for key, mark in marks.items()})
    rng = np.random.default_rng(0)

    def draw(path, shape):
        return (
            np.ones(shape)
            if path.endswith("scale")
            else np.zeros(shape)
            if path.endswith("bias")
            else rng.normal(0, 1.3 / shape[-2] ** 0.5, shape)
        )

    save_parameters(
        folder,
        config,
        {path: jnp.asarray(draw(path, s.shape), jnp.float32) for path, s in outline_of(config).shapes.items()},
    )


def _sections(head_dim: int) -> tuple[int, int, int]:
    """Height and width share three quarters of the half head, as in the published model; time has the rest."""
    half = head_dim // 2
    side = 3 * half // 8
    return half - 2 * side, side, side


@case("generation")
def generation_case(settings: Settings) -> Iterator[Comparison]:
    """Greedy answers to a batch of prompts with an image each; theirs padded on the left.

    Prompt reading alone, and with decoding.
    """
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from mindvl_jax.inference import Generator, Request, Sampling
    from mindvl_jax.weights import open_model

    torch.set_num_threads(settings.threads)
    count, longest, new = (2, 12, 3) if settings.dry else (16, 160, 48)
    low, high = 784, 784 * (4 if settings.dry else 32)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder, "dry" if settings.dry else "small")
        opened = open_model(folder)
        reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
    reference.generation_config.eos_token_id = None  # both sides run to the wanted length
    generator = Generator(opened, slots=count, context=None)
    pictures = [Image.fromarray(rng.integers(0, 256, (*rng.integers(60, 240, 2), 3), np.uint8)) for _ in range(count)]
    words = ["".join(rng.choice(list("abcdefghij  "), int(rng.integers(4, longest)))) for _ in range(count)]
    processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})

    def requests(tokens: int):
        return [
            Request.from_prompt(
                text,
                [picture],
                id=str(number),
                sampling=Sampling(max_new_tokens=tokens, ignore_eos=True),
                min_pixels=low,
                max_pixels=high,
            )
            for number, (text, picture) in enumerate(zip(words, pictures, strict=True))
        ]

    prompts = [generator.encode(request).example.tokens.tolist() for request in requests(1)]
    width = max(map(len, prompts))
    ids = torch.tensor([[opened.tokenizer.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    image_token = opened.config.image_token_id

    def theirs(tokens: int) -> list[list[int]]:
        visual = processor(images=pictures, return_tensors="pt")
        with torch.no_grad():
            out = reference.generate(
                input_ids=ids,
                attention_mask=mask,
                mm_token_type_ids=(ids == image_token).int(),
                **visual,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=opened.tokenizer.pad_id,
            )
        return out[:, width:].tolist()

    mine, their = [list(answer.tokens) for answer in generator.generate(requests(new))], theirs(new)
    same = float(np.mean([a == b for a, b in zip(mine, their, strict=True)]))
    # Another order of additions may break a near tie the other way; at most one answer may differ.
    if sum(a != b for a, b in zip(mine, their, strict=True)) > 1 or any(len(answer) != new for answer in mine):
        raise AssertionError(
            f"only {same:.0%} of the greedy answers are transformers': the sides do not do the same work"
        )
    prompt_tokens = float(sum(map(len, prompts)))
    note = (
        f"{count} prompts of {min(map(len, prompts))} to {width} tokens, one picture each, float32; picture "
        "processing included on both sides."
    )
    for name, tokens, unit, amount in (
        ("prompts read, one token each", 1, "prompt tokens", prompt_tokens),
        (f"{new} tokens each", new, "new tokens", float(count * new)),
    ):
        yield Comparison(
            name,
            [
                Side("ours", lambda tokens=tokens: generator.generate(requests(tokens)), {unit: amount}),
                Side("transformers generate, SDPA, padded", lambda tokens=tokens: theirs(tokens), {unit: amount}),
            ],
            unit=unit,
            checked={"share of equal answers": same},
            note=note,
        )
