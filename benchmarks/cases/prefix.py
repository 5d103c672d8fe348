"""First token of a prompt whose beginning was read before, against reading it whole."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases.generation import write_model
from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


@case("prefix")
def prefix_case(settings: Settings) -> Iterator[Comparison]:
    """A picture and a long text that stay, with another question each time; picture processing included."""
    import numpy as np
    from PIL import Image

    from mindvl_jax.inference import Generator, Request, Sampling
    from mindvl_jax.weights import open_model

    words, pixels = (300, 784 * 4) if settings.dry else (1900, 784 * 64)
    context = 512 if settings.dry else 2560
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), "dry" if settings.dry else "small")
        opened = open_model(Path(scratch))
    text = "".join(rng.choice(list("abcdefghij "), words))
    picture = Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8))
    keeping = Generator(opened, slots=4, context=context, prefix_bytes=1 << 30)
    plain = Generator(opened, slots=4, context=context)
    questions = {generator: itertools.count() for generator in (keeping, plain)}

    def ask(generator: Generator) -> tuple[int, ...]:
        asked = Request.from_prompt(
            f"<image>{text}Question {next(questions[generator]):04d}?",
            [picture],
            sampling=Sampling(max_new_tokens=1, ignore_eos=True),
            min_pixels=784,
            max_pixels=pixels,
        )
        return generator.generate([asked])[0].tokens

    one, two = ([ask(generator) for _ in range(6)] for generator in (keeping, plain))
    if one != two or not keeping._engine.reused_tokens > 5 * words * 0.9:
        raise AssertionError("the sides do not answer alike, or the beginning was read again")
    tokens = keeping.encode(Request.from_prompt(f"<image>{text}Question 0000?", [picture], max_pixels=pixels)).tokens
    yield Comparison(
        f"first token of {tokens} prompt tokens with a picture",
        [
            Side("beginning known", lambda: ask(keeping), {"prompts": 1.0}),
            Side("read whole", lambda: ask(plain), {"prompts": 1.0}),
        ],
        unit="prompts",
        bars={"read whole": 10.0},
        checked={"equal first tokens": "6 of 6"},
    )
