"""Timing and statistics of the benchmarks, on work of known speed."""

import json

import numpy as np
import pytest

from benchmarks import page, results
from benchmarks.measure import Comparison, Side, interleave, measure, rate_ratio


def clockwork(durations):
    """(sides, clock): every side takes exactly so long by a clock that only they move."""
    now = [0.0]
    order = []

    def run(name, seconds):
        order.append(name)
        now[0] += seconds

    sides = [
        Side(name, lambda name=name, seconds=seconds: run(name, seconds), {"items": 10.0})
        for name, seconds in durations.items()
    ]
    return sides, lambda: now[0], order


def test_sides_take_turns_in_an_order_that_rotates_and_warm_up_is_dropped():
    sides, clock, order = clockwork({"a": 1.0, "b": 2.0, "c": 3.0})
    times = interleave(sides, seconds=0.0, least=3, warm_up=1, clock=clock)
    assert order == ["a", "b", "c", "a", "b", "c", "b", "c", "a", "c", "a", "b"], order
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}, times


def test_rounds_go_on_until_the_slowest_side_has_had_its_time():
    sides, clock, _ = clockwork({"fast": 0.25, "slow": 0.5})
    assert len(interleave(sides, seconds=4.0, least=2, clock=clock)["slow"]) == 8
    assert len(interleave(sides, seconds=0.1, least=5, clock=clock)["slow"]) == 5
    assert len(interleave(sides, seconds=1e9, least=2, most=6, clock=clock)["slow"]) == 6


def test_ratio_is_that_of_rates_and_its_interval_holds_it():
    noise = np.random.default_rng(0).normal(1, 0.05, 40)
    ratio = rate_ratio(1.0 * noise, 3.0 * noise[::-1], our_work=10, their_work=20, against="b")
    # Three times the time for twice the work: one and a half times the rate, up to the noise of a median of 40 at 5 %.
    assert abs(ratio.value - 1.5) < 0.05, f"ratio {ratio.value}"
    assert ratio.low < ratio.value < ratio.high and ratio.high - ratio.low < 0.15, ratio


def test_interval_shrinks_when_noise_is_common_to_a_round():
    slow_round = np.where(np.arange(30) % 3 == 0, 2.0, 1.0)
    ratio = rate_ratio(slow_round, 2 * slow_round, our_work=1, their_work=1, against="b")
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0), ratio


@pytest.mark.parametrize(
    "broken, words",
    [
        (
            dict(
                sides=[Side("a", lambda: None, {"items": 1.0}), Side("a", lambda: None, {"items": 1.0})], unit="items"
            ),
            "two sides have one name",
        ),
        (
            dict(
                sides=[Side("a", lambda: None, {"items": 1.0}), Side("b", lambda: None, {"tokens": 1.0})], unit="items"
            ),
            "b do not say how many items",
        ),
        (dict(sides=[Side("a", lambda: None, {"items": 1.0})], unit="items", bars={"b": 2.0}), "which are not sides"),
    ],
)
def test_comparison_of_unlike_things_is_refused(broken, words):
    with pytest.raises(ValueError, match=words):
        Comparison("c", **broken)


@pytest.fixture
def record():
    ours = Side("ours", lambda: sum(range(200)), {"items": 2.0}, {"compile s": 0.5})
    timed = measure(
        Comparison(
            "timed",
            [ours, Side("other <b>", lambda: sum(range(2000)), {"items": 2.0})],
            unit="items",
            checked={"loss difference": 1e-7},
            bars={"other <b>": 2.0},
            bound=1e-9,
        ),
        seconds=0.0,
        least=20,
    )
    sizes = measure(
        Comparison("sizes", [Side("ours", size=50.0), Side("other", size=100.0)], unit="MiB"), seconds=0.0, least=2
    )
    about = dict(date="2026-01-02T03:04:05+00:00", commit="abc1234", threads=1, processor="x")
    return json.loads(
        json.dumps(
            dict(
                machine=about,
                suite="cpu",
                settings=dict(dry=False),
                cases={"case": dict(summary="s", comparisons=[timed, sizes], seconds=1.0, failed=False)},
            )
        )
    )


def test_stored_run_reads_back_and_shows_in_table_and_page(record, tmp_path):
    path, html = page.write(record, tmp_path)
    assert results.read(path) == record
    again, _ = page.write(record, tmp_path)
    assert again != path, "a second run overwrote the first"
    text = html.read_text()
    assert "other &lt;b&gt;" in text and "other <b>" not in text
    assert text.count("<img") == 2 and "2.00x" in text and "loss difference 1.0e-07" in text
    ratio = record["cases"]["case"]["comparisons"][0]["ratios"][0]
    assert 2 < ratio["value"] < 50, f"ten times the additions gave a ratio of {ratio['value']}"


def test_two_runs_compare_by_ratio_and_say_when_intervals_touch(record, capsys):
    from rich.console import Console

    faster = json.loads(json.dumps(record))
    ratio = faster["cases"]["case"]["comparisons"][0]["ratios"][0]
    for key in ("value", "low", "high"):
        ratio[key] *= 10
    Console(width=200).print(results.compare_table(record, faster))
    shown = capsys.readouterr().out
    assert "+900%" in shown and "1.00x as fast" in shown and "1.00x as small" in shown
    Console(width=200).print(results.compare_table(record, record))
    assert "within the spread" in capsys.readouterr().out


@pytest.mark.parametrize("content, words", [(None, "No such file"), ("{", "not JSON"), ("{}", "without machine")])
def test_other_files_are_refused_with_what_was_expected(tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(results.Unusable, match=words):
        results.read(path)


def test_machine_is_described_without_names_and_paths():
    import getpass
    import socket

    from benchmarks import machine

    about = json.dumps(machine.describe(2))
    assert "torch" in about and "jax" in about
    for private in (socket.gethostname(), str(machine.ROOT), f"/{getpass.getuser()}"):
        assert private not in about, f"{private} stands in the description"


def test_picture_of_every_kind_is_made(record):
    for comparison in record["cases"]["case"]["comparisons"]:
        assert len(page.picture(comparison)) > 1000
