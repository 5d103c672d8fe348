"""Prompts that share a row: what fits where, and where each lies."""

import types

import numpy as np

from mindvl_jax.inference.buckets import Bucket, rows_for
from mindvl_jax.inference.engine import _places
from mindvl_jax.inference.prompts import arrange


def _prompt(tokens, patches=0, images=0):
    example = types.SimpleNamespace(image_lengths=np.full(images, 16), positions=np.arange(tokens)[None].repeat(3, 0))
    return types.SimpleNamespace(tokens=tokens, patches=patches, example=example)


def test_no_row_holds_more_than_its_bucket_and_every_prompt_lies_in_one():
    random = np.random.default_rng(0)
    bucket = Bucket(patches=128, tokens=128, images=4)
    prompts = [_prompt(int(random.integers(8, 129)), patches=16 * images, images=images) for images in random.integers(0, 5, 40)]
    rows = arrange(prompts, bucket)
    assert sorted(index for row in rows for index in row) == list(range(40))
    for row in rows:
        assert sum(prompts[index].tokens for index in row) <= bucket.tokens
        assert sum(prompts[index].patches for index in row) <= bucket.patches
        assert sum(len(prompts[index].example.image_lengths) for index in row) <= bucket.images
    assert len(rows) < 40 * 0.75, f"{len(rows)} rows: hardly any prompt shares one"


def test_small_prompts_fill_the_rows_that_large_ones_leave():
    prompts = [_prompt(20), _prompt(100), _prompt(10), _prompt(60), _prompt(60)]
    assert arrange(prompts, Bucket(patches=0, tokens=128, images=0)) == [[1, 0], [3, 4], [2]]


def test_places_say_where_each_answers_prompt_begins_and_goes_on():
    prompts = [_prompt(5), _prompt(7), _prompt(3)]
    places = _places(prompts, [[1, 0], [2]], [0, 0, 1, 2])  # two answers of the first prompt
    assert places.row.tolist() == [0, 0, 0, 1]
    assert places.start.tolist() == [7, 7, 0, 0]
    assert places.length.tolist() == [5, 5, 7, 3]
    assert places.position.tolist() == [5, 5, 7, 3]


def test_row_counts_come_from_a_short_ladder():
    assert [rows_for(count, 16) for count in (1, 2, 4, 5, 8, 9, 16)] == [1, 4, 4, 8, 8, 16, 16]
    assert {rows_for(count, 4) for count in range(1, 5)} == {4}
