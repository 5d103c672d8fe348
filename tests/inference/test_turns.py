"""The order of waiting answers, without an engine."""

import dataclasses
import itertools

from mindvl_jax.inference.turns import Turns

_arrivals = itertools.count()


@dataclasses.dataclass(eq=False)
class _Waiter:
    owner: str | None
    cost: int = 10
    priority: int = 0
    prompt: object = dataclasses.field(default_factory=object)
    arrival: int = dataclasses.field(default_factory=_arrivals.__next__)


class _Line:
    def __init__(self, *waiters):
        self.turns, self.waiting = Turns(), []
        self.join(*waiters)

    def join(self, *waiters):
        for waiter in waiters:
            self.turns.expect(waiter)
        self.waiting += waiters

    def start(self, count: int) -> list[_Waiter]:
        """Start so many, one after another."""
        started = []
        for _ in range(count):
            self.waiting = list(self.turns.order(self.waiting))
            started.append(self.waiting.pop(0))
            self.turns.charge(started[-1])
        return started


def _owners(waiters) -> str:
    return "".join(waiter.owner for waiter in waiters)


def test_shares_are_equal_in_tokens_however_many_requests_an_owner_has():
    line = _Line(*(_Waiter("a", cost=10) for _ in range(40)), *(_Waiter("b", cost=30) for _ in range(10)))
    started = line.start(28)
    spent = {owner: sum(waiter.cost for waiter in started if waiter.owner == owner) for owner in "ab"}
    assert abs(spent["a"] - spent["b"]) <= 30 and sum(spent.values()) >= 400


def test_who_comes_late_neither_catches_up_on_the_past_nor_waits_behind_the_whole_line():
    line = _Line(*(_Waiter("a") for _ in range(30)))
    line.start(10)
    line.join(*(_Waiter("b") for _ in range(10)))
    assert _owners(line.start(6)) in ("ababab", "bababa")


def test_a_large_request_is_not_forgotten_when_its_owner_waits_no_more():
    line = _Line(*(_Waiter("a") for _ in range(30)), _Waiter("b", cost=50))
    assert "b" in _owners(line.start(2))
    line.join(_Waiter("b"))
    assert _owners(line.start(5)).count("b") <= 1
    line.join(*(_Waiter("b") for _ in range(3)))
    assert _owners(line.start(4)).count("b") >= 1


def test_what_was_aborted_before_it_started_costs_nothing():
    line = _Line(*(_Waiter("a") for _ in range(30)), *(_Waiter("b") for _ in range(30)))
    line.waiting = [waiter for waiter in line.waiting if waiter.owner == "a"]
    line.start(1)
    line.join(_Waiter("b"))
    assert "b" in _owners(line.start(2))


def test_priority_orders_the_answers_of_one_owner_alone_and_answers_of_a_prompt_stay_together():
    others = _Waiter("a"), _Waiter("b", priority=9), _Waiter("b")
    prompt = object()
    urgent = [_Waiter("a", priority=-5, prompt=prompt) for _ in range(3)]
    line = _Line(*others, *urgent)
    assert list(line.turns.order(line.waiting)) == [others[2], *urgent, others[1], others[0]]
