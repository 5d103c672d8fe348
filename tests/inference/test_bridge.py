"""Generation by programs that npu_bridge compiled: the tokens of the XLA programs."""

import types

import numpy as np
import pytest

from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.inference.backends import BridgePrograms


@pytest.fixture(scope="module")
def small(opened, tokenizer):
    """One image size only: few programs to compile twice."""
    return types.SimpleNamespace(model=opened.model, tokenizer=tokenizer, min_pixels=56 * 56, max_pixels=56 * 56)


def test_prompts_are_read_and_answers_decoded_as_by_xla(small, draw_pictures):
    requests = [
        Request.from_prompt(
            "look", draw_pictures(1, seed=4, largest=60), id="greedy", sampling=Sampling(max_new_tokens=5)
        ),
        Request.from_prompt(
            "go", id="penalised", sampling=Sampling(max_new_tokens=4, repetition_penalty=1.5, ignore_eos=True)
        ),
        Request.from_prompt(
            "hm", id="sampled", sampling=Sampling(max_new_tokens=3, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
        ),
    ]
    theirs = Generator(small, slots=2, context=64).generate(requests)
    ours = Generator(small, slots=2, context=64, programs=BridgePrograms("cpu")).generate(requests)
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
    assert [answer.finish for answer in ours] == [answer.finish for answer in theirs]
    difference = max(np.abs(np.subtract(one.logprobs, other.logprobs)).max() for one, other in zip(ours, theirs))
    assert difference < 1e-4, f"max difference of log-probabilities {difference}"  # float32 sums in another order
