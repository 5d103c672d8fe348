"""Pipeline schedules: simulated bubbles equal the published formulas, and no more is held than they say."""

import dataclasses

import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.pipeline_schedules import (
    bubble,
    gpipe,
    interleaved,
    one_f_one_b,
    picture,
    simulate,
    zero_bubble,
)

TIMES = {"F": 3.0, "B": 6.0}
EQUAL = {"F": 1.0, "B": 1.0, "W": 1.0}
SIZES = [(2, 4), (4, 8), (4, 10), (8, 64)]


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_idle_time_is_that_of_the_formula(make, stages, micro_batches):
    schedule = make(stages, micro_batches)
    assert simulate(schedule, TIMES).idle == pytest.approx([bubble(schedule, TIMES)] * stages)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 8), (8, 4, 64)])
def test_chunks_divide_the_idle_time(stages, chunks, micro_batches):
    schedule = interleaved(stages, chunks, micro_batches)
    timeline = simulate(schedule, TIMES)
    assert timeline.idle == pytest.approx([(stages - 1) * 9 / chunks] * stages)
    # Warm-up of the first device: 2 (S - 1) + (v - 1) S forward passes, and the one before the first backward pass.
    assert timeline.in_flight[0] == 2 * (stages - 1) + (chunks - 1) * stages + 1


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (4, 12), (8, 32)])
def test_weight_gradients_in_the_gaps_leave_a_third_of_the_idle_time_and_hold_no_more(stages, micro_batches):
    schedule = zero_bubble(stages, micro_batches)
    timeline = simulate(schedule, EQUAL)
    # Devices begin and end at different times; the paper's figure is the step's length less the work of one device.
    assert timeline.length - 3 * micro_batches == bubble(schedule, EQUAL) == stages - 1
    assert max(timeline.in_flight) <= stages


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_one_f_one_b_holds_as_many_inputs_as_stages_lie_ahead_and_gpipe_all(stages, micro_batches):
    assert simulate(one_f_one_b(stages, micro_batches), TIMES).in_flight == tuple(range(stages, 0, -1))
    assert set(simulate(gpipe(stages, micro_batches), TIMES).in_flight) == {micro_batches}


def test_lists_that_wait_for_each_other_or_miss_work_are_refused():
    schedule = one_f_one_b(2, 2)
    backwards = tuple(tuple(reversed(order)) for order in schedule.orders)
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(dataclasses.replace(schedule, orders=backwards), TIMES)
    short = (schedule.orders[0][:-1], schedule.orders[1])
    with pytest.raises(ValueError, match="device 0 does not do each piece of work exactly once"):
        simulate(dataclasses.replace(schedule, orders=short), TIMES)
    with pytest.raises(UserError, match="10 are no multiple of 4; use 8 or 12"):
        interleaved(4, 2, 10)


def test_the_picture_has_a_column_for_each_unit_of_time():
    assert picture(simulate(one_f_one_b(2, 2), {"F": 1.0, "B": 1.0}), 1.0) == "01.a.b\n.0a1b."
