"""Packing of prompts into rows: capacity, and positions in the row."""

import types

import numpy as np
import pytest

from mindvl_jax.inference.buckets import Bucket, rows_for
from mindvl_jax.inference.engine import _places
from mindvl_jax.inference.prefill import RowPlanner, arrange


def _prompt(tokens, patches=0, images=0):
    example = types.SimpleNamespace(image_lengths=np.full(images, 16), positions=np.arange(tokens)[None].repeat(3, 0))
    return types.SimpleNamespace(tokens=tokens, patches=patches, example=example)


def test_no_row_holds_more_than_its_bucket_and_every_prompt_lies_in_one():
    random = np.random.default_rng(0)
    bucket = Bucket(patches=128, tokens=128, images=4)
    prompts = [
        _prompt(int(random.integers(8, 129)), patches=16 * images, images=images)
        for images in random.integers(0, 5, 40)
    ]
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


@pytest.mark.parametrize(
    "compilation, most_sizes, least_filled",
    [(0, 20, 0.7), (2e11, 3, 0.5)],
    ids=["compiling costs nothing", "compiling costs seconds"],
)
def test_rows_hold_little_padding_and_a_small_model_hardly_compiles_for_it(
    opened, compilation, most_sizes, least_filled
):
    planner = RowPlanner(opened.model, slots=16)
    planner._compilation = compilation
    random = np.random.default_rng(0)

    def draw():
        return [
            _prompt(int(random.integers(17, 60)), patches=64 * images, images=images)
            for images in random.integers(0, 3, 16)
        ]

    real = padded = 0
    sizes = set()
    for _ in range(20):
        prompts = draw()
        bucket, count, rows = planner(prompts)
        assert sorted(index for row in rows for index in row) == list(range(16)) and len(rows) <= count
        assert all(
            sum(prompts[index].tokens for index in row) <= bucket.tokens
            and sum(prompts[index].patches for index in row) <= bucket.patches
            for row in rows
        )
        sizes.add((bucket, count))
        real, padded = (
            real + sum(prompt.tokens + prompt.patches for prompt in prompts),
            padded + count * (bucket.tokens + bucket.patches),
        )
    assert real / padded > least_filled, f"only {real / padded:.0%} of what is computed is a prompt"
    assert len(sizes) <= most_sizes, f"{len(sizes)} compilations for 20 batches alike"


def test_a_better_size_is_compiled_once_the_waste_would_have_paid_for_it(opened):
    planner = RowPlanner(opened.model, slots=4)
    large, small = [_prompt(200)] * 4, [_prompt(20)] * 4
    first = planner(large)[0]
    assert planner(small)[0] == first
    planner._compilation = 2.5 * planner._wasted.popitem()[1]
    assert [planner(small)[0] == first for _ in range(4)] == [True, True, False, False]
    assert planner(large)[0] == first


def test_on_a_mesh_rows_divide_over_its_groups(opened):
    _, count, _ = RowPlanner(opened.model, slots=16, groups=4)([_prompt(40) for _ in range(16)])
    assert count % 4 == 0


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
