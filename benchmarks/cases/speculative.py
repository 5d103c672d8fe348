"""Speculative decoding with an MTP head against plain decoding of the same model, at several rates of acceptance."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases.generation import write_tokenizer
from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


def build_model(config, context_share: float):
    """A DeepSeek-V3 with random weights, whose layers add `context_share` of what they would: what is left is a chain
    from each token to the next. Its head knows the chain and no context, so acceptance falls as the share grows.
    """
    import jax.numpy as jnp
    import numpy as np

    from mindvl_jax.models.outline import outline_of

    random, params, width = np.random.default_rng(3), {}, config.text.hidden_size
    for path, like in outline_of(config).shapes.items():
        value = random.normal(0, 1, like.shape)
        if path.endswith("scale"):
            value = np.ones(like.shape)
        elif len(like.shape) > 1 and not path.endswith("embedding"):
            value /= like.shape[-2] ** 0.5
        if path.endswith(("output/kernel", "down/kernel", "experts/down")):
            value *= 0.0 if "/mtp/" in path else context_share
        params[path] = jnp.asarray(value, jnp.float32)
    halves = np.concatenate([np.eye(width), np.zeros((width, width))])
    params["language/mtp/joint/kernel"] = jnp.asarray(halves[None], jnp.float32)
    return outline_of(config).merge(params)


@case("speculative")
def speculative_case(settings: Settings) -> Iterator[Comparison]:
    """Greedy answers with one drafted token a pass and without; equal tokens are checked before timing."""
    from mindvl_jax.config.schema import TokenizerConfig
    from mindvl_jax.data.text.tokenizer import load_tokenizer
    from mindvl_jax.inference import Generator, Request, Sampling, speculative
    from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
    from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig

    D, layers, new, vocabulary = (32, 2, 4, 300) if settings.dry else (512, 8, 64, 2048)
    routing = dict(scoring="sigmoid", renormalize=True, selection_bias=True, shared_experts=1)
    moe = MoEConfig(experts=8, experts_per_token=2, intermediate_size=D // 2, **routing)
    heads = dict(q_lora_rank=None, kv_lora_rank=D // 4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    sizes = dict(vocab_size=vocabulary, hidden_size=D, intermediate_size=3 * D, num_layers=layers, num_heads=D // 32)
    text = DeepSeekV3TextConfig(**sizes, **heads, dense_layers=1, moe=moe, mtp_layers=1)
    config = DeepSeekV3Config(text=text, compute_dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch), vocabulary)
        tokenizer = load_tokenizer(TokenizerConfig(path=str(Path(scratch) / "tokenizer.json")))
    rates = ((0.0, 1),) if settings.dry else ((0.0, 1), (0.06, 1), (0.0, 8), (0.06, 8))
    for share, count in rates:
        model = build_model(config, share)
        opened = types.SimpleNamespace(model=model, tokenizer=tokenizer, min_pixels=784, max_pixels=784)
        asked = Sampling(max_new_tokens=new, ignore_eos=True)
        requests = [
            Request.from_prompt(chr(97 + number) * 9, id=str(number), sampling=asked) for number in range(count)
        ]
        ours = Generator(opened, slots=count, context=128, programs=speculative)
        plain = Generator(opened, slots=count, context=128)
        found, expected = ([answer.tokens for answer in side.generate(requests)] for side in (ours, plain))
        if found != expected:
            raise AssertionError("speculative decoding gave other tokens than plain greedy decoding")
        drafted, accepted = ours.drafts
        yield Comparison(
            f"{count} at a time, {accepted / drafted:.0%} of the drafts accepted",
            [
                Side(name, lambda side=side, requests=requests: side.generate(requests), {"tokens": count * new})
                for name, side in (("drafting with the MTP head", ours), ("plain", plain))
            ],
            unit="tokens",
            checked={"drafted": float(drafted), "accepted": float(accepted)},
            bars={"plain": 1.5},
            note=f"{new} new tokens each, prompt included; {layers} layers of width {D}, float32. Random weights made "
            "so that the head knows the next token as often as shown.",
        )
