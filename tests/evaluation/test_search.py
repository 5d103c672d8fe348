"""The search itself, on a task whose best setting is known."""

import numpy as np
import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation import search
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.search import Pixels, Trial

OWN = Pixels(784, 100352)
TRUTH = {784: 0.3, 3136: 0.6, 12544: 0.8, 50176: 0.5}


def _items(count):
    return [Item(id=str(index), messages=({"role": "user", "content": "q"},)) for index in range(count)]


def _measure(asked):
    def measure(pixels, part):
        low = OWN.min_pixels if pixels.min_pixels is None else pixels.min_pixels
        asked.append((pixels, len(part)))
        # Each sample has its own difficulty, the same for every setting.
        scores = tuple(float(np.random.default_rng(int(item.id)).random() < TRUTH[low]) for item in part)
        return Trial(pixels, scores, tuple(low // 784 for _ in part))

    return measure


def test_halving_finds_the_best_setting_with_fewer_questions_than_the_grid():
    grid = search.parse_grid("min_pixels=784:3136:12544:50176", OWN)
    halved, full = [], []
    best = search.halving(grid, _items(400), _measure(halved), start=50)[0]
    assert best.pixels.min_pixels == 12544
    assert search.full_grid(grid, _items(400), _measure(full))[0].pixels == best.pixels
    assert len(best.scores) == 400

    # Samples are cached, so a setting costs the most samples it was ever given.
    def cost(asked):
        return sum(max(count for pixels, count in asked if pixels == one) for one in {pixels for pixels, _ in asked})

    assert cost(halved) < 0.8 * cost(full), (cost(halved), cost(full))


def test_the_models_own_setting_stays_to_the_end():
    grid = search.parse_grid("min_pixels=3136:12544:50176", OWN)
    trials = search.halving(grid, _items(200), _measure([]), start=25)
    assert next(len(trial.scores) for trial in trials if trial.pixels == Pixels(None, None)) == 200


def test_equal_scores_go_to_the_cheaper_setting():
    trials = search.full_grid(
        [Pixels(None, None), Pixels(3136, None), Pixels(12544, None)],
        _items(5),
        lambda pixels, part: Trial(pixels, (1.0,) * 5, (pixels.min_pixels or 99999,) * 5),
    )
    assert trials[0].pixels == Pixels(3136, None)


@pytest.mark.parametrize("method", [search.full_grid, search.halving])
def test_a_setting_that_changes_nothing_does_not_beat_the_models_own(method):
    grid = [Pixels(None, None), Pixels(800, None), Pixels(1000, None)]
    trials = method(grid, _items(5), lambda pixels, part: Trial(pixels, (1.0,) * len(part), (7,) * len(part)))
    assert trials[0].pixels == Pixels(None, None)


def test_the_halves_share_no_group_and_do_not_depend_on_order():
    items = _items(100)

    def group(item):
        return str(int(item.id) // 4)

    validation, held_out = search.split_items(items, group)
    assert not {group(item) for item in validation} & {group(item) for item in held_out}
    assert {item.id for item in search.split_items(items[::-1], group)[0]} == {item.id for item in validation}
    with pytest.raises(UserError, match="too few"):
        search.split_items(items[:1], group)


def test_a_gain_comes_with_its_paired_interval():
    scores = np.random.default_rng(0).random(300) < 0.5
    better = scores | (np.random.default_rng(1).random(300) < 0.2)
    judged = search.judge(
        Trial(Pixels(None, None), tuple(scores.astype(float)), (4,) * 300),
        Trial(Pixels(3136, None), tuple(better.astype(float)), (8,) * 300),
    )
    assert judged["gain"] == pytest.approx(better.mean() - scores.mean(), abs=1e-4)
    assert 0 < judged["gain_ci95"][0] < judged["gain"] < judged["gain_ci95"][1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("size=3", "'size' cannot be searched"),
        ("min_pixels=a:b", "no list of areas"),
        ("min_pixels=0", "positive"),
        ("min_pixels=200000", "in every combination"),
    ],
)
def test_grids_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        search.parse_grid(text, OWN)


def test_combinations_that_are_no_range_are_left_out():
    assert search.parse_grid("min_pixels=784:200000,max_pixels=100352:401408", OWN) == [
        Pixels(None, None),
        Pixels(784, 100352),
        Pixels(784, 401408),
        Pixels(200000, 401408),
    ]


def test_the_picture_is_drawn_for_one_and_for_two_searched_sizes():
    for text in ("min_pixels=784:3136:12544", "min_pixels=784:3136,max_pixels=50176:100352"):
        trials = search.full_grid(search.parse_grid(text, OWN), _items(30), _measure([]))
        assert len(search.picture(trials, OWN, "task").axes) == 2
