"""Many prompts at once: continuous batching here and in transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases.generation import write_tokenizer
from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


def models(layers: int):
    """A Qwen3 of transformers with random weights, and the same opened here."""
    import torch
    import transformers

    from mindvl_jax.weights import open_model

    config = transformers.Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(config).eval()
    for name, value in reference.named_parameters():
        if value.ndim > 1:  # of unit gain: smaller ones give each prompt the same last token
            torch.nn.init.normal_(value, std=1.3 / value.shape[-1] ** 0.5 if "embed" not in name else 1.0)
    with tempfile.TemporaryDirectory() as scratch:
        reference.save_pretrained(scratch)
        write_tokenizer(Path(scratch), config.vocab_size)
        opened = open_model(scratch)
    return reference, opened


@case("continuous-batching")
def continuous_batching_case(settings: Settings) -> Iterator[Comparison]:
    """Greedy answers of equal length to prompts of many lengths, text alone: `generate_batch` of transformers has no
    pictures. Tokens in and out on both sides.
    """
    import numpy as np
    import torch
    import transformers

    from mindvl_jax.inference import Generator, Request, Sampling

    torch.set_num_threads(settings.threads)
    count, longest, new, layers = (2, 12, 3, 2) if settings.dry else (24, 120, 32, 8)
    reference, opened = models(layers)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghij "), int(length))) for length in rng.integers(8, longest, count)]
    generator = Generator(opened, slots=count, context=256)
    sampling = Sampling(max_new_tokens=new, ignore_eos=True)
    prompts = [generator.encode(Request.from_prompt(text)).example.tokens.tolist() for text in texts]
    settings_of_theirs = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=opened.tokenizer.pad_id
    )

    # Its defaults take all free memory anew at every call, which costs seconds: one manager, of a fitting size.
    manager = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=16 * count, max_batch_tokens=1024, max_requests_per_batch=count
    )

    def ours() -> list[list[int]]:
        return [list(answer.tokens) for answer in generator.generate(
            [Request.from_prompt(text, sampling=sampling) for text in texts])]  # fmt: skip

    def theirs() -> list[list[int]]:
        found = reference.generate_batch(
            inputs=prompts,
            generation_config=settings_of_theirs,
            continuous_batching_config=manager,
            persistent_manager=True,
            warmup=False,
        )
        by_prompt = {tuple(each.prompt_ids): each.generated_tokens for each in found.values()}
        return [list(by_prompt[tuple(prompt)]) for prompt in prompts]

    mine, their = ours(), theirs()
    same = float(np.mean([one == two for one, two in zip(mine, their, strict=True)]))
    # Another order of additions may break a near tie the other way; at most one answer may differ.
    if sum(one != two for one, two in zip(mine, their, strict=True)) > 1 or any(len(each) != new for each in mine):
        raise AssertionError(f"only {same:.0%} of the answers are transformers': the sides do not do the same work")
    amount = float(count * new)
    yield Comparison(
        f"{count} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {new} new tokens each",
        [
            Side("ours", ours, {"new tokens": amount}),
            Side("transformers, generate_batch (paged)", theirs, {"new tokens": amount}),
        ],
        unit="new tokens",
        bars={"transformers, generate_batch (paged)": 3.0},
        checked={"share of equal answers": same},
        note="float32; random weights.",
    )
